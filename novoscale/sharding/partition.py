"""Parameters that lie in pieces over the ranks of a process group, as in ZeRO's flat partitions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch.distributed as dist

from novoscale.sharding import blocks
from novoscale.sharding.layers import LayoutError, Parameter
from novoscale.sharding.layout import Fragment, Layout, LocalShard, Reduction, Span


def one_after_another(sizes: Sequence[int], partition: int, ranks: int) -> list[list[Fragment]]:
    """The pieces of each rank where parameters lie one after another in equal partitions of a flat tensor.

    Args:
        sizes: elements of the parameters.
        partition: elements of a partition.
        ranks: how many there are.
    """
    pieces: list[list[Fragment]] = [[] for _ in range(ranks)]
    begin = 0
    for index, numel in enumerate(sizes):
        end = begin + numel
        for rank in range(begin // partition, (end - 1) // partition + 1):
            low, high = max(begin, rank * partition), min(end, (rank + 1) * partition)
            first = rank * partition
            pieces[rank].append(Fragment(low - first, high - first, index, low - begin))
        begin = end
    return pieces


def partition(
    parameters: Sequence[Parameter],
    pieces: Sequence[Sequence[Fragment]],
    *,
    rank: int,
    numel: int,
    process_group: dist.ProcessGroup | None = None,
    also: Sequence[tuple[dist.ProcessGroup, Collection[int]]] = (),
) -> Layout:
    """The layout of this rank's tensor when parameters are sharded over the ranks of a process group.

    Every rank passes the same ``parameters`` and ``pieces``. Only layers with pieces on more than one
    rank take part in a collective.

    Args:
        parameters: all of them, in the same order on every rank.
        pieces: for each rank of the group, the fragments of its tensor; ``Fragment.parameter`` indexes
            ``parameters``.
        rank: this rank, in the group.
        numel: elements of this rank's tensor, padding included.
        process_group: completes the layers that are sharded.
        also: further groups, each with the parameters that it shards too (indices into ``parameters``), such
            as the tensor-parallel group. Its ranks have the same layers of ``pieces``:
            ``Parameter.row_shares`` and ``column_shares`` say how the real ones are sharded.

    Raises:
        LayoutError: if the pieces overlap, run over the end of a tensor, or do not make up every
            parameter exactly once.
    """
    _check_pieces(parameters, pieces, rank, numel)
    # A rank that has two pieces of a parameter has the layers between them too, so that it has a range.
    ranges: list[dict[int, range]] = [{} for _ in parameters]  # by parameter and rank
    for holder, fragments in enumerate(pieces):
        for s in fragments:
            size = parameters[s.parameter].layer_numel
            first, stop = s.offset // size, (s.offset + s.numel - 1) // size + 1
            known = ranges[s.parameter].get(holder, range(first, stop))
            ranges[s.parameter][holder] = range(min(first, known.start), max(stop, known.stop))
    mine = [index for index, by_rank in enumerate(ranges) if rank in by_rank]
    shards = tuple(LocalShard(parameters[i], ranges[i][rank].start, ranges[i][rank].stop) for i in mine)
    bare = Layout(numel, shards, ())
    place, column = (dict(zip(mine, p, strict=True)) for p in (bare.places(), bare.column_places()))
    local = {index: i for i, index in enumerate(mine)}
    spans, columns, sharded = [], [], []
    for index, by_rank in enumerate(ranges):
        own = by_rank.get(rank, range(0))
        for shared in _shared(list(by_rank.values())):
            here = place[index] + shared.start - own.start if shared.start in own else None
            spans.append(Span(here, len(shared)))
        if len(by_rank) > 1:
            sharded.append(index)
            if parameters[index].factored:
                columns.append(Span(column.get(index), parameters[index].columns))
    scattered = {
        i for i, p in enumerate(parameters) if p.column_shares > 1 or len(set(ranges[i].values())) > 1
    }

    def spans_of(indices: Sequence[int]) -> tuple[Span, ...]:
        return tuple(Span(local.get(i), 1) for i in indices)

    # Also without a sharded layer: the ranks must agree on whether a step is skipped.
    reductions = [
        Reduction(
            process_group,
            tuple(spans),
            tuple(parameters),
            tuple(columns),
            spans_of(sharded),
            spans_of([i for i in sharded if i in scattered]),
        )
    ][: len(pieces) > 1]
    for group, members in also:
        parallel = [i for i in mine if i in members]
        rows = [i for i in parallel if parameters[i].row_shares > 1]
        of_columns = [i for i in parallel if parameters[i].factored and parameters[i].column_shares > 1]
        reductions.append(
            Reduction(
                group,
                tuple(Span(place[i], len(ranges[i][rank])) for i in rows),
                tuple(parameters[i] for i in parallel),
                tuple(Span(column[i], parameters[i].columns) for i in of_columns),
                spans_of(parallel),
                spans_of([i for i in parallel if i in scattered]),
            )
        )
    fragments = [
        replace(s, parameter=local[s.parameter]) for s in sorted(pieces[rank], key=lambda s: s.start)
    ]
    sharded_blocks = partial(
        blocks.of_partition,
        [p.numel for p in parameters],
        [(s.parameter, s.offset, s.numel) for fragments in pieces for s in fragments],
        [local.get(i, -1) for i in range(len(parameters))],
        process_group,
    )
    return Layout(numel, shards, tuple(fragments), tuple(reductions), sharded_blocks=sharded_blocks)


def _shared(ranges: Sequence[range]) -> Iterator[range]:
    """The ranges that lie in more than one of ``ranges``; each of those has all of such a range or none."""
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


def _check_pieces(
    parameters: Sequence[Parameter], pieces: Sequence[Sequence[Fragment]], rank: int, numel: int
) -> None:
    spans: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for holder, fragments in enumerate(pieces):
        end = 0
        for s in sorted(fragments, key=lambda s: s.start):
            if s.numel <= 0 or s.start < end:
                raise LayoutError(
                    f"rank {holder}: the elements {s.start} to {s.stop} given to parameter "
                    f"{parameters[s.parameter].name} are empty or overlap those of another fragment"
                )
            end = s.stop
            spans[s.parameter].append((s.offset, s.offset + s.numel))
        if holder == rank and end > numel:
            raise LayoutError(f"rank {rank}: a fragment ends at element {end} of a tensor of {numel}")
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
