"""Layers, and where their elements lie.

A *layer* is what shares one second moment: a parameter, or one of several slices of equal size along its
first dimension. A *segment* says that some elements of a tensor are elements of a parameter. A *layout*
lists the segments of one tensor, the layers of which this rank holds something, and the process groups over
which those that are cut between ranks have to be completed.

Everything NovoGrad keeps is either element-wise, which may be cut anywhere, or one scalar per layer,
which one small all-reduce completes. Nothing here knows a framework: ``novoscale.integrations``
turns what each framework has into a :class:`Layout`. Nor does anything here grow with the number of layers
of a parameter: a matrix by rows has thousands.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


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
    """

    name: str
    numel: int
    layers: int = 1
    number: int = 0

    @property
    def layer_numel(self) -> int:
        """Elements of each of its layers."""
        return self.numel // self.layers

    def layer_name(self, layer: int) -> str:
        """The name of one of its layers."""
        return self.name if self.layers == 1 else f"{self.name}[{layer}]"


@dataclass(frozen=True, slots=True)
class Held:
    """The layers ``first..stop`` of a parameter, of which this rank holds elements or the second moment."""

    parameter: Parameter
    first: int
    stop: int

    @property
    def count(self) -> int:
        """The number of layers."""
        return self.stop - self.first


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
    """``count`` layers that follow each other; ``place`` of the first among those of the tensor on this rank,
    None where the rank holds nothing of them."""

    place: int | None
    count: int


@dataclass(frozen=True, slots=True)
class Completion:
    """The layers that are cut over one process group.

    ``spans`` has them in the same order on every rank of the group; ``parameters`` are what the ranks have to
    agree on: see ``Plan``.
    """

    process_group: dist.ProcessGroup | None
    spans: tuple[Span, ...]
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Which layers the elements of one tensor belong to.

    Elements in no segment are padding: they are never read for a statistic and never changed.

    Attributes:
        numel: elements of the tensor on this rank, padding included.
        held: the layers that this rank has, by parameter. In this order they make up the tensor's vector of
            layers.
        segments: where the elements lie; ``Segment.parameter`` indexes ``held``.
        completions: the process groups that complete the layers that are cut, in order.
        scattered: whether each rank of those groups has other layers of the same parameter.
    """

    numel: int
    held: tuple[Held, ...]
    segments: tuple[Segment, ...]
    completions: tuple[Completion, ...] = ()
    scattered: bool = False

    @property
    def layers(self) -> int:
        """The number of layers that this rank has."""
        return sum(h.count for h in self.held)

    def places(self) -> list[int]:
        """Of each parameter in ``held``, the place of its first layer in the tensor's vector of layers."""
        places = [0]
        for h in self.held:
            places.append(places[-1] + h.count)
        return places[:-1]


def layers_of(name: str, shape: Sequence[int], granularity: str | int) -> int:
    """Into how many layers a parameter is cut along its first dimension.

    Args:
        name: the parameter's.
        shape: of the whole parameter.
        granularity: "tensor": one; "row": one for each index of the first dimension, where there are two or
            more; a number: so many.

    Raises:
        LayoutError: the number does not divide the first dimension.
    """
    if granularity == "tensor" or math.prod(shape) == 0:
        return 1
    if granularity == "row":
        return shape[0] if len(shape) > 1 else 1
    count = int(granularity)
    if not shape or shape[0] % count:
        raise LayoutError(
            f"{name}: granularity={count} cuts a parameter into {count} layers of equal size along its first "
            f"dimension, which its shape {tuple(shape)} does not allow. Put it into a param group of its own"
        )
    return count


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
        also: further groups, each with the parameters of which every layer is cut over it too (indices into
            ``parameters``), such as the tensor-parallel group. Its ranks hold the same layers.

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
    place = dict(zip(mine, Layout(numel, held, ()).places(), strict=True))
    spans = []
    for index, by_rank in enumerate(ranges):
        own = by_rank.get(rank, range(0))
        for cut in _shared(list(by_rank.values())):
            spans.append(Span(place[index] + cut.start - own.start if cut.start in own else None, len(cut)))
    # Also without a cut layer: the ranks must agree on whether a step is skipped.
    completions = [Completion(process_group, tuple(spans), tuple(parameters))][: len(pieces) > 1]
    for group, members in also:
        cut_too = [i for i in mine if i in members]
        spans = [Span(place[i], len(ranges[i][rank])) for i in cut_too]
        completions.append(Completion(group, tuple(spans), tuple(parameters[i] for i in cut_too)))
    local = {index: i for i, index in enumerate(mine)}
    segments = [replace(s, parameter=local[s.parameter]) for s in sorted(pieces[rank], key=lambda s: s.start)]
    return Layout(numel, held, tuple(segments), tuple(completions))


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


