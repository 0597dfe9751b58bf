"""What the kernels are given: tensors, and tables of which elements belong to which layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from novoscale.layout import repeated

# The columns of a table of pieces. A piece is a stretch of elements that are consecutive in a tensor and in a
# parameter.
START = 0  # elements start..stop of the tensor
STOP = 1
LAYER = 2  # of all layers, the one of the first element
POSITION = 3  # of the first element in the parameter: its layers begin at the multiples of
SIZE = 4  # the elements of a layer
PLACE = 5  # where in exp_avg the first element's moment lies: an element, or a block


@dataclass(frozen=True, slots=True)
class Shard:
    """One tensor of a step, with the options of its param group.

    Attributes:
        param: the weights; updated in place. float32, bfloat16, float16 or float64.
        grad: same shape; never written to.
        exp_avg: the first moment, in one of the formats of ``novoscale.momentum``; None where beta1 is 0 and
            none is kept.
        exp_avg_scale: its scales, where it is kept in blocks.
        pieces: which elements belong to which layer, and where their moment lies: int64 ``[pieces, 6]`` on
            the CPU, the columns above.
        norm_type: 2 (sum of squares) or 0 (largest magnitude).
        beta1: decay of the first moment.
        beta3: weight of the new term in it: 1, or 1 - beta1 with ``grad_averaging``.
        weight_decay: times the weight, it is added to the gradient's term.
        reg_inside_moment: whether that is before (True) or after the first moment is formed.
        stochastic_rounding: of the weights, if they are bfloat16. A first moment that is not float32 or
            float64 is always rounded so.
        fused: True: by a fused kernel; False: by the reference; None: by whichever can.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor | None
    exp_avg_scale: Tensor | None
    pieces: Tensor
    norm_type: int
    beta1: float
    beta3: float
    weight_decay: float
    reg_inside_moment: bool
    stochastic_rounding: bool
    fused: bool | None = None

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
    """What the update needs to know of each layer: vectors, one element per layer, on one device.

    Attributes:
        grad_scale: multiplies the gradient before it enters the first moment.
        step_size: multiplies the first moment when it is taken from the weight.
        decay: lr * weight_decay, for tensors whose decay stays outside the moment.
        active: bool; a layer that is not active is left bit for bit as it is.
        key: int64 of 32 bits, for stochastic rounding: see ``novoscale.rounding.keys``.
    """

    grad_scale: Tensor
    step_size: Tensor
    decay: Tensor
    active: Tensor
    key: Tensor

    def to(self, device: torch.device) -> Coefficients:
        """The same on another device."""
        if self.active.device == device:
            return self
        return Coefficients(*(getattr(self, f.name).to(device) for f in fields(self)))


def in_one_order(shard: Shard) -> bool:
    """Whether memory order serves as element order, in all tensors of a shard alike.

    They are contiguous; or they have no gaps and the same strides, and all of the tensor is one layer and no
    element is told from another, so that it does not matter which of its elements comes first.
    """
    if all(t.is_contiguous() for t in shard.tensors):
        return True
    numel = shard.param.numel()
    whole = len(shard.pieces) == 1 and shard.pieces[0, [START, STOP]].tolist() == [0, numel]
    position, size = shard.pieces[0, [POSITION, SIZE]].tolist() if whole else (0, 0)
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


def chunks(shards: Sequence[Shard], size: int, block: int) -> Tensor:
    """The pieces of all shards in chunks of at most ``size`` elements, those of a layer next to each other.

    A layer's chunks follow in the order of its elements. Chunks begin at multiples of ``size`` in their
    tensor (but for the first of a piece), so that they are aligned where the tensor is; where the moment is
    kept in blocks, at multiples in the parameter, so that no block is in two chunks. Made without a loop over
    chunks: a billion elements are tens of thousands.

    Args:
        shards: the tensors.
        size: a multiple of ``block``.
        block: elements of a block of the first moment.

    Returns:
        int64 ``[chunks, 7]`` on the CPU: the columns of a piece, and the index of the shard.
    """
    tables = [s.pieces for s in shards]
    pieces = torch.cat([torch.empty((0, 6), dtype=torch.int64, device="cpu"), *tables])
    shard = torch.repeat_interleave(_int64([len(t) for t in tables]))
    in_blocks = torch.tensor([s.exp_avg_scale is not None for s in shards], dtype=torch.bool, device="cpu")
    table = torch.cat((pieces, shard[:, None], in_blocks[shard].long()[:, None]), dim=1)
    table = table[pieces[:, STOP] > pieces[:, START]]
    for column in (POSITION, LAYER):  # by layer, then by position
        table = table[torch.argsort(table[:, column], stable=True)]
    blocks = table[:, 7] == 1
    start = torch.where(blocks, table[:, POSITION], table[:, START])
    stop = start + table[:, STOP] - table[:, START]
    begin, count = start // size, (stop - 1) // size + 1 - start // size
    piece, nth = repeated(count)
    begin = (begin[piece] + nth) * size
    done = torch.maximum(start[piece], begin) - start[piece]  # elements of the piece before the chunk
    end = torch.minimum(stop[piece], begin + size) - start[piece]
    table, blocks = table[piece], blocks[piece]
    position = table[:, POSITION]
    passed = (position + done) // table[:, SIZE] - position // table[:, SIZE]
    in_place = torch.where(blocks, (position + done) // block - position // block, done)
    columns = {
        START: table[:, START] + done,
        STOP: table[:, START] + end,
        LAYER: table[:, LAYER] + passed,
        POSITION: position + done,
        SIZE: table[:, SIZE],
        PLACE: table[:, PLACE] + in_place,
    }
    return torch.stack([*(columns[c] for c in sorted(columns)), table[:, 6]], dim=1)


def _int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")
