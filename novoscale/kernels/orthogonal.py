"""The update of matrices that move along an orthogonal direction: the two parts of it are the plain update.

With u the normalised gradient of a matrix ``[R, C]`` and m its first moment, as everywhere:

    m = beta1*m + beta3*u
    n = m, or with Nesterov beta1*m + beta3*u        # before m is rounded
    O = newton_schulz.orthogonal(n)
    w = w - lr*(0.2*sqrt(max(R, C))*O + weight_decay*w)

The first two lines are an update in which a buffer of zeros takes the place of the weights and the step is
-1; the last is one of the weights in which O takes the place of the gradient, without a first moment. So
every implementation of the update serves, and gives the same bits for the same O.

With ``row_normalize`` each row of O is divided by the root of its own running mean square, and the matrix
then scaled to the norm that O had (NorMuon, arXiv 2510.05491). A bias correction, the same for all rows,
would cancel.

The scale gives O the root mean square of an AdamW step (Moonlight, arXiv 2502.16982, section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from novoscale.kernels import newton_schulz
from novoscale.kernels.interface import ElementKernels, VectorSizes
from novoscale.kernels.shards import (
    AHEAD,
    BETA1,
    BETA3,
    GRAD_SCALE,
    LAYER,
    STEP_SIZE,
    Coefficients,
    Shard,
    ShardTensors,
)

# Bytes of the directions that are there at a time, or one matrix if it is larger.
BUFFER = 256 * 2**20
SCALE = 0.2  # the root mean square of an AdamW step
ROWS_BETA = 0.95  # of the running mean squares of rows
LEAST = 1e-30  # of such a mean square, or of a norm: of rows that have been zero
ALIGNMENT = 128  # elements: in the buffer, tensors begin at multiples of it

# What a shard has not that is updated as any other.
PLAIN: dict[str, Any] = {"matrices": None, "direction_avg_sq": None}

MakeKernels = Callable[[Sequence[Shard], torch.device, VectorSizes], ElementKernels]


def direction_dtype(param: torch.dtype, device: str) -> torch.dtype:
    """The dtype of the directions of a tensor.

    Args:
        param: the dtype of the weights.
        device: the type of device, such as "cuda".
    """
    if param == torch.float64:
        return torch.float64
    return torch.float32 if device == "cpu" else torch.bfloat16


def batches(shards: Sequence[Shard]) -> Iterator[list[int]]:
    """Which tensors have their directions in the buffer at the same time: as many as fit, in their order."""
    room = 0
    batch: list[int] = []
    for index, shard in enumerate(shards):
        size = _elements(shard) * direction_dtype(shard.param.dtype, shard.param.device.type).itemsize
        if batch and size > room:
            yield batch
            batch = []
        room = (room if batch else BUFFER) - size
        batch.append(index)
    if batch:
        yield batch


class Directions(ElementKernels):
    """Both passes over tensors with ``Shard.matrices``, on one device and of one dtype.

    Args:
        shards: the tensors: full parameters.
        device: of the tensors, and of the vectors that have one element per layer.
        sizes: of those vectors.
        kernels: makes the passes that the update is made of.
    """

    def __init__(
        self, shards: Sequence[Shard], device: torch.device, sizes: VectorSizes, kernels: MakeKernels
    ) -> None:
        self._device = device
        self._dtype = direction_dtype(shards[0].param.dtype, device.type)
        self._sizes = [_elements(s) for s in shards]
        self._like = [torch.empty_like(s.param, device="meta") for s in shards]
        self._matrices = [s.matrices for s in shards if s.matrices is not None]
        buffer = self._directions(torch.empty)
        self._addresses = [*map(Tensor.data_ptr, buffer)]
        self._averages = kernels([*map(_averaged, shards, buffer)], device, sizes)
        self._moves = kernels([*map(_moved, shards, buffer)], device, sizes)
        self._make_scales(shards, sizes.layers)

    def _make_scales(self, shards: Sequence[Shard], layers: int) -> None:
        """Note of each layer its param group, and what its learning rate is multiplied by."""
        self._group = torch.zeros(layers, dtype=torch.int64, device=self._device)
        self._scale = torch.zeros(layers, dtype=torch.float64, device=self._device)
        self._first = [int(s.pieces[0, LAYER]) if len(s.pieces) else 0 for s in shards]
        for shard, matrices, first in zip(shards, self._matrices, self._first, strict=True):
            own = slice(first, first + shard.param.numel() // (matrices.rows * matrices.columns))
            self._group[own] = shard.group
            self._scale[own] = SCALE * math.sqrt(max(matrices.rows, matrices.columns))

    def _directions(self, make: Callable[..., Tensor]) -> list[Tensor]:
        """A buffer, as tensors in the shapes and orders of the weights."""
        buffer = make(sum(self._sizes), dtype=self._dtype, device=self._device)
        parts = torch.split(buffer, self._sizes)
        return [p.as_strided(t.shape, t.stride()) for p, t in zip(parts, self._like, strict=True)]

    def move_gradients(self, addresses: Sequence[int]) -> None:
        """See :class:`ElementKernels`."""
        self._averages.move_gradients(addresses)

    def move_params(self, addresses: Sequence[int]) -> None:
        """See :class:`ElementKernels`."""
        self._moves.move_params(addresses)

    def hold(self, tensors: Callable[[int], ShardTensors]) -> None:
        """See :class:`ElementKernels`."""
        self._tensors = tensors
        self._averages.hold(tensors)

    def release(self) -> None:
        """See :class:`ElementKernels`."""
        del self._tensors
        self._averages.release()
        self._moves.release()

    def sum_of_squares(self, more: int = 0) -> Tensor:
        """See :class:`ElementKernels`."""
        return self._averages.sum_of_squares(more)

    def largest(self, coefficients: Coefficients) -> Tensor:
        """See :class:`ElementKernels`. No block of a full parameter is sharded."""
        return self._averages.largest(coefficients)

    def update(self, coefficients: Coefficients) -> None:
        """See :class:`ElementKernels`, and above."""
        tensors, directions = self._tensors, self._directions(torch.zeros)
        addresses = [*map(Tensor.data_ptr, directions)]
        if addresses != self._addresses:
            self._addresses = addresses
            self._averages.move_params(addresses)
            self._moves.move_gradients(addresses)
        self._averages.hold(lambda i: tensors(i)._replace(param=directions[i]))
        self._averages.update(self._of_averages(coefficients))
        for index, direction in enumerate(directions):
            self._make_orthogonal(index, direction, tensors(index).direction_avg_sq, coefficients.active)
        self._moves.hold(lambda i: ShardTensors(tensors(i).param, directions[i]))
        self._moves.update(self._of_moves(coefficients))

    def _make_orthogonal(
        self, index: int, direction: Tensor, mean_squares: Tensor | None, active: Tensor
    ) -> None:
        """Make the matrices of a tensor orthogonal, in place, one after another.

        Args:
            index: of the tensor.
            direction: of its shape.
            mean_squares: see ``Shard.direction_avg_sq``; changed in place.
            active: see ``Coefficients.active``.
        """
        rows, columns, steps = self._matrices[index]
        each = direction.reshape(-1, rows, columns)
        for number, matrix in enumerate(each):
            made = newton_schulz.orthogonal(matrix, steps)
            if mean_squares is not None:
                own = mean_squares.view(-1)[number * rows : (number + 1) * rows]
                made = _normalized(made, own, active[self._first[index] + number])
            matrix.copy_(made)
        if not direction.is_contiguous():  # `each` is a copy
            direction.copy_(each.view(direction.shape))

    def _of_averages(self, c: Coefficients) -> Coefficients:
        """A step of -1 along the first moment, from zero."""
        each = c.each.clone()
        each[:, STEP_SIZE] = -1
        each[:, AHEAD] = -c.options[self._group, BETA1]
        return replace(c, each=each)

    def _of_moves(self, c: Coefficients) -> Coefficients:
        """A step of the scaled learning rate along what is given as gradients."""
        assert c.lr is not None
        each, options = c.each.clone(), c.options.clone()
        each[:, GRAD_SCALE] = 1
        each[:, STEP_SIZE] = c.lr[self._group] * self._scale
        options[:, BETA3] = 1
        return replace(c, each=each, options=options)


def _normalized(direction: Tensor, mean_square: Tensor, active: Tensor) -> Tensor:
    """A direction with rows of about one size, of the norm that it had.

    Args:
        direction: ``[R, C]``.
        mean_square: ``[R]``: of the rows so far; changed in place where ``active``, 0-dim, is true.
        active: whether there is a step.
    """
    wide = direction.to(torch.promote_types(direction.dtype, torch.float32))
    now = torch.lerp(wide.square().mean(dim=1).float(), mean_square, ROWS_BETA)
    mean_square.copy_(torch.where(active, now, mean_square))
    made = wide / now.clamp(min=LEAST).sqrt()[:, None]
    before, after = (torch.linalg.vector_norm(t) for t in (wide, made))
    scaled: Tensor = made * (before / after.clamp(min=LEAST))
    return scaled


def _averaged(shard: Shard, direction: Tensor) -> Shard:
    """The shard that the first moment is averaged by: of the direction in place of the weights."""
    return replace(shard, param=direction, decays=False, stochastic_rounding=False, **PLAIN)


def _moved(shard: Shard, direction: Tensor) -> Shard:
    """The shard that the weights are moved by: of the direction in place of the gradient."""
    return replace(
        shard,
        grad=direction,
        exp_avg=None,
        exp_avg_scale=None,
        reg_inside_moment=False,
        nesterov=False,
        **PLAIN,
    )


def _elements(shard: Shard) -> int:
    return -(-shard.param.numel() // ALIGNMENT) * ALIGNMENT
