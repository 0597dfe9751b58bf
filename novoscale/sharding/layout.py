"""Where the elements of layers lie.

A *fragment* says that some elements of a tensor are elements of a parameter. A *layout* lists the fragments
of one tensor, the layers of which this rank holds something, and the process groups over which the sharded
ones have to be completed.

Everything NovoGrad keeps is either element-wise, which may be sharded anywhere, or one scalar per layer,
which one small all-reduce completes. Nothing here knows a framework: ``novoscale.integrations`` turns what
each framework has into a :class:`Layout`. Nor does anything here grow with the number of layers of a
parameter: a matrix by rows has thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch.distributed as dist

from novoscale.sharding import blocks
from novoscale.sharding.layers import Parameter


@dataclass(frozen=True, slots=True)
class LocalShard:
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
class Fragment:
    """Elements ``start..stop`` of a tensor (row-major) are the elements from ``offset`` on of a parameter.

    ``parameter`` is an index into the list that comes with the fragment. Where the parameter is sharded along
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
    """Layers (or columns, or parameters) that follow each other.

    Attributes:
        place: of the first among those of the tensor on this rank; None: the rank holds nothing of them.
        count: how many.
    """

    place: int | None
    count: int


@dataclass(frozen=True, slots=True)
class Reduction:
    """The layers that are sharded over one process group.

    Attributes:
        process_group: of the ranks that hold parts of them.
        spans: the layers, in the same order on every rank of the group.
        parameters: what the ranks have to agree on: see ``Plan``.
        columns: the columns of factored parameters that are sharded, as the layers.
        sharded: the parameters that are sharded, as the layers; ``place`` is the index in
            ``Layout.local_shards``.
        scattered: those of which some ranks, in any group that shards them, have different layers.
    """

    process_group: dist.ProcessGroup | None
    spans: tuple[Span, ...]
    parameters: tuple[Parameter, ...]
    columns: tuple[Span, ...] = ()
    sharded: tuple[Span, ...] = ()
    scattered: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """Which layers the elements of one tensor belong to.

    Elements in no fragment are padding: they are never read for a statistic and never changed.

    Attributes:
        numel: elements of the tensor on this rank, padding included.
        local_shards: the layers that this rank has, by parameter. In this order they make up the tensor's
            vector of layers, but that those of factored parameters come after the others; and its vector of
            columns.
        fragments: where the elements lie; ``Fragment.parameter`` indexes ``local_shards``.
        reductions: the process groups that complete the layers that are sharded, in order.
        scattered: whether each rank of those groups has other layers of the same parameter.
        sharded_blocks: finds the blocks of the first moment that are sharded; to be asked only where it is in
            blocks.
        votes: whether some ranks may have no gradient of it while others have: see ``exchange``.
    """

    numel: int
    local_shards: tuple[LocalShard, ...]
    fragments: tuple[Fragment, ...]
    reductions: tuple[Reduction, ...] = ()
    scattered: bool = False
    sharded_blocks: Callable[[], blocks.ShardedBlocks] = blocks.none
    votes: bool = False

    @property
    def layers(self) -> int:
        """The number of layers that this rank has."""
        return sum(shard.count for shard in self.local_shards)

    @property
    def columns(self) -> int:
        """The number of columns of factored parameters."""
        return sum(shard.columns for shard in self.local_shards)

    @property
    def rows(self) -> int:
        """The number of layers that are rows of factored parameters."""
        return sum(shard.count for shard in self.local_shards if shard.parameter.factored)

    @property
    def counts(self) -> int:
        """The number of counts of steps."""
        return sum(shard.counts for shard in self.local_shards)

    def in_order(self) -> list[int]:
        """The indices of ``local_shards`` in the order of the tensor's vector of layers."""
        return sorted(range(len(self.local_shards)), key=lambda i: self.local_shards[i].parameter.factored)

    def numbers(self) -> list[int]:
        """Of each parameter in ``local_shards``, which it is in that order."""
        numbers = {index: number for number, index in enumerate(self.in_order())}
        return [numbers[index] for index in range(len(self.local_shards))]

    def places(self) -> list[int]:
        """Of each local shard, the place of its first layer in the tensor's vector of layers."""
        starts = _starts([self.local_shards[i].count for i in self.in_order()])
        return [starts[number] for number in self.numbers()]

    def column_places(self) -> list[int]:
        """The same of its columns."""
        return _starts([shard.columns for shard in self.local_shards])

    def by_parameter(self) -> Layout:
        """The elements, with each parameter as one layer; those in the order of the vector of layers."""
        numbers = self.numbers()
        parameters = (
            replace(self.local_shards[i].parameter, layers=1, factored=False) for i in self.in_order()
        )
        fragments = tuple(replace(s, parameter=numbers[s.parameter]) for s in self.fragments)
        return Layout(self.numel, tuple(LocalShard(p, 0, 1) for p in parameters), fragments)

    def owned(self) -> list[range]:
        """The places of the layers whose first element is on this rank.

        Each layer of a parameter has one owner among the ranks that complete it: to count it once.
        """
        found, places = [], self.places()
        for s in self.fragments:
            shard, place = self.local_shards[s.parameter], places[s.parameter]
            size, run = shard.parameter.layer_numel, s.run or s.numel
            for nth in range(s.numel // run):
                begin = s.offset + nth * s.stride
                first, stop = -(-begin // size), (begin + run - 1) // size + 1
                if first < stop:
                    found.append(range(place + first - shard.first, place + stop - shard.first))
        return found


def _starts(counts: Sequence[int]) -> list[int]:
    return list(accumulate(counts, initial=0))[:-1]


def unsharded(parameter: Parameter) -> Layout:
    """The layout of a tensor that is a full parameter."""
    n = parameter.numel
    return Layout(n, (LocalShard(parameter, 0, parameter.layers),), (Fragment(0, n, 0),) if n else ())
