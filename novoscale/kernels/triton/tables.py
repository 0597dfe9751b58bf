"""The tables of the Triton kernels: runs of chunks, and which run each chunk is of.

A chunk is the work of one program. A run is consecutive chunks of a piece that are alike; what a program has
to know of its chunk, it computes from the chunk's number in the run. So a table has a few rows for each
piece, and four bytes for each chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from novoscale.kernels.shards import (
    COLUMN,
    LAYER,
    PLACE,
    POSITION,
    SIZE,
    START,
    STOP,
    Shard,
    at_sharded_blocks,
    by_layers,
    pieces_of,
)
from novoscale.kernels.triton import statistic, update
from novoscale.sharding.blocks import BLOCK
from novoscale.sharding.indices import repeated
from novoscale.state import formats

# Where the size of layers is a multiple of this, a thread looks up the numbers of one layer for all elements
# that it handles at a time.
GROUP = 8
# Parts of a layer begin at multiples of so many elements of it.
ALIGNMENT = 16
NEVER = 1 << 62  # more than there are elements


class Table(NamedTuple):
    """Runs in the order of their launches.

    Attributes:
        rows: int64 ``[runs, columns]``: see update.
        run_of: int32: the run of each chunk. Those of a launch begin at a multiple of four, so that their
            address is aligned.
        launches: of each, what its chunks have in common; where they begin in ``run_of``; how many there are.
    """

    rows: Tensor
    run_of: Tensor
    launches: list[tuple[tuple[int, ...], int, int]]


def arranged(rows: Tensor, kinds: Tensor, count: Tensor, first: int) -> Table:
    """Put the runs of a launch next to each other.

    Args:
        rows: of the runs; the column ``first`` is filled.
        kinds: int64 ``[runs, facts]``: runs with the same facts are in one launch; facts order the launches.
        count: how many chunks each run has.
        first: the column for the number of a run's first chunk in its launch.
    """
    found, kind = _distinct(kinds)
    order = torch.argsort(kind, stable=True)
    rows, kind, count = rows[order], kind[order], count[order]
    chunks = torch.zeros(len(found), dtype=torch.int64, device="cpu").index_add_(0, kind, count)
    room = (chunks + 3) // 4 * 4
    begin = room.cumsum(0) - room
    before = count.cumsum(0) - count  # chunks of all runs
    rows[:, first] = before - (chunks.cumsum(0) - chunks)[kind]
    run_of = torch.zeros(int(room.sum()), dtype=torch.int32, device="cpu")
    run = torch.arange(len(rows), dtype=torch.int32, device="cpu").repeat_interleave(count)
    stop = 0
    for at, n in zip(begin.tolist(), chunks.tolist(), strict=True):
        run_of[at : at + n] = run[stop : stop + n]
        stop += n
    launches = zip(map(tuple, found.tolist()), begin.tolist(), chunks.tolist(), strict=True)
    return Table(rows, run_of, list(launches))


# ---- the update ------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What the chunks of a launch of the update have in common.

    Attributes:
        option: which of the options of tensors.
        factored: whether they are of factored parameters.
        group: see ``update.update``.
        sharded: whether they are elements of sharded blocks.
        aligned: see ``update.update``.
        whole: see ``update.update``.
    """

    option: int
    factored: int
    group: int
    sharded: int
    aligned: int
    whole: int


class UpdateRuns(NamedTuple):
    """The runs of the update. Their rows need not be made again where gradients move.

    Attributes:
        rows: int64 ``[runs, columns]``: see ``update``.
        kinds: int64 ``[runs, facts]``: those of :class:`Kind`, without the alignment of the gradients.
        chunks: how many chunks each run has.
    """

    rows: Tensor
    kinds: Tensor
    chunks: Tensor

    def arranged(self, gradients: Tensor) -> Table:
        """The table for gradients at these addresses."""
        grad = gradients[self.rows[:, update.SHARD.value]] + self.rows[:, update.GRAD.value]
        aligned = self.kinds[:, Kind._fields.index("aligned")] * (grad % 16 == 0)
        kinds = self.kinds.clone()
        kinds[:, Kind._fields.index("aligned")] = aligned
        kinds[:, Kind._fields.index("whole")] *= aligned
        return arranged(self.rows, kinds, self.chunks, update.FIRST.value)


