"""What the kernels are given: tensors, and tables of which elements belong to which layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from novoscale.layout import Segment


@dataclass(frozen=True, slots=True)
class Shard:
    """One tensor of a step, with the options of its param group.

    Attributes:
        param: the weights; updated in place. float32, bfloat16, float16 or float64.
        grad: same shape; never written to.
        exp_avg: the first moment, same shape; None where beta1 is 0 and none is kept.
        segments: which elements belong to which layer.
        first: the place of the tensor's layers in the vector of all layers.
        norm_type: 2 (sum of squares) or 0 (largest magnitude).
        beta1: decay of the first moment.
        beta3: weight of the new term in it: 1, or 1 - beta1 with ``grad_averaging``.
        weight_decay: times the weight, it is added to the gradient's term.
        reg_inside_moment: whether that is before (True) or after the first moment is formed.
        fused: True: by a fused kernel; False: by the reference; None: by whichever can.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor | None
    segments: tuple[Segment, ...]
    first: int
    norm_type: int
    beta1: float
    beta3: float
    weight_decay: float
    reg_inside_moment: bool
    fused: bool | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """``param``, ``grad`` and, if there is one, ``exp_avg``."""
        return [t for t in (self.param, self.grad, self.exp_avg) if t is not None]


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What the update needs to know of each layer: vectors, one element per layer, on one device.

    Attributes:
        grad_scale: multiplies the gradient before it enters the first moment.
        step_size: multiplies the first moment when it is taken from the weight.
        decay: lr * weight_decay, for tensors whose decay stays outside the moment.
        active: bool; a layer that is not active is left bit for bit as it is.
    """

    grad_scale: Tensor
    step_size: Tensor
    decay: Tensor
    active: Tensor

    def to(self, device: torch.device) -> Coefficients:
        """The same on another device."""
        if self.active.device == device:
            return self
        return Coefficients(
            *(t.to(device) for t in (self.grad_scale, self.step_size, self.decay, self.active))
        )


def in_one_order(shard: Shard) -> bool:
    """Whether memory order serves as element order, in all tensors of a shard alike.

    They are contiguous; or they have no gaps and the same strides, and one segment has the whole tensor, so
    that it does not matter which of its elements comes first.
    """
    if all(t.is_contiguous() for t in shard.tensors):
        return True
    whole = [(s.start, s.stop) for s in shard.segments] == [(0, shard.param.numel())]
    order = _order(shard.param)
    return whole and order is not None and all(_order(t) == order for t in shard.tensors)


def _order(tensor: Tensor) -> list[tuple[int, int]] | None:
    """Which dimension has which stride, from the innermost on; None if there are gaps or overlaps."""
    dimensions = sorted((step, d) for d, step in enumerate(tensor.stride()) if tensor.shape[d] != 1)
    expected = 1
    for step, d in dimensions:
        if step != expected:
            return None
        expected *= tensor.shape[d]
    return dimensions


def chunks(shards: Sequence[Shard], size: int) -> Tensor:
    """The elements of all shards in chunks of at most ``size``, those of a layer next to each other.

    Chunks begin at multiples of ``size`` in their tensor (but for the first of a segment), so that they are
    aligned where the tensor is, and a layer's chunks follow in the order of its elements. Made without a
    loop over chunks: a billion elements are tens of thousands.

    Returns:
        int64 ``[chunks, 4]`` on the CPU: index of the shard, first element, end (exclusive), layer of all
        layers.
    """
    placed = sorted(
        (shard.first + segment.layer, segment.offset, index, segment.start, segment.stop)
        for index, shard in enumerate(shards)
        for segment in shard.segments
        if segment.numel
    )
    table = torch.tensor(placed, dtype=torch.int64, device="cpu").view(-1, 5)
    begin, count = table[:, 3] // size, (table[:, 4] - 1) // size + 1 - table[:, 3] // size
    segment = torch.repeat_interleave(count)
    nth = torch.arange(len(segment), device="cpu") - (count.cumsum(0) - count)[segment]
    layer, _, shard, start, stop = table[segment].unbind(1)
    begin = (begin[segment] + nth) * size
    return torch.stack((shard, torch.maximum(start, begin), torch.minimum(stop, begin + size), layer), dim=1)
