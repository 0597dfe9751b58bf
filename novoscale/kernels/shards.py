"""What the passes over the elements are given: tensors, and tables of the layer of each element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from novoscale.sharding.indices import repeated

# The columns of a table of pieces. A piece is a run of elements that are consecutive both in a tensor and in
# a parameter.
START = 0  # elements start..stop of the tensor
STOP = 1
LAYER = 2  # of all layers, the one of the first element
POSITION = 3  # of the first element in the parameter, whose layers begin at the multiples of SIZE
SIZE = 4  # elements of a layer
PLACE = 5  # where in exp_avg the first element's moment lies: an element, or a block
COLUMN = 6  # of all columns, the first one of its parameter; -1 where its second moment is not factored
FIRST_SHARDED = 7  # of all sharded blocks, the one that the piece begins in; -1: its first block is not one
LAST_SHARDED = 8  # the same of the block that the piece ends in
PIECE = 9

# A chunk is a part of a piece. Its columns up to COLUMN are those of a piece; then come:
SHARDED = 7  # of all sharded blocks, the one that the chunk is a part of; -1: its blocks are not
OF = 8  # its shard

# The columns of a table of panels. A panel is a run of elements of a factored parameter that forms a matrix:
# ROWS consecutive layers, each with the same WIDTH columns.
PANEL_START = 0  # of the tensor
ROWS = 1
WIDTH = 2
FIRST_LAYER = 3
FIRST_COLUMN = 4
OF_SHARD = 5

# The columns of Coefficients.each: one record of 16 bytes for each layer.
GRAD_SCALE, STEP_SIZE, DECAY, AHEAD = range(4)
# The columns of Coefficients.options: one row for each param group of the step.
BETA1, BETA3, WEIGHT_DECAY, EPS = range(4)


class ShardTensors(NamedTuple):
    """The tensors of a shard: see :class:`Shard`."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor | None = None
    exp_avg_scale: Tensor | None = None
    direction_avg_sq: Tensor | None = None


