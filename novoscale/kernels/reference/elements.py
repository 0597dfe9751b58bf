"""The definition of both passes over the elements: plain torch, any device, bounded memory.

Works on tiles of a bounded number of elements, so no transient grows with a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from novoscale.kernels.interface import ElementKernels, VectorSizes
from novoscale.kernels.shards import (
    AHEAD,
    BETA1,
    BETA3,
    DECAY,
    EPS,
    GRAD_SCALE,
    SHARDED,
    STEP_SIZE,
    WEIGHT_DECAY,
    Coefficients,
    Shard,
    ShardTensors,
    chunks,
    panels,
)
from novoscale.sharding.blocks import BLOCK
from novoscale.state import momentum, rounding

# Elements of a tile: what a CPU's caches hold; on a GPU, where a tile takes some thirty launches, so many
# that the work takes longer than the launches, and transients some hundred MiB.
TILE, GPU_TILE = 1 << 16, 1 << 22


class Kernels(ElementKernels):
    """Both passes by the functions below. Holds the tensors, and not their addresses, during a step."""

    def __init__(self, shards: Sequence[Shard], device: torch.device, sizes: VectorSizes) -> None:
        self._shards, self._device, self._sizes = shards, device, sizes

    def move_gradients(self, addresses: Sequence[int]) -> None:
        """Do nothing: :meth:`hold` takes the gradients of each step."""

    def move_params(self, addresses: Sequence[int]) -> None:
        """Do nothing: :meth:`hold` takes the weights of each step."""

    def hold(self, tensors: Callable[[int], ShardTensors]) -> None:
        """Take the tensors of each shard, for one step."""
        self._shards = [replace(s, **tensors(index)._asdict()) for index, s in enumerate(self._shards)]

    def release(self) -> None:
        """Free them."""
        none = torch.empty(0, device="cpu")
        self._shards = [replace(s, **ShardTensors(none, none)._asdict()) for s in self._shards]

    def sum_of_squares(self, more: int = 0) -> Tensor:
        """See :func:`sum_of_squares`; followed by ``more`` zeros."""
        return sum_of_squares(self._shards, self._device, self._sizes, more)

    def largest(self, coefficients: Coefficients) -> Tensor:
        """See :func:`largest`."""
        return largest(self._shards, coefficients, self._sizes.sharded_blocks)

    def update(self, coefficients: Coefficients) -> None:
        """See :func:`update`."""
        update(self._shards, coefficients)


def sum_of_squares(
    shards: Sequence[Shard], device: torch.device, sizes: VectorSizes, more: int = 0
) -> Tensor:
    """See ``interface.ElementKernels.sum_of_squares``; the result is on ``device``.

    Squares are formed and added in float64, where the square of a float32, bfloat16 or float16 is exact. So
    the way a layer is sharded shows in the last bits of a float64 only; and in a float32 made of it with a
    chance of about 1e-9: see docs/kernels.md.
    """
    layers, columns = sizes.layers, sizes.columns
    result = torch.zeros(layers + columns + more, dtype=torch.float64, device=device)
    tile = _tile(shards)
    table = chunks(shards, tile, BLOCK, factored=False)
    for start, stop, layer, position, size, *_, index in table.tolist():
        shard = shards[index]
        grad = _read(shard.grad, start, stop).double()
        for rows in _by_layers(grad, position % size, size):
            own = slice(layer, layer + len(rows))
            if shard.norm_type == 2:
                result[own] += rows.square().sum(dim=1).to(device)
            else:
                result[own] = torch.maximum(result[own], rows.abs().amax(dim=1).to(device))
            layer += len(rows) if (position + rows.numel()) % size == 0 else 0
            position += rows.numel()
    for start, rows, width, layer, column, index in panels(shards).tolist():
        for first, stop, left, right in _tiles(rows, width, tile):
            grad = _read(shards[index].grad, start + first * width + left, start + (stop - 1) * width + right)
            squares = grad.double().square().view(stop - first, right - left)
            result[layer + first : layer + stop] += squares.sum(dim=1).to(device)
            result[layers + column + left : layers + column + right] += squares.sum(dim=0).to(device)
    return result


def update(shards: Sequence[Shard], coefficients: Coefficients) -> None:
    """The first moment m and the weight w of every active layer, in place, in one pass.

    With the decay inside the moment (Algorithm 1 of arXiv 1905.11286), and outside it:

        m = beta1*m + beta3*(grad_scale*g + weight_decay*w);  w = w - step_size*m
        m = beta1*m + beta3*(grad_scale*g);                   w = w - step_size*m - decay*w

    Where the second moment is factored, grad_scale*g (inside), or what is taken from the weight without the
    decay (outside), is divided by row_root*column_root + eps. With ``nesterov``, ahead*m + step_size*term is
    taken in place of step_size*m; term is what was added to m.

    Computed in float32, or in float64 where the parameter is float64, each product and each sum rounded
    (no fused multiply-add: every kernel gives the same bits); what is stored is rounded to the nearest
    value of the tensor's dtype, or stochastically: see ``Shard.stochastic_rounding``.
    """
    for row in chunks(shards, _tile(shards), BLOCK).tolist():
        start, stop, _, position, _, place, _, sharded, index = row
        shard, new = shards[index], _changed(shards, row, coefficients)
        if new.moment is not None:
            agreed = (
                None
                if sharded < 0 or coefficients.sharded is None
                else coefficients.sharded[:, sharded].to(new.bits.device)
            )
            _write_moment(shard, start, place, position, new.moment, new.bits >> 16, new.active, agreed)
        _write(shard.param, start, stop, new.weight, new.active)


def largest(shards: Sequence[Shard], coefficients: Coefficients, sharded_blocks: int) -> Tensor:
    """See ``interface.ElementKernels.largest``; ``sharded_blocks``: how many there are."""
    found = torch.zeros(2, sharded_blocks, dtype=torch.int32, device=coefficients.active.device)
    for row in chunks(shards, _tile(shards), BLOCK).tolist():
        if (sharded := row[SHARDED]) >= 0:
            new = _changed(shards, row, coefficients)
            assert new.moment is not None
            magnitude = new.moment.float().view(torch.int32) & 0x7FFFFFFF
            piece = torch.stack((magnitude.amax(), new.active.any().int())).to(found.device)
            found[:, sharded] = torch.maximum(found[:, sharded], piece)
    return found


class _Changed(NamedTuple):
    """The elements of a chunk after the update. Where one is not active, its moment is what it was."""

    weight: Tensor
    moment: Tensor | None
    bits: Tensor
    active: Tensor


def _changed(shards: Sequence[Shard], row: Sequence[int], coefficients: Coefficients) -> _Changed:
    start, stop, layer, position, size, place, column, _, index = row
    shard = shards[index]
    dtype = torch.float64 if shard.param.dtype == torch.float64 else torch.float32
    c = coefficients.to(shard.param.device)
    elements = torch.arange(stop - start, device=shard.param.device)
    one = position % size + len(elements) <= size
    layers = layer if one else layer + (position % size + elements) // size
    each, of_group = c.each.to(dtype), c.options[shard.group].to(dtype)
    active = c.active[layers].expand(len(elements))
    bits = elements
    if shard.needs_positions:
        bits = rounding.random_bits(c.key[layers].long() & rounding.MASK, position + elements)
    weight = _read(shard.param, start, stop).to(dtype)
    term = _read(shard.grad, start, stop).to(dtype) * each[layers, GRAD_SCALE]
    if column >= 0:
        assert c.row_root is not None
        assert c.column_root is not None
        of_column = c.column_root[column + (position + elements) % size].to(dtype)
        active = active & (of_column > 0)
        root = c.row_root[layers].to(dtype) * of_column + of_group[EPS]
        if shard.reg_inside_moment:
            term /= root
    if shard.reg_inside_moment and shard.decays:
        term += weight * of_group[WEIGHT_DECAY]
    term *= of_group[BETA3]
    moment, kept = term, None
    if shard.exp_avg is not None:
        old = _read_moment(shard, start, stop, place, position).to(dtype)
        moment = term + old * of_group[BETA1]
        kept = torch.where(active, moment, old)
    if shard.nesterov:
        change = moment * each[layers, AHEAD] + term * each[layers, STEP_SIZE]
    else:
        change = moment * each[layers, STEP_SIZE]
    if column >= 0 and not shard.reg_inside_moment:
        change /= root
    if not shard.reg_inside_moment and shard.decays:
        change += weight * each[layers, DECAY]
    weight = weight - change
    if shard.rounds_weights:
        weight = rounding.to_bfloat16(weight, bits)
    return _Changed(weight, kept, bits, active)


def _tile(shards: Sequence[Shard]) -> int:
    return GPU_TILE if all(shard.param.is_cuda for shard in shards) else TILE


def _tiles(rows: int, width: int, tile: int) -> Iterator[tuple[int, int, int, int]]:
    """First and last (exclusive) row and column of parts of a matrix; consecutive in it, and bounded."""
    many = max(tile // width, 1)
    for first in range(0, rows, many):
        for left in range(0, width, tile):
            yield first, min(first + many, rows), left, min(left + tile, width)


def _by_layers(values: Tensor, within: int, size: int) -> Iterator[Tensor]:
    """Consecutive elements as rows ``[layers, elements of each]``.

    First the elements of a layer that begins before them, then the complete layers, then the elements of a
    layer that ends after them.

    Args:
        values: 1-dim.
        within: elements of the first layer that come before them.
        size: elements of a layer.
    """
    head = min(-within % size, len(values))
    body = (len(values) - head) // size * size
    for part, width in (
        (values[:head], head),
        (values[head : head + body], size),
        (values[head + body :], len(values) - head - body),
    ):
        if len(part):
            yield part.view(-1, width)


def _read_moment(shard: Shard, start: int, stop: int, place: int, position: int) -> Tensor:
    assert shard.exp_avg is not None
    if shard.exp_avg.shape == shard.param.shape and shard.exp_avg_scale is None:
        return _read(shard.exp_avg, start, stop)
    return momentum.read(shard.exp_avg, shard.exp_avg_scale, place, position, stop - start)


def _write_moment(
    shard: Shard,
    start: int,
    place: int,
    position: int,
    values: Tensor,
    bits: Tensor,
    active: Tensor,
    sharded: Tensor | None,
) -> None:
    assert shard.exp_avg is not None
    if shard.exp_avg.shape == shard.param.shape and shard.exp_avg_scale is None:
        if shard.exp_avg.dtype == torch.bfloat16:
            values = rounding.to_bfloat16(values, bits)
        _write(shard.exp_avg, start, start + len(values), values, active)
    else:
        momentum.write(shard.exp_avg, shard.exp_avg_scale, place, position, values, bits, active, sharded)


def _read(tensor: Tensor, start: int, stop: int) -> Tensor:
    """The row-major elements ``start..stop`` of a tensor, however it is strided."""
    parts = [view.reshape(-1) for view in _views(tensor, start, stop)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _write(tensor: Tensor, start: int, stop: int, values: Tensor, active: Tensor) -> None:
    """Put ``values`` in place of those elements that are active."""
    values = values.to(tensor.dtype)
    begin = 0
    for view in _views(tensor, start, stop):
        part = slice(begin, begin + view.numel())
        view.copy_(torch.where(active[part].view(view.shape), values[part].view(view.shape), view))
        begin = part.stop


def _views(tensor: Tensor, start: int, stop: int) -> Iterator[Tensor]:
    """Views that together are the row-major elements ``start..stop`` of a tensor."""
    if tensor.is_contiguous():
        yield tensor.view(-1)[start:stop]
        return
    row = tensor.shape[1:].numel()
    while start < stop:
        index, within = divmod(start, row)
        rows = (stop - start) // row if within == 0 else 0
        if rows:
            yield tensor.narrow(0, index, rows)
            start += rows * row
        else:
            end = min(stop, (index + 1) * row)
            yield from _views(tensor[index], within, end - index * row)
            start = end