def update_runs(shards: Sequence[Shard], option_of: Tensor, chunk: int, tile: int) -> UpdateRuns:
    """Make the runs of the update.

    Args:
        shards: the tensors.
        option_of: which options each has.
        chunk: elements of a chunk.
        tile: elements a program handles at a time.
    """
    # Bytes of a block of codes; 0 where the moment is not in blocks.
    width = _int64([BLOCK // form.packed if (form := in_blocks(s)) else 0 for s in shards])
    pieces, shard = pieces_of(shards)
    known = pieces[:, STOP] > pieces[:, START]
    pieces, piece = at_sharded_blocks(pieces[known], BLOCK)
    shard = shard[known][piece]
    run, done, end = _runs(pieces, width[shard] > 0, chunk)
    pieces, shard = pieces[run], shard[run]
    blocks = width[shard] > 0
    start, _, layer, position, size, place, column, sharded = pieces.unbind(1)
    at = torch.where(blocks, position, start) + done
    begin = at % chunk
    stop = begin + end - done
    within = (position + done) % size
    factored = column >= 0
    # Where index 0 of its first chunk lies, in elements of each tensor or, of codes and scales, in blocks.
    block = (position + done) // BLOCK - position // BLOCK + place - begin // BLOCK
    element = start + done - begin
    moment = torch.where(blocks, block, place + done - begin)
    index = torch.stack((element, element, moment, block), dim=1)
    tensors = [(s.param, s.grad, s.exp_avg, s.exp_avg_scale) for s in shards]
    address = _int64([[0 if t is None else t.data_ptr() for t in row] for row in tensors]).view(-1, 4)
    address[:, 1] = 0  # gradients may move
    itemsize = _int64([[0 if t is None else t.element_size() for t in row] for row in tensors]).view(-1, 4)
    itemsize[:, 2] *= width.clamp(min=1)
    rows = torch.zeros(len(run), update.ROW.value, dtype=torch.int64, device="cpu")
    entries = {
        update.BEGIN: begin,
        update.END: stop,
        update.LAYER: layer + (position + done) // size - position // size,
        update.POSITION: position + done,
        update.WITHIN: within,
        update.SIZE: size,
        update.COLUMN: column,
        update.SHARDED: sharded,
        update.GROUP: _int64([s.group for s in shards])[shard],
        update.SHARD: shard,
    }
    for entry, values in entries.items():
        rows[:, entry.value] = values
    names = (update.PARAM, update.GRAD, update.EXP_AVG, update.SCALE)
    for entry, values in zip(names, (address[shard] + index * itemsize[shard]).unbind(1), strict=True):
        rows[:, entry.value] = values

    left = size - within
    # Whether a chunk has several layers. Of large ones it has if one ends within it: see _runs.
    several = (left < stop - begin) & ((size < chunk) | ((begin + left) % chunk != 0))
    bounds = (
        within - begin
    ) | size  # the bounds of layers are multiples of each power of two that divides it
    in_tiles = bounds % tile == 0
    large = in_tiles | (size >= 4 * tile) & (~blocks | (bounds % BLOCK == 0))
    group = torch.where(bounds % GROUP == 0, GROUP, 1)  # in sharded blocks too
    group = torch.where(
        (sharded >= 0) | several & ~large, group, torch.where(several, update.IN_TURN.value, 0)
    )
    addresses = rows[:, update.PARAM.value] | torch.where(blocks, 0, rows[:, update.EXP_AVG.value])
    aligned = addresses % 16 == 0
    columns = (column + within - begin) | torch.where(several, size, 0)
    aligned &= ~factored | (group == 1) | (columns % GROUP == 0)
    aligned &= ~blocks | ((begin | stop) % GROUP == 0)
    counted = _int64([s.needs_positions for s in shards])[shard] > 0
    aligned &= blocks | ~counted | ((position + done) >> 32 == (position + end - 1) >> 32)
    whole = (begin == 0) & (stop % chunk == 0) & (~several | (group > 0) | in_tiles)
    facts = (option_of[shard], factored, group, sharded >= 0, aligned, whole)
    kinds = torch.stack([fact.long() for fact in facts], dim=1)
    return UpdateRuns(rows, kinds, (stop - 1) // chunk + 1)


def _runs(pieces: Tensor, in_blocks: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split pieces into runs: the piece of each, its first element in the piece, and its last (exclusive).

    Chunks begin at multiples of ``chunk`` in their tensor; where the moment is kept in blocks, in the
    parameter, so that no block is in two of them. A chunk of which the piece has a part only is a run of its
    own. So is a chunk in which a layer of at least that size ends, or the upper half of the position changes.
    """
    start, stop, _, position, size = pieces[:, :PLACE].unbind(1)
    numel = stop - start
    at = torch.where(in_blocks, position, start)
    first, last = -at % chunk, numel - (at + numel) % chunk
    every = torch.arange(len(pieces), device="cpu")
    ends = [(every, torch.zeros_like(numel)), (every, first), (every, last)]
    for step in (torch.where(size < chunk, NEVER, size), torch.where(in_blocks, NEVER, 1 << 32)):
        piece, end = _multiples(position, step, numel)
        within = (at[piece] + end) % chunk
        piece, before = piece[within > 0], (end - within)[within > 0]
        ends += [(piece, before), (piece, before + chunk)]
    piece, done = (torch.cat(x) for x in zip(*ends, strict=True))
    known = (done == 0) & (numel[piece] > 0) | (done > 0) & (done < numel[piece])
    room = int(numel.max()) if len(numel) else 1
    bounds = torch.unique((piece * room + done)[known])
    piece, done = bounds // room, bounds % room
    end = torch.cat((done[1:], done[:1]))
    return piece, done, torch.where(end > 0, end, numel[piece])


def _multiples(position: Tensor, step: Tensor, numel: Tensor) -> tuple[Tensor, Tensor]:
    """The multiples of ``step`` in pieces that begin at ``position``: the piece and the element of each."""
    within = position % step
    piece, nth = repeated((within + numel - 1).clamp(min=0) // step)
    return piece, (nth + 1) * step[piece] - within[piece]


# ---- the statistic ---------------------------------------------------------------------------------------


class StatisticTables(NamedTuple):
    """The tables of the statistic of what is not factored.

    Attributes:
        chunks: see ``statistic.chunk_statistic``. A launch's facts are the norm type; the gradient's dtype,
            as its place in a list; the ``width`` of ``rows_statistic``, or 0 for ``chunk_statistic``.
        ends: int64 ``[layers, 4]``: see ``statistic.layer_statistic``; those with few partials first.
        few: how many layers these are, a multiple of ``statistic.SEVERAL``.
        partials: how many there are. They come before the statistic, and are a multiple of 16, so that it is
            aligned.
    """

    chunks: Table
    ends: Tensor
    few: int
    partials: int


def statistic_tables(
    shards: Sequence[Shard], dtypes: Sequence[torch.dtype], chunk: int, tile: int
) -> StatisticTables:
    """Make the runs of the statistic, and the table of the layers whose statistics are made of partials.

    Args:
        shards: the tensors.
        dtypes: of gradients: the list.
        chunk: elements of a chunk.
        tile: elements a program handles at a time.
    """
    pieces, shard = pieces_of(shards)
    known = (pieces[:, COLUMN] < 0) & (pieces[:, STOP] > pieces[:, START])
    pieces, shard = pieces[known], shard[known]
    for column in (POSITION, LAYER):  # by layer, then by position
        order = torch.argsort(pieces[:, column], stable=True)
        pieces, shard = pieces[order], shard[order]
    start, layers, width, layer, _, piece = by_layers(pieces).unbind(1)
    shard = shard[piece]
    # A layer is in chunks of the same size, or several layers are in a chunk.
    length = ratio(ratio(width, ratio(width, chunk)), ALIGNMENT) * ALIGNMENT
    parts = ratio(width, length)
    many = torch.where(layers > 1, chunk // width, 1).clamp(min=1)
    # A layer in one chunk is complete if that has all of its elements, or if no other has any. The partials
    # of the others are next to each other, for chunks are in the order of the layers.
    shared = (width < pieces[piece, SIZE]) | (parts > 1)
    of, nth = repeated(torch.where(shared, layers, 0))
    found, inverse = torch.unique_consecutive(layer[of] + nth, return_inverse=True)
    sources = torch.zeros_like(found).index_add_(0, inverse, parts[of])
    partial = shared.clone()
    partial[of] = sources[inverse] > 1
    count = torch.where(many > 1, ratio(layers, many), layers * parts)
    slots = torch.where(partial, count, 0)
    partials = ratio(slots.sum(), 16) * 16
    rows = torch.zeros(len(start), statistic.ROW.value, dtype=torch.int64, device="cpu")
    entries = {
        statistic.GRAD: start * _int64([s.grad.element_size() for s in shards])[shard],
        statistic.SHARD: shard,
        statistic.LAYERS: layers,
        statistic.WIDTH: width,
        statistic.PARTS: torch.where(many > 1, many, parts),
        statistic.LENGTH: length,
        statistic.RESULT: torch.where(partial, slots.cumsum(0) - slots, partials + layer),
    }
    for entry, values in entries.items():
        rows[:, entry.value] = values
    norm_type = _int64([s.norm_type for s in shards])[shard]
    dtype = _int64([dtypes.index(s.grad.dtype) for s in shards])[shard]
    widths = 1 << torch.arange(3, tile.bit_length(), device="cpu")
    of_rows = torch.where(many > 1, widths[torch.bucketize(width.clamp(max=tile), widths)], 0)
    kinds = torch.stack((norm_type, dtype, of_rows), dim=1)
    summed = sources > 1
    stop = (sources * summed).cumsum(0)
    of_found = torch.zeros_like(found).index_copy_(0, inverse, norm_type[of])
    ends = torch.stack((partials + found, stop - sources, stop, of_found), dim=1)
    small = sources <= statistic.FEW.value
    few, most = ends[summed & small], ends[summed & ~small]
    few = torch.nn.functional.pad(few, (0, 0, 0, -len(few) % statistic.SEVERAL.value))
    table = arranged(rows, kinds, count, statistic.FIRST.value)
    return StatisticTables(table, torch.cat((few, most)), len(few), int(partials))


def _distinct(kinds: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows in ascending order, and which of them each row is."""
    _, kind = torch.unique(codes(kinds), return_inverse=True)
    some = torch.zeros(int(kind.max()) + 1 if len(kind) else 0, dtype=torch.int64, device="cpu")
    some[kind] = torch.arange(len(kind), device="cpu")
    return kinds[some], kind


def codes(rows: Tensor) -> Tensor:
    """A number for each row of small numbers: equal for equal rows, and in the order of the rows.

    To sort or compare numbers takes a fraction of the time that rows take.
    """
    code = torch.zeros(len(rows), dtype=torch.int64, device="cpu")
    for column in rows.unbind(1) if len(rows) else ():
        least, most = column.aminmax()
        code = code * (most - least + 1) + (column - least)
    return code


def in_blocks(shard: Shard) -> formats.Format | None:
    """The format of the first moment, if it is in blocks."""
    if shard.exp_avg is None or shard.exp_avg_scale is None:
        return None
    return formats.format_of(shard.exp_avg, shard.exp_avg_scale)


def ratio(numerator: Tensor, denominator: Tensor | int) -> Tensor:
    """The quotient, rounded up."""
    return (numerator + denominator - 1) // denominator


def to_device(device: torch.device, table: Tensor) -> Tensor:
    """Copy a table from the CPU to the device, without waiting for it."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def _int64(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")