class Matrices(NamedTuple):
    """The layers of a tensor as matrices that move along an orthogonal direction: see ``orthogonal``.

    Attributes:
        rows: of each.
        columns: of each.
        steps: of Newton and Schulz.
    """

    rows: int
    columns: int
    steps: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One tensor of a step, with those options of its param group that the tables depend on.

    Attributes:
        param: the weights; updated in place. float32, bfloat16, float16 or float64.
        grad: same shape; never written to.
        exp_avg: the first moment, in one of the formats of ``state.formats``; None where beta1 is 0 and
            none is kept.
        exp_avg_scale: its scales, where it is kept in blocks.
        pieces: which elements belong to which layer, and where their moment lies: int64 ``[pieces, 9]`` on
            the CPU, the columns above. The layers of a factored parameter are its rows.
        norm_type: 2 (sum of squares) or 0 (largest magnitude).
        group: its row of ``Coefficients.options``.
        decays: whether its weight decay is not zero.
        reg_inside_moment: whether the weights decay before (True) or after the first moment is formed.
        stochastic_rounding: of the weights, if they are bfloat16. A first moment that is not float32 or
            float64 is always rounded so.
        fused: True: use a fused kernel; False: use the reference; None: use the fused kernel if it takes it.
        nesterov: whether the weight moves along the new term too: see ``Coefficients.each``.
        matrices: how its layers are made orthogonal; None: they are not.
        direction_avg_sq: float32, one for each row of its matrices: the running mean of the squares of the
            directions' rows, by which they are normalised; None: they are not.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor | None
    exp_avg_scale: Tensor | None
    pieces: Tensor
    norm_type: int
    group: int
    decays: bool
    reg_inside_moment: bool
    stochastic_rounding: bool
    fused: bool | None = None
    nesterov: bool = False
    matrices: Matrices | None = None
    direction_avg_sq: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """``param``, ``grad`` and, if there are any, ``exp_avg`` and ``exp_avg_scale``."""
        found = (self.param, self.grad, self.exp_avg, self.exp_avg_scale)
        return [t for t in found if t is not None]

    @property
    def rounds_weights(self) -> bool:
        """Whether the weights are rounded stochastically."""
        return self.stochastic_rounding and self.param.dtype == torch.bfloat16

    @property
    def needs_positions(self) -> bool:
        """Whether it matters which element of its parameter each one is."""
        rounds_moment = self.exp_avg is not None and self.exp_avg.dtype not in (torch.float32, torch.float64)
        return self.rounds_weights or rounds_moment


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What the update needs to know of each layer and of each param group, on one device.

    Numbers are float32, or float64 where a tensor of the step is.

    Attributes:
        each: ``[layers, 4]``, contiguous. GRAD_SCALE multiplies the gradient before it enters the first
            moment; STEP_SIZE the first moment when it is taken from the weight; DECAY, which is
            lr * weight_decay, the weight, for tensors whose decay stays outside the moment. Where a shard is
            ``nesterov``, AHEAD multiplies the first moment, and STEP_SIZE its new term.
        options: ``[groups, 4]``, contiguous. BETA1 is the decay of the first moment; BETA3 the weight of the
            new term in it, 1 or 1 - beta1 with ``grad_averaging``; WEIGHT_DECAY times the weight is added to
            the gradient's term; EPS is added to the root of a factored second moment.
        active: bool ``[layers]``; a layer that is not active is left bit for bit as it is.
        key: int32 ``[layers]``, the 32 bits of the key for stochastic rounding: see
            ``novoscale.state.rounding.keys``.
        row_root: ``[layers]``: of each that is a row of a factored parameter, its factor of the root of the
            second moment. None: there is none.
        column_root: ``[columns]``: the same of each column. Where it is 0 nothing is changed.
        sharded: int32 ``[2, sharded blocks]``, the maximum over the ranks of what
            ``interface.ElementKernels.largest`` returns. None: no block is sharded.
        lr: float64 ``[groups]``: the learning rates, for what has ``Shard.matrices``. None: nothing has.
    """

    each: Tensor
    options: Tensor
    active: Tensor
    key: Tensor
    row_root: Tensor | None = None
    column_root: Tensor | None = None
    sharded: Tensor | None = None
    lr: Tensor | None = None

    def to(self, device: torch.device) -> Coefficients:
        """The same on another device."""
        if self.active.device == device:
            return self
        vectors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: v.to(device) for name, v in vectors.items() if v is not None})


def in_one_order(shard: Shard) -> bool:
    """Whether memory order serves as element order, in all tensors of a shard alike.

    It does if they are contiguous. It also does if they have no gaps and the same strides, one layer has all
    of the tensor, and the update treats its elements alike, so that it does not matter which comes first.
    """
    if all(t.is_contiguous() for t in shard.tensors):
        return True
    numel = shard.param.numel()
    one_piece = len(shard.pieces) == 1 and shard.pieces[0, [START, STOP, COLUMN]].tolist() == [0, numel, -1]
    position, size = shard.pieces[0, [POSITION, SIZE]].tolist() if one_piece else (0, 0)
    alike = not shard.needs_positions and position % max(size, 1) + numel <= size
    order = _order(shard.param)
    return alike and order is not None and all(_order(t) == order for t in shard.tensors)


def _order(tensor: Tensor) -> list[tuple[int, int]] | None:
    """Which dimension has which stride, from the innermost on; None if there are gaps or overlaps."""
    dimensions = sorted((step, d) for d, step in enumerate(tensor.stride()) if tensor.shape[d] != 1)
    expected = 1
    for step, d in dimensions:
        if step != expected:
            return None
        expected *= tensor.shape[d]
    return dimensions


def chunks(shards: Sequence[Shard], size: int, block: int, factored: bool = True) -> Tensor:
    """Split the pieces of all shards into chunks of at most ``size`` elements.

    The chunks of a layer are next to each other, in the order of its elements. But for the first of a piece,
    chunks begin at multiples of ``size`` in their tensor, so that they are aligned where the tensor is; where
    the moment is kept in blocks, at multiples in the parameter, so that no block is in two chunks. There is
    no loop over chunks: a billion elements have tens of thousands.

    Args:
        shards: the tensors.
        size: a multiple of ``block``.
        block: elements of a block of the first moment.
        factored: False: leave out the pieces of factored parameters, which :func:`panels` has.

    Returns:
        int64 ``[chunks, 9]`` on the CPU: the columns above. The elements of a sharded block are a chunk of
        their own.
    """
    pieces, shard = pieces_of(shards)
    known = (pieces[:, STOP] > pieces[:, START]) & (factored | (pieces[:, COLUMN] < 0))
    in_blocks = torch.tensor([s.exp_avg_scale is not None for s in shards], dtype=torch.bool, device="cpu")
    table, piece = at_sharded_blocks(pieces[known], block)
    shard = shard[known][piece]
    for column in (POSITION, LAYER):  # by layer, then by position
        order = torch.argsort(table[:, column], stable=True)
        table, shard = table[order], shard[order]
    blocks = in_blocks[shard]
    start = torch.where(blocks, table[:, POSITION], table[:, START])
    stop = start + table[:, STOP] - table[:, START]
    begin, count = start // size, (stop - 1) // size + 1 - start // size
    index, nth = repeated(count)
    begin = (begin[index] + nth) * size
    done = torch.maximum(start[index], begin) - start[index]  # elements of the piece before the chunk
    end = torch.minimum(stop[index], begin + size) - start[index]
    return torch.cat((_part(table[index], done, end, blocks[index], block), shard[index][:, None]), dim=1)


def at_sharded_blocks(pieces: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Split the pieces at the boundaries of sharded blocks.

    Returns:
        int64 ``[parts, 8]``: the columns of a piece up to COLUMN, and SHARDED; and the piece of each part.
    """
    plain = torch.cat((pieces[:, :FIRST_SHARDED], torch.full_like(pieces[:, :1], -1)), dim=1)
    first, last = pieces[:, FIRST_SHARDED], pieces[:, LAST_SHARDED]
    if not ((first >= 0) | (last >= 0)).any():
        return plain, torch.arange(len(pieces), device="cpu")
    position, numel = pieces[:, POSITION], pieces[:, STOP] - pieces[:, START]
    head = torch.where(first >= 0, torch.minimum(numel, block - position % block), 0)
    tail = torch.where((last >= 0) & (head < numel), (position + numel - 1) % block + 1, 0)
    done = torch.stack((torch.zeros_like(head), head, numel - tail), dim=1).view(-1)
    end = torch.stack((head, numel - tail, numel), dim=1).view(-1)
    sharded = torch.stack((first, torch.full_like(first, -1), last), dim=1).view(-1)
    piece = torch.arange(len(pieces), device="cpu").repeat_interleave(3)[end > done]
    in_blocks = torch.ones_like(piece, dtype=torch.bool)  # where they are not, nothing was split
    table = _part(plain[piece], done[end > done], end[end > done], in_blocks, block)
    table[:, SHARDED] = sharded[end > done]
    return table, piece


