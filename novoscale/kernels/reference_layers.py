"""The definition of the pass over the layers: plain torch, any device, in float64.

The layers of a *factored* parameter are the rows of a matrix, and it has second moments of its columns too:
an element's is their product over the mean of the rows' (Adafactor, arXiv 1804.04235, section 3). ``o`` is
the options of each parameter, float64 ``[parameters, 17]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from novoscale import rounding
from novoscale.kernels import layers as table
from novoscale.kernels.layers import FRESH, KEPT, LEAST_SCALE, WEIGHTS, LayerTable, OptionTable
from novoscale.kernels.shards import Coefficients


class States(NamedTuple):
    """The state of the tensors of a step, in their order: this rank's parts.

    Attributes:
        v: float32: the second moments of the layers of each.
        columns: float32: those of columns.
        steps: float32: the counts of steps.
    """

    v: Sequence[Tensor]
    columns: Sequence[Tensor]
    steps: Sequence[Tensor]


class LayerKernels:
    """The pass over the layers. Every kernel has this class.

    Args:
        known: the layers.
        device: of the vectors that have one element per layer.

    Attributes:
        completes: whether it has ``complete`` too, which does the work of ``collectives.Plan.complete``.
    """

    completes = False

    def __init__(self, known: LayerTable, device: torch.device) -> None:
        self._table, self._device = known, device
        self._records = known.records.to(device)
        index = torch.arange(len(known.records), device=device)
        self._of_layer = index.repeat_interleave(self._column(table.COUNT), output_size=known.layers)
        self._of_column = index.repeat_interleave(self._column(table.WIDTH), output_size=known.columns)
        self._factored = self._column(table.WIDTH) > 0
        self._share = None if known.share is None else known.share.to(device)
        # Of each layer the place of its count of steps; 0 where there is none.
        counted, once = self._column(table.STEPS) != 0, self._column(table.ONCE) > 0
        counts = torch.where(counted, torch.where(once, 1, self._column(table.COUNT)), 0)
        first = counts.cumsum(0) - counts
        nth = torch.arange(known.layers, device=device) - self._column(table.FIRST)[self._of_layer]
        self._count_of = torch.where(counted[self._of_layer], first[self._of_layer], 0)
        self._count_of += torch.where((counted & ~once)[self._of_layer], nth, 0)
        self._counted, self._once = counted[self._of_layer].nonzero()[:, 0], once[self._of_layer]

    def _column(self, column: int) -> Tensor:
        return self._records[:, column]

    def hold(self, states: Callable[[], States]) -> None:
        """Take the state of the tensors, for one step. (Kernels that know its addresses need not ask.)"""
        self._states = states()
        self._v, self._columns, self._t = (_joined(tensors, self._device) for tensors in self._states)

    def release(self) -> None:
        """Let go of it."""
        del self._states, self._v, self._columns, self._t

    def begin(self, options: OptionTable, statistic: Tensor, scale: Tensor | None) -> None:
        """Divide the gradients' statistic by a loss scale, and add up what the ranks have to know, in place.

        So that the mean of the second moments after the step is known to all of them in the same all-reduce:
        of each parameter FRESH, what the statistic adds to the sum of the second moments, before it is
        divided by the elements of a row; and KEPT, what remains of those there are.

        Args:
            options: of the param groups.
            statistic: the vector of the step (``collectives.Plan``): this rank's part.
            scale: 0-dim: the gradients are so many times too large; None: 1.
        """
        o = options.table[self._column(table.GROUP)]
        S, of_columns, numbers = self._parts(statistic)
        if scale is not None:
            factor = _power(1 / scale.double().reshape(()), o)
            S.mul_(factor[self._of_layer])
            of_columns.mul_(factor[self._of_column])
        if self._table.sums:
            assert self._share is not None
            numbers[FRESH] = self._by_parameter(_fresh(self._v, S, o[self._of_layer]))
            numbers[KEPT] = o[:, table.BETA2] * self._by_parameter(self._share * self._v)

    def complete(self, *_: Any) -> tuple[Tensor, Tensor]:
        """Not here: see ``completes``."""
        raise NotImplementedError

    def advance(
        self,
        options: OptionTable,
        statistic: Tensor,
        finite: Tensor,
        total: Tensor,
        scale: Tensor | None,
        share: Callable[[Tensor], Tensor],
    ) -> Coefficients:
        """Average the statistic into the second moments, in place, and count the steps.

        Args:
            options: see :meth:`begin`.
            statistic: the complete vector of the step.
            finite: bool: whether there is a step at all; 0-dim, or one for each parameter.
            total: 0-dim: the sum of squares of the whole model.
            scale: see :meth:`begin`.
            share: adds up a number of each parameter over the ranks that have different layers of it.

        Returns:
            What the update of m and w needs to know.
        """
        o = options.table[self._column(table.GROUP)]
        S, of_columns, numbers = self._parts(statistic)
        factor = torch.ones((), dtype=torch.float64, device=self._device)
        if "max_grad_norm" in self._table.uses:
            # As torch.nn.utils.clip_grad_norm_.
            factor = (options.table[0, table.LIMIT] / (total.sqrt() + 1e-6)).clamp(max=1)
            power = _power(factor, o)
            S, of_columns = S * power[self._of_layer], of_columns * power[self._of_column]
            if self._table.sums:
                numbers = torch.cat((numbers[:1] * power, numbers[1:]))
        active = self._average(o, S, of_columns, numbers, finite)
        of_update = torch.ones_like(o[:, 0])
        if "clip_threshold" in self._table.uses:
            of_update = _clipped(share(self._mean_square(o, S, active)), o)
        if "scale_parameter" in self._table.uses:
            of_update = self._relative(numbers, o) * of_update
        if scale is not None:
            factor = factor * (1 / scale.double().reshape(()))
        return self._coefficients(options, o, numbers, active, factor, of_update)

    def _average(self, o: Tensor, S: Tensor, of_columns: Tensor, numbers: Tensor, finite: Tensor) -> Tensor:
        """The running averages, in place; returns which layers have seen a gradient that is not zero."""
        numel, stepped = self._column(table.NUMEL), finite
        if self._table.columns:
            S = torch.where(self._factored[self._of_layer], S / numel[self._of_layer], S)
            c = of_columns / self._column(table.LAYERS)[self._of_column]
            c = _averaged(self._columns, c, o[self._of_column])
            there = finite if finite.ndim == 0 else finite[self._of_column]
            self._columns.copy_(torch.where(there, c, self._columns))
            _put_back(self._columns, self._states.columns)
        if finite.ndim:
            stepped = finite[self._of_layer]
        self._v.copy_(torch.where(stepped, _averaged(self._v, S, o[self._of_layer]), self._v))
        _put_back(self._v, self._states.v)
        active = stepped & (self._v > 0)
        if len(self._t):
            moves = active
            if self._table.sums:
                whole = finite & (numbers[FRESH] + numbers[KEPT] > 0)
                moves = torch.where(self._once, whole[self._of_layer], active)
            # Of layers with one count in common, all say the same.
            self._t[self._count_of[self._counted]] += moves[self._counted]
            _put_back(self._t, self._states.steps)
        return active

    def _mean_square(self, o: Tensor, S: Tensor, active: Tensor) -> Tensor:
        """Of the normalised gradient u of each parameter, the mean of u**2: this rank's part.

        The mean of S/v over the layers (for norms over the elements too), from sums that are known.
        """
        assert self._share is not None
        # An unfactored layer's v is of sums: with "rms" u is divided by the root of their mean.
        divided = self._factored | (o[:, table.RMS] == 0)
        numel = torch.where(divided, self._column(table.NUMEL), 1)[self._of_layer]
        mean_square = torch.where(active, S / numel / self._v.double(), 0.0)
        if "bias_correction" in self._table.uses:
            corrected = mean_square * (1 - powers(o[self._of_layer, table.BETA2], self._steps()))
            mean_square = torch.where(o[self._of_layer, table.BIAS_CORRECTION] > 0, corrected, mean_square)
        scattered = self._column(table.SCATTERED) > 0
        weight = torch.where(scattered[self._of_layer], self._share, 1.0)
        found = self._by_parameter(mean_square * weight) / self._column(table.LAYERS)
        return torch.where(o[:, table.CLIP_THRESHOLD] > 0, found, 0.0)

    def _relative(self, numbers: Tensor, o: Tensor) -> Tensor:
        """The root mean square of each parameter's weights, if its step is relative to it; else 1."""
        elements = self._column(table.LAYERS) * self._column(table.NUMEL)
        found = (numbers[WEIGHTS] / elements).sqrt().clamp(min=LEAST_SCALE)
        return torch.where(o[:, table.RELATIVE] > 0, found, 1.0)

    def _coefficients(
        self,
        options: OptionTable,
        o: Tensor,
        numbers: Tensor,
        active: Tensor,
        factor: Tensor,
        of_update: Tensor,
    ) -> Coefficients:
        """What the update needs to know of each layer and column.

        Args:
            options: of the groups.
            o: the options of each parameter.
            numbers: the complete numbers of each parameter.
            active: of each layer.
            factor: 0-dim: what the gradients are multiplied by.
            of_update: of each parameter: what its update is multiplied by.
        """
        of, numel = self._of_layer, self._column(table.NUMEL)
        divisor = torch.where(o[:, table.RMS] > 0, numel, 1).double()
        if self._table.columns:
            # The mean of the rows' second moments after the step, by the sums that made it.
            mean = (numbers[FRESH] / numel + numbers[KEPT]) / self._column(table.LAYERS)
            divisor = torch.where(self._factored, mean, divisor)
        v = self._v.double() / divisor[of]
        root = torch.where(o[of, table.NORM_TYPE] == 2, v.sqrt(), v)
        lr, beta1 = o[of, table.LR], o[of, table.BETA1]
        step_size, ahead = lr, lr * beta1
        if "bias_correction" in self._table.uses:
            t = self._steps().clamp(min=1)
            corrected = o[of, table.BIAS_CORRECTION] > 0
            decayed = powers(beta1, t)
            root = torch.where(corrected, root / (1 - powers(o[of, table.BETA2], t)).sqrt(), root)
            step_size = torch.where(corrected, lr / (1 - decayed), step_size)
            ahead = torch.where(corrected, lr * beta1 / (1 - decayed * beta1), ahead)
        inverse = 1 / (root + o[of, table.EPS])
        inverse = torch.where(self._factored[of], 1.0, inverse)  # the kernels divide by the roots
        grad_scale = (o[:, table.SIGN] * factor * of_update)[of]
        inside = o[of, table.INSIDE] > 0
        each = (
            torch.where(inside, grad_scale * inverse, grad_scale),
            torch.where(inside, step_size, step_size * inverse),
            lr * o[of, table.WEIGHT_DECAY],
            torch.where(o[of, table.NESTEROV] > 0, torch.where(inside, ahead, ahead * inverse), 0.0),
        )
        dtype = self._table.dtype
        return Coefficients(
            each=torch.stack(each, dim=1).to(dtype),
            options=options.of_update,
            active=active,
            key=self._keys(o),
            row_root=root.to(dtype) if self._table.columns else None,
            column_root=self._columns.double().sqrt().to(dtype) if self._table.columns else None,
        )

    def _keys(self, o: Tensor) -> Tensor:
        """What random bits each layer has in this step: see ``rounding.keys``; int32."""
        rounds = (self._column(table.ROUNDS) > 0)[self._of_layer]
        number, seed = self._column(table.NUMBER), o[:, table.SEED].long()
        keys = rounding.keys(seed[self._of_layer], number[self._of_layer], self._steps().long())
        return torch.where(rounds, keys, 0).to(torch.int32)

    def _steps(self) -> Tensor:
        """The steps of each layer; float64. 0 if none is counted here."""
        if not len(self._t):
            return torch.zeros(self._table.layers, dtype=torch.float64, device=self._device)
        return self._t.double()[self._count_of]

    def _parts(self, statistic: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the vector of a step: of layers, of columns, and ``[numbers, parameters]``."""
        first = self._table.layers + self._table.columns
        numbers = statistic[first:].view(-1, len(self._records))
        return statistic[: self._table.layers], statistic[self._table.layers : first], numbers

    def _by_parameter(self, values: Tensor) -> Tensor:
        """The sum over the layers of each parameter that are here, in a fixed order."""
        return torch.segment_reduce(values, "sum", lengths=self._column(table.COUNT), unsafe=True)


class LayersByAddress(LayerKernels):
    """Holds no state, and keeps no tensor alive: it knows addresses."""

    def hold(self, states: Callable[[], States]) -> None:
        """Nothing is held."""

    def release(self) -> None:
        """Nothing is held."""


def room(known: LayerTable, options: OptionTable) -> Coefficients:
    """Coefficients to be written into."""

    def empty(*shape: int, dtype: torch.dtype = known.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=options.table.device)

    return Coefficients(
        each=empty(known.layers, 4),
        options=options.of_update,
        active=empty(known.layers, dtype=torch.bool),
        key=empty(known.layers, dtype=torch.int32),
        row_root=empty(known.layers) if known.columns else None,
        column_root=empty(known.columns) if known.columns else None,
    )


def powers(base: Tensor, exponent: Tensor) -> Tensor:
    """base ** exponent, for whole exponents from 0 to 2**24.

    By squaring, which every kernel can do in the same way: the same bits.
    """
    result, exponent = torch.ones_like(base), exponent.long()
    for bit in range(25):
        result = torch.where((exponent >> bit) & 1 > 0, result * base, result)
        base = base * base
    return result


def _power(factor: Tensor, o: Tensor) -> Tensor:
    """What the statistic of each parameter is multiplied by where its gradient is by ``factor``."""
    return torch.where(o[:, table.NORM_TYPE] == 2, factor.square(), factor)


def _fresh(v: Tensor, S: Tensor, o: Tensor) -> Tensor:
    """What S adds to the running average of each layer.

    "First step" is v == 0, decided on the device: frameworks call step() with zero gradients before training,
    and a layer may get its first gradient late.
    """
    return torch.where((v == 0) & (o[:, table.INIT_ZERO] == 0), S, (1 - o[:, table.BETA2]) * S)


def _averaged(v: Tensor, S: Tensor, o: Tensor) -> Tensor:
    """The running average of S (a sum or mean of squares, or the largest magnitude): float32."""
    return (o[:, table.BETA2] * v.double() + _fresh(v, S, o)).float()


def _clipped(mean_square: Tensor, o: Tensor) -> Tensor:
    """What clipping the update of each parameter multiplies it by: 1 / max(1, rms(u) / threshold)."""
    threshold = torch.where(o[:, table.CLIP_THRESHOLD] > 0, o[:, table.CLIP_THRESHOLD], 1.0)
    return 1 / (mean_square.sqrt() / threshold).clamp(min=1)


def _joined(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    empty = torch.empty(0, dtype=torch.float32, device=device)
    return torch.cat([empty, *(t.reshape(-1).to(device) for t in tensors)])


def _put_back(vector: Tensor, tensors: Sequence[Tensor]) -> None:
    parts = torch.split(vector, [t.numel() for t in tensors])
    torch._foreach_copy_([*tensors], [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])
