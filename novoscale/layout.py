"""Layers, and where their elements lie.

A *layer* is what shares one second moment: a parameter, or one of several slices of equal size along its
first dimension. A *factored* parameter is a matrix that has a second moment for each row, which are its
layers, and for each column. A *segment* says that some elements of a tensor are elements of a parameter. A
*layout* lists the segments of one tensor, the layers of which this rank holds something, and the process
groups over which those that are cut between ranks have to be completed.

Everything NovoGrad keeps is either element-wise, which may be cut anywhere, or one scalar per layer,
which one small all-reduce completes. Nothing here knows a framework: ``novoscale.integrations``
turns what each framework has into a :class:`Layout`. Nor does anything here grow with the number of layers
of a parameter: a matrix by rows has thousands.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from novoscale import blocks


class LayoutError(ValueError):
    """The elements of a tensor cannot be assigned to layers."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter, whole, whatever a rank holds of it.

    Attributes:
        name: for messages.
        numel: its number of elements, on all ranks.
        layers: of how many layers of equal size it consists, one after another.
        number: tells it from the other parameters of the model, the same however they are cut.
        factored: whether its columns have second moments too.
        counts_once: whether it has one count of steps, and not one for each layer.
        row_shares: over how many ranks of a wrapper's own tensor parallelism each layer is cut, beside what
            ``numel`` says.
        column_shares: the same of each column.
        shape: of the whole parameter, if it is known.
    """

    name: str
    numel: int
    layers: int = 1
    number: int = 0
    factored: bool = False
    counts_once: bool = False
    row_shares: int = 1
    column_shares: int = 1
    shape: tuple[int, ...] = ()

    @property
    def layer_numel(self) -> int:
        """Elements of each of its layers."""
        return self.numel // self.layers

    @property
    def columns(self) -> int:
        """How many columns have second moments."""
        return self.layer_numel if self.factored else 0

    def layer_name(self, layer: int) -> str:
        """The name of one of its layers."""
        return self.name if self.layers == 1 else f"{self.name}[{layer}]"


@dataclass(frozen=True, slots=True)
class Held:
    """The layers ``first..stop`` of a parameter, of which this rank holds elements or the second moment.

    Of a factored one it has the second moments of all columns: they are few, beside the elements.
    """

    parameter: Parameter
    first: int
    stop: int

    @property
    def count(self) -> int:
        """The number of layers."""
        return self.stop - self.first

    @property
    def columns(self) -> int:
        """The number of columns."""
        return self.parameter.columns

    @property
    def counts(self) -> int:
        """How many counts of steps there are."""
        return 1 if self.parameter.counts_once else self.count


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements ``start..stop`` of a tensor (row-major) are the elements from ``offset`` on of a parameter.

    ``parameter`` is an index into the list that comes with the segment. Where the parameter is cut along
    another dimension than the first, the elements come in runs: ``run`` of them are consecutive in the
    parameter, and the runs begin ``stride`` elements apart.
    """

    start: int
    stop: int
    parameter: int
    offset: int = 0
    run: int | None = None
    stride: int = 0

    @property
    def numel(self) -> int:
        """The number of elements."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Span:
    """``count`` layers (or columns, or parameters) that follow each other; ``place`` of the first among those
    of the tensor on this rank, None where the rank holds nothing of them."""

    place: int | None
    count: int


@dataclass(frozen=True, slots=True)
class Completion:
    """The layers that are cut over one process group.

    Attributes:
        process_group: of the ranks that hold parts of them.
        spans: the layers, in the same order on every rank of the group.
        parameters: what the ranks have to agree on: see ``Plan``.
        columns: the columns of factored parameters that are cut, as the layers.
        cut: the parameters that are cut, as the layers; ``place`` is the index in ``Layout.held``.
        scattered: those of which some ranks, in any group that cuts them, have different layers.
    """

    process_group: dist.ProcessGroup | None
    spans: tuple[Span, ...]
    parameters: tuple[Parameter, ...]
    columns: tuple[Span, ...] = ()
    cut: tuple[Span, ...] = ()
    scattered: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """Which layers the elements of one tensor belong to.

    Elements in no segment are padding: they are never read for a statistic and never changed.

    Attributes:
        numel: elements of the tensor on this rank, padding included.
        held: the layers that this rank has, by parameter. In this order they make up the tensor's vector of
            layers, but that those of factored parameters come after the others; and its vector of columns.
        segments: where the elements lie; ``Segment.parameter`` indexes ``held``.
        completions: the process groups that complete the layers that are cut, in order.
        scattered: whether each rank of those groups has other layers of the same parameter.
        cut_blocks: finds the blocks of the first moment that are cut; to be asked only where it is in blocks.
    """

    numel: int
    held: tuple[Held, ...]
    segments: tuple[Segment, ...]
    completions: tuple[Completion, ...] = ()
    scattered: bool = False
    cut_blocks: Callable[[], blocks.CutBlocks] = blocks.none

    @property
    def layers(self) -> int:
        """The number of layers that this rank has."""
        return sum(h.count for h in self.held)

    @property
    def columns(self) -> int:
        """The number of columns of factored parameters."""
        return sum(h.columns for h in self.held)

    @property
    def rows(self) -> int:
        """The number of layers that are rows of factored parameters."""
        return sum(h.count for h in self.held if h.parameter.factored)

    @property
    def counts(self) -> int:
        """The number of counts of steps."""
        return sum(h.counts for h in self.held)

    def in_order(self) -> list[int]:
        """The indices of ``held`` in the order of the tensor's vector of layers."""
        return sorted(range(len(self.held)), key=lambda i: self.held[i].parameter.factored)

    def numbers(self) -> list[int]:
        """Of each parameter in ``held``, which it is in that order."""
        numbers = {index: number for number, index in enumerate(self.in_order())}
        return [numbers[index] for index in range(len(self.held))]

    def places(self) -> list[int]:
        """Of each parameter in ``held``, the place of its first layer in the tensor's vector of layers."""
        starts = _starts([self.held[i].count for i in self.in_order()])
        return [starts[number] for number in self.numbers()]

    def column_places(self) -> list[int]:
        """The same of its columns."""
        return _starts([h.columns for h in self.held])

    def by_parameter(self) -> Layout:
        """The elements, with each parameter as one layer; those in the order of the vector of layers."""
        numbers = self.numbers()
        parameters = (replace(self.held[i].parameter, layers=1, factored=False) for i in self.in_order())
        segments = tuple(replace(s, parameter=numbers[s.parameter]) for s in self.segments)
        return Layout(self.numel, tuple(Held(p, 0, 1) for p in parameters), segments)

    def owned(self) -> list[range]:
        """The places of the layers whose first element is on this rank.

        Each layer of a parameter has one owner among the ranks that complete it: to count it once.
        """
        found, places = [], self.places()
        for s in self.segments:
            h, place = self.held[s.parameter], places[s.parameter]
            size, run = h.parameter.layer_numel, s.run or s.numel
            for nth in range(s.numel // run):
                begin = s.offset + nth * s.stride
                first, stop = -(-begin // size), (begin + run - 1) // size + 1
                if first < stop:
                    found.append(range(place + first - h.first, place + stop - h.first))
        return found


def _starts(counts: Sequence[int]) -> list[int]:
    return list(accumulate(counts, initial=0))[:-1]


def matrix_dimensions(shape: Sequence[int]) -> int:
    """Of how many dimensions the rows of a factored parameter are made; the rest makes the columns.

    The split with the fewest rows and columns together: the smallest state.
    """
    return min(range(1, len(shape)), key=lambda k: math.prod(shape[:k]) + math.prod(shape[k:]))


def counts_once(granularity: str | int) -> bool:
    """Whether a parameter has one count of steps, and not one for each layer."""
    return granularity in ("element", "factored")


def describe(name: str, shape: Sequence[int], granularity: str | int, number: int = 0) -> Parameter:
    """A parameter with its layers.

    Args:
        name: the parameter's.
        shape: of the whole parameter.
        granularity: what a layer is, see ``NovoGrad``.
        number: see ``Parameter``.

    Raises:
        LayoutError: the number of layers does not divide the first dimension, or a layer for each element of
            a parameter that is no vector.
    """
    numel = math.prod(shape)
    factored = granularity == "factored" and len(shape) > 1 and numel > 0
    layers = _layers(name, shape, granularity) if numel else 1
    return Parameter(name, numel, layers, number, factored, counts_once(granularity), shape=tuple(shape))


def _layers(name: str, shape: Sequence[int], granularity: str | int) -> int:
    """Into how many layers a parameter is cut along its leading dimensions."""
    is_vector = len(shape) < 2
    if granularity == "tensor" or (granularity == "row" and is_vector):
        return 1
    if granularity == "row":
        return shape[0]
    if counts_once(granularity) and is_vector:
        return math.prod(shape)
    if granularity == "factored":
        return math.prod(shape[: matrix_dimensions(shape)])
    if granularity == "element":
        elements, split = math.prod(shape), matrix_dimensions(shape)
        factors = math.prod(shape[:split]) + math.prod(shape[split:])
        raise LayoutError(
            f'{name} has the shape {tuple(shape)}: granularity="element" is for vectors, and would keep '
            f"{elements:,} second moments here, {4 * elements:,} bytes, as many as Adam. Use "
            f'granularity="factored", which keeps {factors:,} and has one for each element of vectors'
        )
    count = int(granularity)
    if not shape or shape[0] % count:
        raise LayoutError(
            f"{name}: granularity={count} cuts a parameter into {count} layers of equal size along its first "
            f"dimension, which its shape {tuple(shape)} does not allow. Put it into a param group of its own"
        )
    return count


def one_after_another(sizes: Sequence[int], partition: int, ranks: int) -> list[list[Segment]]:
    """The pieces of each rank where parameters lie one after another in equal partitions of a flat tensor.

    Args:
        sizes: elements of the parameters.
        partition: elements of a partition.
        ranks: how many there are.
    """
    pieces: list[list[Segment]] = [[] for _ in range(ranks)]
    begin = 0
    for index, numel in enumerate(sizes):
        end = begin + numel
        for rank in range(begin // partition, (end - 1) // partition + 1):
            low, high = max(begin, rank * partition), min(end, (rank + 1) * partition)
            first = rank * partition
            pieces[rank].append(Segment(low - first, high - first, index, low - begin))
        begin = end
    return pieces


def whole(parameter: Parameter) -> Layout:
    """The layout of a tensor that lies whole on this rank."""
    n = parameter.numel
    return Layout(n, (Held(parameter, 0, parameter.layers),), (Segment(0, n, 0),) if n else ())


def partition(
    parameters: Sequence[Parameter],
    pieces: Sequence[Sequence[Segment]],
    *,
    rank: int,
    numel: int,
    process_group: dist.ProcessGroup | None = None,
    also: Sequence[tuple[dist.ProcessGroup, Collection[int]]] = (),
) -> Layout:
    """The layout of this rank's tensor when parameters are cut over the ranks of a process group.

    Every rank passes the same ``parameters`` and ``pieces``. Only layers with pieces on more than one
    rank take part in a collective.

    Args:
        parameters: all of them, in the same order on every rank.
        pieces: for each rank of the group, the segments of its tensor; ``Segment.parameter`` indexes
            ``parameters``.
        rank: this rank, in the group.
        numel: elements of this rank's tensor, padding included.
        process_group: completes the layers that are cut.
        also: further groups, each with the parameters that are cut over it too (indices into ``parameters``),
            such as the tensor-parallel group. Of each its ranks have the same layers of ``pieces``:
            ``Parameter.row_shares`` and ``column_shares`` say how the real ones are cut.

    Raises:
        LayoutError: if the pieces overlap, run over the end of a tensor, or do not make up every
            parameter exactly once.
    """
    _check_pieces(parameters, pieces, rank, numel)
    # A rank that has two pieces of a parameter has the layers between them too, so that it has a range.
    ranges: list[dict[int, range]] = [{} for _ in parameters]  # by parameter and rank
    for holder, segments in enumerate(pieces):
        for s in segments:
            size = parameters[s.parameter].layer_numel
            first, stop = s.offset // size, (s.offset + s.numel - 1) // size + 1
            known = ranges[s.parameter].get(holder, range(first, stop))
            ranges[s.parameter][holder] = range(min(first, known.start), max(stop, known.stop))
    mine = [index for index, held in enumerate(ranges) if rank in held]
    held = tuple(Held(parameters[i], ranges[i][rank].start, ranges[i][rank].stop) for i in mine)
    bare = Layout(numel, held, ())
    place, column = (dict(zip(mine, p, strict=True)) for p in (bare.places(), bare.column_places()))
    local = {index: i for i, index in enumerate(mine)}
    spans, columns, cut = [], [], []
    for index, by_rank in enumerate(ranges):
        own = by_rank.get(rank, range(0))
        for shared in _shared(list(by_rank.values())):
            here = place[index] + shared.start - own.start if shared.start in own else None
            spans.append(Span(here, len(shared)))
        if len(by_rank) > 1:
            cut.append(index)
            if parameters[index].factored:
                columns.append(Span(column.get(index), parameters[index].columns))
    scattered = {
        i for i, p in enumerate(parameters) if p.column_shares > 1 or len(set(ranges[i].values())) > 1
    }

    def held_of(indices: Sequence[int]) -> tuple[Span, ...]:
        return tuple(Span(local.get(i), 1) for i in indices)

    # Also without a cut layer: the ranks must agree on whether a step is skipped.
    completions = [
        Completion(
            process_group,
            tuple(spans),
            tuple(parameters),
            tuple(columns),
            held_of(cut),
            held_of([i for i in cut if i in scattered]),
        )
    ][: len(pieces) > 1]
    for group, members in also:
        parallel = [i for i in mine if i in members]
        rows = [i for i in parallel if parameters[i].row_shares > 1]
        of_columns = [i for i in parallel if parameters[i].factored and parameters[i].column_shares > 1]
        completions.append(
            Completion(
                group,
                tuple(Span(place[i], len(ranges[i][rank])) for i in rows),
                tuple(parameters[i] for i in parallel),
                tuple(Span(column[i], parameters[i].columns) for i in of_columns),
                held_of(parallel),
                held_of([i for i in parallel if i in scattered]),
            )
        )
    segments = [replace(s, parameter=local[s.parameter]) for s in sorted(pieces[rank], key=lambda s: s.start)]
    cut_blocks = partial(
        blocks.of_partition,
        [p.numel for p in parameters],
        [(s.parameter, s.offset, s.numel) for segments in pieces for s in segments],
        [local.get(i, -1) for i in range(len(parameters))],
        process_group,
    )
    return Layout(numel, held, tuple(segments), tuple(completions), cut_blocks=cut_blocks)


def _shared(ranges: Sequence[range]) -> Iterator[range]:
    """The ranges that lie in more than one of ``ranges``, cut so that each of those has all of it or none."""
    bounds = sorted({bound for r in ranges for bound in (r.start, r.stop)})
    steps: defaultdict[int, int] = defaultdict(int)
    for r in ranges:
        steps[r.start] += 1
        steps[r.stop] -= 1
    holders = 0
    for low, high in pairwise(bounds):
        holders += steps[low]
        if holders > 1:
            yield range(low, high)


def repeated(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Each index as often as ``counts`` says, and which of its repetitions each is: int64, on the CPU."""
    index = torch.repeat_interleave(counts)
    return index, torch.arange(len(index), device="cpu") - (counts.cumsum(0) - counts)[index]


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    # Not to_local(), which makes a view of it: for a thousand tensors that is most of a step's time.
    local = tensor._local_tensor
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def has_dtensors(tensors: Sequence[Any]) -> bool:
    """Whether any of them is one. By type: there may be a thousand."""
    return any(issubclass(kind, DTensor) for kind in set(map(type, tensors)))


def local_tensors(tensors: list[Any]) -> list[Tensor]:
    """Of each :func:`local_tensor`: at each step, of which it would be the most for 1,000 layers."""
    if not has_dtensors(tensors):
        return tensors
    if set(map(type, tensors)) == {DTensor}:
        local = [*map(attrgetter("_local_tensor"), tensors)]
        if AsyncCollectiveTensor not in set(map(type, local)):
            return local
    return [*map(local_tensor, tensors)]


def _check_pieces(
    parameters: Sequence[Parameter], pieces: Sequence[Sequence[Segment]], rank: int, numel: int
) -> None:
    spans: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for holder, segments in enumerate(pieces):
        end = 0
        for s in sorted(segments, key=lambda s: s.start):
            if s.numel <= 0 or s.start < end:
                raise LayoutError(
                    f"rank {holder}: the elements {s.start} to {s.stop} given to parameter "
                    f"{parameters[s.parameter].name} are empty or overlap those of another segment"
                )
            end = s.stop
            spans[s.parameter].append((s.offset, s.offset + s.numel))
        if holder == rank and end > numel:
            raise LayoutError(f"rank {rank}: a segment ends at element {end} of a tensor of {numel}")
    for index, parameter in enumerate(parameters):
        end = 0
        for start, stop in sorted(spans[index]):
            if start != end:
                break
            end = stop
        if end != parameter.numel or sum(b - a for a, b in spans[index]) != parameter.numel:
            raise LayoutError(
                f"parameter {parameter.name}: its {parameter.numel} elements are not held exactly once by "
                f"the {len(pieces)} ranks (each rank's pieces of it: {sorted(spans[index])})"
            )