def sharded(name: str, tensor: DTensor, layers: int = 1, number: int = 0) -> Layout:
    """The layout of this rank's part of a DTensor parameter.

    A parameter that is one layer, or a few, has their second moments on every rank of its mesh. One whose
    layers are the rows has those of the rows that this rank holds: they are cut by the placements of the
    other dimensions only.

    Raises:
        LayoutError: if the parameter is a partial sum.
    """
    parameter = Parameter(name, tensor.numel(), layers, number)
    local, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    rows = by_rows(tensor, parameter)
    # Where nothing is held, the offset is the end.
    held = Held(parameter, offsets[0], offsets[0] + local[0]) if rows else Held(parameter, 0, layers)
    completions = []
    for dim, placement in enumerate(tensor.placements):
        if placement.is_partial():
            raise LayoutError(
                f"{name} is a DTensor with the placement {placement}: each rank holds a part of a sum, not a "
                "part of the parameter. Redistribute it to Shard or Replicate"
            )
        if not placement.is_replicate():
            spans = () if rows and cuts_rows(placement) else (Span(0, held.count),)
            completions.append(Completion(tensor.device_mesh.get_group(dim), spans, (parameter,)))
    segments = tuple(_box(tensor.shape, local, offsets)) if math.prod(local) else ()
    scattered = rows and any(map(cuts_rows, tensor.placements))
    return Layout(math.prod(local), (held,), segments, tuple(completions), scattered)


def by_rows(tensor: Tensor, parameter: Parameter) -> bool:
    """Whether the layers of a parameter are its rows, so that one cut along its first dimension cuts none."""
    return parameter.layers > 1 and parameter.layers == tensor.shape[0]


def cuts_rows(placement: Placement) -> bool:
    """Whether a placement of a DTensor cuts it along its first dimension."""
    return not placement.is_replicate() and cast(Shard, placement).dim == 0


def _box(shape: Sequence[int], local: Sequence[int], offsets: Sequence[int]) -> Iterator[Segment]:
    """The segments of a tensor of shape ``local`` that lies at ``offsets`` in a parameter."""
    cut = [d for d in range(len(shape)) if local[d] != shape[d]]
    last = cut[-1] if cut else 0  # within its elements the order is that of the parameter
    run, stride = math.prod(local[last:]), math.prod(shape[last:])
    steps = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    begin = sum(o * s for o, s in zip(offsets, steps, strict=True))
    count = local[last - 1] if last > 0 else 1  # runs that are `stride` apart
    start = 0
    for index in product(*(range(n) for n in local[: max(last - 1, 0)])):
        offset = begin + sum(i * s for i, s in zip(index, steps, strict=False))
        stop = start + count * run
        yield Segment(start, stop, 0, offset, *((run, stride) if count > 1 else ()))
        start = stop


def repeated(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Each index as often as ``counts`` says, and which of its repetitions each is: int64, on the CPU."""
    index = torch.repeat_interleave(counts)
    return index, torch.arange(len(index), device="cpu") - (counts.cumsum(0) - counts)[index]


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    local = tensor.to_local()
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def from_local(local: Tensor, p: DTensor, shape: Sequence[int], placements: Sequence[Placement]) -> DTensor:
    """A DTensor of another shape on the mesh of ``p``, of which ``local`` is this rank's part."""
    stride = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
    return DTensor.from_local(
        local, p.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def local_gradient(p: Tensor) -> Tensor:
    """This rank's part of a parameter's gradient, placed as the parameter is.

    A gradient that is placed otherwise (a partial sum, under tensor parallelism) is redistributed.
    """
    grad = p.grad
    assert grad is not None
    if isinstance(p, DTensor) and isinstance(grad, DTensor) and grad.placements != p.placements:
        grad = grad.redistribute(placements=p.placements)
    return local_tensor(grad)


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
