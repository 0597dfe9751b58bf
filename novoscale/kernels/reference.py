"""The definition of both passes: plain torch, any device, bounded memory.

Works on tiles of at most ``TILE`` elements, so no transient grows with a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from novoscale.kernels.shards import Coefficients, Shard

TILE = 1 << 16


class Kernels:
    """Both passes, for the tensors of a step. Every kernel has this class; those that work from addresses
    also ``moved``, to go on with gradients at other addresses.

    Args:
        shards: the tensors.
        device: of the vectors that have one element per layer.
        layers: how many layers there are.
    """

    def __init__(self, shards: Sequence[Shard], device: torch.device, layers: int) -> None:
        self._shards, self._device, self._layers = shards, device, layers

    def sum_of_squares(self) -> Tensor:
        """See :func:`sum_of_squares`."""
        return sum_of_squares(self._shards, self._device, self._layers)

    def update(self, coefficients: Coefficients) -> None:
        """See :func:`update`."""
        update(self._shards, coefficients)


def sum_of_squares(shards: Sequence[Shard], device: torch.device, layers: int) -> Tensor:
    """This rank's part of each layer's statistic.

    Squares are formed and added in float64, where the square of a float32, bfloat16 or float16 is
    exact, so the way a layer is cut shows in the last bits of a float64 only.

    Args:
        shards: the tensors of the step.
        device: where the result goes.
        layers: length of the result.

    Returns:
        float64 ``[layers]``: the sum of g**2 (``norm_type`` 2) or the largest abs(g) (0).
    """
    result = torch.zeros(layers, dtype=torch.float64, device=device)
    for shard in shards:
        for segment in shard.segments:
            slot = result[shard.first + segment.layer]
            for (grad,) in _tiles((shard.grad,), segment.start, segment.stop):
                if shard.norm_type == 2:
                    slot += grad.double().square().sum().to(device)
                else:
                    torch.maximum(slot, grad.abs().amax().to(device, torch.float64), out=slot)
    return result


def update(shards: Sequence[Shard], coefficients: Coefficients) -> None:
    """The first moment m and the weight w of every active layer, in place, in one pass.

    With the decay inside the moment (Algorithm 1 of arXiv 1905.11286), and outside it:

        m = beta1*m + beta3*(grad_scale*g + weight_decay*w);  w = w - step_size*m
        m = beta1*m + beta3*(grad_scale*g);                   w = w - step_size*m - decay*w

    Computed in float32, or in float64 where the parameter is float64, each product and each sum rounded
    (no fused multiply-add: every kernel gives the same bits); what is stored is rounded to the nearest
    value of the tensor's dtype.
    """
    for shard in shards:
        dtype = torch.float64 if shard.param.dtype == torch.float64 else torch.float32
        device = shard.param.device
        vectors = (coefficients.grad_scale, coefficients.step_size, coefficients.decay)
        grad_scale, step_size, decay = (v.to(device, dtype) for v in vectors)
        active = coefficients.active.to(device)
        inside = shard.weight_decay if shard.reg_inside_moment else 0.0
        outside = 0.0 if shard.reg_inside_moment else shard.weight_decay
        moments = () if shard.exp_avg is None else (shard.exp_avg,)
        for segment in shard.segments:
            layer = shard.first + segment.layer
            for w, g, *m in _tiles((shard.param, shard.grad, *moments), segment.start, segment.stop):
                weight = w.to(dtype)
                term = g.to(dtype) * grad_scale[layer]
                if inside != 0:
                    term.add_(weight * inside)
                moment = term.mul_(shard.beta3) if shard.beta3 != 1 else term
                if m:
                    moment = moment.add_(m[0].to(dtype) * shard.beta1)
                    _write(m[0], moment, active[layer])
                change = moment * step_size[layer]
                if outside != 0:
                    change.add_(weight * decay[layer])
                _write(w, weight - change, active[layer])


def _write(target: Tensor, value: Tensor, active: Tensor) -> None:
    target.copy_(torch.where(active, value.to(target.dtype), target))


def _tiles(tensors: Sequence[Tensor], start: int, stop: int) -> Iterator[tuple[Tensor, ...]]:
    """Matching views of the row-major elements ``start..stop`` of tensors of one shape, by tiles.

    Tensors may be strided in any way, each in its own: what is not contiguous is taken apart along
    its leading dimensions.
    """
    if all(t.is_contiguous() for t in tensors):
        flat = [t.view(-1) for t in tensors]
        for a in range(start, stop, TILE):
            yield tuple(t[a : min(a + TILE, stop)] for t in flat)
        return
    shape = tensors[0].shape
    row = shape[1:].numel()
    a = start
    while a < stop:
        index, within = divmod(a, row)
        rows = min((stop - a) // row, max(TILE // row, 1)) if within == 0 and row <= TILE else 0
        if rows:
            yield tuple(t.narrow(0, index, rows) for t in tensors)
            a += rows * row
        else:
            end = min(stop - index * row, row)
            yield from _tiles([t[index] for t in tensors], within, end)
            a = index * row + end