def _part(table: Tensor, done: Tensor, end: Tensor, in_blocks: Tensor, block: int) -> Tensor:
    """The elements ``done..end`` of each piece: adjusts the columns up to PLACE, and keeps the others."""
    start, position, size = table[:, START], table[:, POSITION], table[:, SIZE]
    part = table.clone()
    part[:, START] = start + done
    part[:, STOP] = start + end
    part[:, LAYER] += (position + done) // size - position // size
    part[:, POSITION] += done
    part[:, PLACE] += torch.where(in_blocks, (position + done) // block - position // block, done)
    return part


def panels(shards: Sequence[Shard]) -> Tensor:
    """The pieces of factored parameters as matrices, each of which is contiguous in its tensor.

    Where a piece begins or ends within a row, that row is a panel of its own. Consecutive pieces of one row
    each, as a matrix that is sharded along its columns has them, are one panel.

    Returns:
        int64 ``[panels, 6]`` on the CPU: the columns above. A layer may be in several panels, and a column.
    """
    pieces, shard = pieces_of(shards)
    known = (pieces[:, COLUMN] >= 0) & (pieces[:, STOP] > pieces[:, START])
    pieces, shard = pieces[known], shard[known]
    start, rows, width, layer, within, piece = by_layers(pieces).unbind(1)
    table = torch.stack((start, rows, width, layer, pieces[piece, COLUMN] + within, shard[piece]), dim=1)
    before, following = table[:-1], table[1:]
    same = (before[:, [WIDTH, FIRST_COLUMN, OF_SHARD]] == following[:, [WIDTH, FIRST_COLUMN, OF_SHARD]]).all(
        1
    )
    same &= before[:, PANEL_START] + before[:, ROWS] * before[:, WIDTH] == following[:, PANEL_START]
    same &= before[:, FIRST_LAYER] + before[:, ROWS] == following[:, FIRST_LAYER]
    begins = torch.cat((torch.ones(min(len(table), 1), dtype=torch.bool, device="cpu"), ~same))
    merged = table[begins]
    merged[:, ROWS] = 0
    merged[:, ROWS].index_add_(0, begins.cumsum(0) - 1, table[:, ROWS])
    return merged


def by_layers(pieces: Tensor) -> Tensor:
    """Split each piece into up to three parts: its complete layers, and what is before and after them.

    Returns:
        int64 ``[parts, 6]``: the first element in its tensor; how many layers the part has elements of, and
        how many of each; the first layer; how many elements of that layer come before the part; the piece.
    """
    start, stop, layer, position, size = pieces[:, :PLACE].unbind(1)
    within, numel = position % size, stop - start
    head = torch.where((within > 0) | (numel < size), torch.minimum(numel, size - within), 0)
    rows, tail = (numel - head) // size, (numel - head) % size
    after, one, zero = layer + (head > 0), torch.ones_like(head), torch.zeros_like(head)
    piece = torch.arange(len(pieces), device="cpu")
    parts = (
        (start, one, head, layer, within, piece),
        (start + head, rows, size, after, zero, piece),
        (start + head + rows * size, one, tail, after + rows, zero, piece),
    )
    table = torch.stack([torch.stack(part, dim=1) for part in parts], dim=1).view(-1, 6)
    return table[(table[:, 1] > 0) & (table[:, 2] > 0)]


def pieces_of(shards: Sequence[Shard]) -> tuple[Tensor, Tensor]:
    """The pieces of all shards, and the shard of each."""
    tables = [s.pieces for s in shards]
    pieces = torch.cat([torch.empty((0, PIECE), dtype=torch.int64, device="cpu"), *tables])
    return pieces, torch.repeat_interleave(_int64([len(t) for t in tables]))


def _int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")
