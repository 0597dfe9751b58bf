"""The definition of the pass over the layers: plain torch, any device, in float64.

The layers of a *factored* parameter are the rows of a matrix, and it has second moments of its columns too:
an element's is their product over the mean of the rows' (Adafactor, arXiv 1804.04235, section 3). ``o`` is
the options of each parameter, float64 ``[parameters, 17]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from novoscale.kernels import interface, layers
from novoscale.kernels.interface import AdvanceInputs, States
from novoscale.kernels.layers import FRESH, KEPT, LEAST_SCALE, WEIGHTS, LayerTable, OptionTable
from novoscale.kernels.shards import Coefficients
from novoscale.state import rounding


class LayerKernels(interface.LayerKernels):
    """The pass over the layers. Holds the state, as one vector of each kind, during a step."""

    def __init__(self, table: LayerTable, device: torch.device) -> None:
        self._table, self._device = table, device
        self._records = table.records.to(device)
        index = torch.arange(len(table.records), device=device)
        self._of_layer = index.repeat_interleave(self._column(layers.COUNT), output_size=table.layers)
        self._of_column = index.repeat_interleave(self._column(layers.WIDTH), output_size=table.columns)
        self._factored = self._column(layers.WIDTH) > 0
        self._share = None if table.share is None else table.share.to(device)
        # Of each layer the place of its count of steps; 0 where there is none.
        counted, once = self._column(layers.STEPS) != 0, self._column(layers.ONCE) > 0
        counts = torch.where(counted, torch.where(once, 1, self._column(layers.COUNT)), 0)
        first = counts.cumsum(0) - counts
        nth = torch.arange(table.layers, device=device) - self._column(layers.FIRST)[self._of_layer]
        self._count_of = torch.where(counted[self._of_layer], first[self._of_layer], 0)
        self._count_of += torch.where((counted & ~once)[self._of_layer], nth, 0)
        self._counted, self._once = counted[self._of_layer].nonzero()[:, 0], once[self._of_layer]

    def _column(self, column: int) -> Tensor:
        return self._records[:, column]

    def hold(self, states: Callable[[], States]) -> None:
        """Take the state of the tensors, for one step."""
        self._states = states()
        self._v, self._columns, self._t = (_joined(tensors, self._device) for tensors in self._states)

    def release(self) -> None:
        """Free it."""
        del self._states, self._v, self._columns, self._t

    def begin(self, options: OptionTable, statistic: Tensor, scale: Tensor | None) -> None:
        """See ``interface.LayerKernels.begin``."""
        o = options.table[self._column(layers.GROUP)]
        S, of_columns, numbers = self._parts(statistic)
        if scale is not None:
            factor = _power(1 / scale.double().reshape(()), o)
            S.mul_(factor[self._of_layer])
            of_columns.mul_(factor[self._of_column])
        if self._table.sums:
            assert self._share is not None
            numbers[FRESH] = self._by_parameter(_fresh(self._v, S, o[self._of_layer]))
            numbers[KEPT] = o[:, layers.BETA2] * self._by_parameter(self._share * self._v)

    def advance(self, given: AdvanceInputs) -> Coefficients:
        """See ``interface.LayerKernels.advance``."""
        options, scale = given.options, given.scale
        o = options.table[self._column(layers.GROUP)]
        S, of_columns, numbers = self._parts(given.statistic)
        factor = torch.ones((), dtype=torch.float64, device=self._device)
        if "max_grad_norm" in self._table.uses:
            # As torch.nn.utils.clip_grad_norm_.
            factor = (options.table[0, layers.LIMIT] / (given.total.sqrt() + 1e-6)).clamp(max=1)
            power = _power(factor, o)
            S, of_columns = S * power[self._of_layer], of_columns * power[self._of_column]
            if self._table.sums:
                numbers = torch.cat((numbers[:1] * power, numbers[1:]))
        active = self._average(o, S, of_columns, numbers, given.finite)
        of_update = torch.ones_like(o[:, 0])
        if "clip_threshold" in self._table.uses:
            of_update = _clipped(given.share(self._mean_square(o, S, active)), o)
        if "scale_parameter" in self._table.uses:
            of_update = self._relative(numbers, o) * of_update
        if scale is not None:
            factor = factor * (1 / scale.double().reshape(()))
        return self._coefficients(options, o, numbers, active, factor, of_update)

    def _average(self, o: Tensor, S: Tensor, of_columns: Tensor, numbers: Tensor, finite: Tensor) -> Tensor:
        """The running averages, in place; returns which layers have seen a gradient that is not zero."""
        numel, stepped = self._column(layers.NUMEL), finite
        if self._table.columns:
            S = torch.where(self._factored[self._of_layer], S / numel[self._of_layer], S)
            c = of_columns / self._column(layers.LAYERS)[self._of_column]
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
                of_parameter = finite & (numbers[FRESH] + numbers[KEPT] > 0)
                moves = torch.where(self._once, of_parameter[self._of_layer], active)
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
        divided = self._factored | (o[:, layers.RMS] == 0)
        numel = torch.where(divided, self._column(layers.NUMEL), 1)[self._of_layer]
        mean_square = torch.where(active, S / numel / self._v.double(), 0.0)
        if "bias_correction" in self._table.uses:
            corrected = mean_square * (1 - powers(o[self._of_layer, layers.BETA2], self._steps()))
            mean_square = torch.where(o[self._of_layer, layers.BIAS_CORRECTION] > 0, corrected, mean_square)
        scattered = self._column(layers.SCATTERED) > 0
        weight = torch.where(scattered[self._of_layer], self._share, 1.0)
        found = self._by_parameter(mean_square * weight) / self._column(layers.LAYERS)
        return torch.where(o[:, layers.CLIP_THRESHOLD] > 0, found, 0.0)

    def _relative(self, numbers: Tensor, o: Tensor) -> Tensor:
        """The root mean square of each parameter's weights, if its step is relative to it; else 1."""
        elements = self._column(layers.LAYERS) * self._column(layers.NUMEL)
        found = (numbers[WEIGHTS] / elements).sqrt().clamp(min=LEAST_SCALE)
        return torch.where(o[:, layers.RELATIVE] > 0, found, 1.0)

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
        of, numel = self._of_layer, self._column(layers.NUMEL)
        divisor = torch.where(o[:, layers.RMS] > 0, numel, 1).double()
        if self._table.columns:
            # The mean of the rows' second moments after the step, by the sums that made it.
            mean = (numbers[FRESH] / numel + numbers[KEPT]) / self._column(layers.LAYERS)
            divisor = torch.where(self._factored, mean, divisor)
        v = self._v.double() / divisor[of]
        root = torch.where(o[of, layers.NORM_TYPE] == 2, v.sqrt(), v)
        lr, beta1 = o[of, layers.LR], o[of, layers.BETA1]
        step_size, ahead = lr, lr * beta1
        if "bias_correction" in self._table.uses:
            t = self._steps().clamp(min=1)
            corrected = o[of, layers.BIAS_CORRECTION] > 0
            decayed = powers(beta1, t)
            root = torch.where(corrected, root / (1 - powers(o[of, layers.BETA2], t)).sqrt(), root)
            step_size = torch.where(corrected, lr / (1 - decayed), step_size)
            ahead = torch.where(corrected, lr * beta1 / (1 - decayed * beta1), ahead)
        inverse = 1 / (root + o[of, layers.EPS])
        inverse = torch.where(self._factored[of], 1.0, inverse)  # the kernels divide by the roots
        grad_scale = (o[:, layers.SIGN] * factor * of_update)[of]
        inside = o[of, layers.INSIDE] > 0
        each = (
            torch.where(inside, grad_scale * inverse, grad_scale),
            torch.where(inside, step_size, step_size * inverse),
            lr * o[of, layers.WEIGHT_DECAY],
            torch.where(o[of, layers.NESTEROV] > 0, torch.where(inside, ahead, ahead * inverse), 0.0),
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
        rounds = (self._column(layers.ROUNDS) > 0)[self._of_layer]
        number, seed = self._column(layers.NUMBER), o[:, layers.SEED].long()
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
        return torch.segment_reduce(values, "sum", lengths=self._column(layers.COUNT), unsafe=True)


def powers(base: Tensor, exponent: Tensor) -> Tensor:
    """base ** exponent, for integer exponents from 0 to 2**24.

    By squaring, which every kernel can do in the same way: the same bits.
    """
    result, exponent = torch.ones_like(base), exponent.long()
    for bit in range(25):
        result = torch.where((exponent >> bit) & 1 > 0, result * base, result)
        base = base * base
    return result


def _power(factor: Tensor, o: Tensor) -> Tensor:
    """What the statistic of each parameter is multiplied by where its gradient is by ``factor``."""
    return torch.where(o[:, layers.NORM_TYPE] == 2, factor.square(), factor)


def _fresh(v: Tensor, S: Tensor, o: Tensor) -> Tensor:
    """What S adds to the running average of each layer.

    "First step" is v == 0, decided on the device: frameworks call step() with zero gradients before training,
    and a layer may get its first gradient late.
    """
    return torch.where((v == 0) & (o[:, layers.INIT_ZERO] == 0), S, (1 - o[:, layers.BETA2]) * S)


def _averaged(v: Tensor, S: Tensor, o: Tensor) -> Tensor:
    """The running average of S (a sum or mean of squares, or the largest magnitude): float32."""
    return (o[:, layers.BETA2] * v.double() + _fresh(v, S, o)).float()


def _clipped(mean_square: Tensor, o: Tensor) -> Tensor:
    """What clipping the update of each parameter multiplies it by: 1 / max(1, rms(u) / threshold)."""
    threshold = torch.where(o[:, layers.CLIP_THRESHOLD] > 0, o[:, layers.CLIP_THRESHOLD], 1.0)
    return 1 / (mean_square.sqrt() / threshold).clamp(min=1)


def _joined(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    empty = torch.empty(0, dtype=torch.float32, device=device)
    return torch.cat([empty, *(t.reshape(-1).to(device) for t in tensors)])


def _put_back(vector: Tensor, tensors: Sequence[Tensor]) -> None:
    parts = torch.split(vector, [t.numel() for t in tensors])
    torch._foreach_copy_([*tensors], [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])
