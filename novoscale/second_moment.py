"""The second moments, and what the update makes of them.

But for :func:`allocate` functions of vectors with one element per layer (or column, or parameter), most of
them pure, in float64; ``options`` is a param group. The layers of a *factored* parameter are the rows of a
matrix, and it has second moments of its columns too: an element's is their product over the mean of the rows'
(Adafactor, arXiv 1804.04235, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from novoscale.dtensors import by_rows, cuts_rows, from_local
from novoscale.kernels.shards import Coefficients
from novoscale.layout import Layout, counts_once, matrix_dimensions

Options = Mapping[str, Any]

# What of each parameter is added up over the ranks, with the layers: see `sums`.
FRESH, KEPT, WEIGHTS = range(3)
SUMS = 3

# The least root mean square of a parameter that a relative step assumes (Adafactor's epsilon_2).
LEAST_SCALE = 1e-3


@dataclass
class Layers:
    """The layers of a param group in a step: their second moments, and what they are of.

    Attributes:
        v: float32 ``[layers]``; of a factored parameter the mean squares of its rows.
        columns: float32 ``[columns]``: those of its columns; None where no parameter is factored.
        t: float32: the steps of each layer, or of each parameter where it ``counts_once``; None: not counted.
        counts_once: which of the two.
        here: int64 ``[parameters]``: how many of its layers are here.
        numel: int64 ``[parameters]``: elements of each layer.
        number: int64 ``[parameters]``: see ``layout.Parameter``.
        layers: float64 ``[parameters]``: how many layers there are on all ranks.
        factored: bool ``[parameters]``.
        width: int64 ``[parameters]``: columns.
        share: float64 ``[layers]``: 1 if this rank is the one that counts a layer when the ranks add up what
            each has of a parameter, else 0. None where nothing is added up.
        scattered: bool ``[parameters]``: whether ranks have different layers of it. None as ``share``.
    """

    v: Tensor
    columns: Tensor | None
    t: Tensor | None
    counts_once: bool
    here: Tensor
    numel: Tensor
    number: Tensor
    layers: Tensor
    factored: Tensor
    width: Tensor
    share: Tensor | None
    scattered: Tensor | None

    def by_layer(self, values: Tensor) -> Tensor:
        """A vector with one element for each parameter as one with one for each layer."""
        return torch.repeat_interleave(values, self.here, output_size=len(self.v))

    def by_column(self, values: Tensor) -> Tensor:
        """The same with one for each column."""
        assert self.columns is not None
        return torch.repeat_interleave(values, self.width, output_size=len(self.columns))

    def by_parameter(self, values: Tensor) -> Tensor:
        """The sum over the layers of each parameter that are here, in a fixed order."""
        return torch.segment_reduce(values, "sum", lengths=self.here, unsafe=True)

    def by_count(self, values: Tensor) -> Tensor:
        """A vector with one element for each count of steps as one with one for each layer."""
        return self.by_layer(values) if self.counts_once else values


def adds_up(options: Options) -> bool:
    """Whether the ranks add up numbers of each parameter of a param group in a step."""
    return bool(
        counts_once(options["granularity"]) or options["scale_parameter"] or options["clip_threshold"]
    )


# ---- the state -------------------------------------------------------------------------------------------


def allocate(p: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The second moments of a tensor, zero: float32.

    Returns:
        ``exp_avg_sq``: one for each layer that this rank has, but those of factored parameters.
        ``exp_avg_sq_row`` and ``exp_avg_sq_col``: of each row that this rank has, and of each column, of
        factored parameters. Of a parameter they have the shapes of its leading and of its trailing
        dimensions, of a flat partition with several they are vectors. The rows of a DTensor that is cut by
        rows are a DTensor cut as it is; all else is the same on every rank of its mesh.
    """
    zeros = torch.zeros(layout.layers - layout.rows, dtype=torch.float32, device=p.device)
    made = {}
    if layout.rows < layout.layers or not layout.columns:
        made["exp_avg_sq"] = _as_cut(zeros, p, layout, p.shape[:1])
    if layout.columns:
        rows = torch.zeros(layout.rows, dtype=torch.float32, device=p.device)
        columns = torch.zeros(layout.columns, dtype=torch.float32, device=p.device)
        if len(layout.held) == 1 and p.ndim > 1:
            split = matrix_dimensions(p.shape)
            rows = _as_cut(rows, p, layout, p.shape[:split])
            columns = columns.view(p.shape[split:])
        made |= {"exp_avg_sq_row": rows, "exp_avg_sq_col": columns}
    return made


def _as_cut(local: Tensor, p: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    """This rank's vector as a part of what all ranks have; ``shape``: of the whole, if it is cut by rows."""
    if not isinstance(p, DTensor) or not by_rows(p, layout.held[0].parameter):
        return local if len(shape) < 2 else local.view(shape)
    local = local.view(-1, *shape[1:])
    placements = [x if cuts_rows(x) else Replicate() for x in p.placements]
    return from_local(local, p, shape, placements) if any(map(cuts_rows, p.placements)) else local


def allocate_steps(p: Tensor, layout: Layout) -> Tensor:
    """Zeros, one for each count of steps of a tensor: float32."""
    zeros = torch.zeros(layout.counts, dtype=torch.float32, device=p.device)
    once = any(h.parameter.counts_once for h in layout.held)
    return zeros if once else _as_cut(zeros, p, layout, p.shape[:1])


# ---- a step ----------------------------------------------------------------------------------------------


def sums(layers: Layers, S: Tensor, options: Options) -> Tensor:
    """What of each parameter the ranks have to add up, before the statistic is complete.

    So that the mean of the second moments after the step is known to all of them in the same all-reduce.

    Args:
        layers: of the group.
        S: this rank's part of the statistic of each layer.
        options: of the group.

    Returns:
        float64 ``[2, parameters]``. FRESH: what S adds to the sum of the second moments, before it is divided
        by the elements of a row. KEPT: what remains of those there are.
    """
    assert layers.share is not None
    beta2 = options["betas"][1]
    if options["init_zero"]:
        fresh = (1 - beta2) * layers.by_parameter(S)
    else:
        fresh = layers.by_parameter(torch.where(layers.v == 0, S, (1 - beta2) * S))
    return torch.stack((fresh, beta2 * layers.by_parameter(layers.share * layers.v)))


def advance(
    layers: Layers, S: Tensor, of_columns: Tensor, totals: Tensor, finite: Tensor, options: Options
) -> Tensor:
    """Average the statistic into the second moments, in place, and count the steps.

    Args:
        layers: of the group.
        S: the complete statistic of each layer.
        of_columns: of each column.
        totals: the complete :func:`sums`, if there are any.
        finite: bool: whether there is a step at all; 0-dim, or one for each parameter.
        options: of the group.

    Returns:
        bool ``[layers]``: which layers are stepped: those that have seen a gradient that is not zero.
    """
    if layers.columns is not None:
        S = torch.where(layers.by_layer(layers.factored), S / layers.by_layer(layers.numel), S)
        c = averaged(layers.columns, of_columns / layers.by_column(layers.layers), options)
        layers.columns.copy_(torch.where(_spread(finite, layers.by_column), c, layers.columns))
    stepped = _spread(finite, layers.by_layer)
    v = torch.where(stepped, averaged(layers.v, S, options), layers.v)
    layers.v.copy_(v)
    active = stepped & (v > 0)
    if layers.t is not None:
        layers.t.add_(finite & (totals[FRESH] + totals[KEPT] > 0) if layers.counts_once else active)
    return active


def _spread(verdict: Tensor, over: Callable[[Tensor], Tensor]) -> Tensor:
    """A verdict on all parameters as it is; one on each, over their layers or columns."""
    return verdict if verdict.ndim == 0 else over(verdict)


def averaged(v: Tensor, S: Tensor, options: Options) -> Tensor:
    """The running average of S (a sum or mean of squares, or the largest magnitude): float32."""
    beta2 = options["betas"][1]
    average = beta2 * v.double() + (1 - beta2) * S
    # "First step" is v == 0, decided on the device: frameworks call step() with zero gradients
    # before training, and a layer may get its first gradient late.
    return (average if options["init_zero"] else torch.where(v == 0, S, average)).float()


def mean_square_update(layers: Layers, S: Tensor, active: Tensor, options: Options) -> Tensor:
    """Of the normalised gradient u of each parameter, the mean of u**2: this rank's part, float64.

    The mean of S/v over the layers (for norms over the elements too), from sums that are known.
    """
    assert layers.share is not None
    assert layers.scattered is not None
    # An unfactored layer's v is of sums: with "rms" u is divided by the root of their mean.
    divided = layers.factored if options["normalize"] == "rms" else torch.ones_like(layers.factored)
    numel = layers.by_layer(torch.where(divided, layers.numel, 1))
    mean_square = torch.where(active, S / numel / layers.v.double(), 0.0)
    if options["bias_correction"]:
        assert layers.t is not None
        mean_square = mean_square * layers.by_count(1 - torch.pow(options["betas"][1], layers.t.double()))
    weight = torch.where(layers.by_layer(layers.scattered), layers.share, 1.0)
    return layers.by_parameter(mean_square * weight) / layers.layers


def update_scale(
    layers: Layers, totals: Tensor, mean_square: Tensor | None, options: Options
) -> Tensor | None:
    """What u of each parameter is multiplied by; None: nothing.

    With ``clip_threshold`` 1 / max(1, rms(u) / threshold); with ``scale_parameter`` max(1e-3, rms(w)).
    """
    scale = None
    if mean_square is not None:
        scale = 1 / (mean_square.sqrt() / options["clip_threshold"]).clamp(min=1)
    if options["scale_parameter"]:
        relative = (totals[WEIGHTS] / (layers.layers * layers.numel)).sqrt().clamp(min=LEAST_SCALE)
        scale = relative if scale is None else relative * scale
    return scale


def coefficients(
    layers: Layers, totals: Tensor, scale: Tensor | None, of_update: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What the update needs to know of each layer, and of each column: see ``kernels.Coefficients``.

    Args:
        layers: of the group, after :func:`advance`.
        totals: see there.
        scale: 0-dim: what the gradients are multiplied by; None: 1.
        of_update: see :func:`update_scale`.
        options: of the group.

    Returns:
        grad_scale, step_size, decay, ahead, row_root and column_root; None for what the group has no use.
    """
    beta1, beta2 = options["betas"]
    lr = options["lr"]
    # A number is not moved to the device: that would be a copy, which a CUDA graph cannot hold.
    lr = lr.to(layers.v.device).double().reshape(()) if isinstance(lr, Tensor) else float(lr)
    v = layers.v.double()

    def constant(value: Tensor | float) -> Tensor:
        return value.expand(len(v)) if isinstance(value, Tensor) else torch.full_like(v, value)

    is_row = layers.by_layer(layers.factored) if layers.columns is not None else None
    if is_row is not None:
        # The mean of the rows' second moments after the step, by the sums that made it.
        mean = (totals[FRESH] / layers.numel + totals[KEPT]) / layers.layers
        v = v / layers.by_layer(torch.where(layers.factored, mean, layers.numel))
    elif options["normalize"] == "rms":
        v = v / layers.by_layer(layers.numel)
    root = v.sqrt() if options["norm_type"] == 2 else v
    step_size, ahead = constant(lr), constant(lr * beta1) if options["nesterov"] else None
    if options["bias_correction"]:
        assert layers.t is not None
        t = layers.t.double().clamp(min=1)  # powers take time: once for each count
        root = root / layers.by_count((1 - torch.pow(beta2, t)).sqrt())
        step_size = layers.by_count(lr / (1 - torch.pow(beta1, t)))
        if options["nesterov"]:
            ahead = layers.by_count(lr * beta1 / (1 - torch.pow(beta1, t + 1)))
    inverse = 1 / (root + options["eps"])
    if is_row is not None:
        inverse = torch.where(is_row, 1.0, inverse)  # the kernels divide by the roots
    sign = -1.0 if options["maximize"] else 1.0
    grad_scale = constant(sign if scale is None else sign * scale)
    if of_update is not None:
        grad_scale = grad_scale * layers.by_layer(of_update)
    if options["reg_inside_moment"]:
        grad_scale = grad_scale * inverse
    else:
        step_size = step_size * inverse
        ahead = None if ahead is None else ahead * inverse
    return (
        grad_scale,
        step_size,
        constant(lr * options["weight_decay"]),
        ahead,
        None if is_row is None else root,
        None if layers.columns is None else layers.columns.double().sqrt(),
    )


def of_all(
    parts: Sequence[tuple[tuple[Tensor | None, ...], Tensor, Tensor]], groups: Sequence[Options]
) -> Coefficients:
    """The vectors of all param groups as one: of each group :func:`coefficients`, active layers and keys."""

    def joined(vectors: Sequence[Tensor]) -> Tensor:
        return vectors[0] if len(vectors) == 1 else torch.cat([*vectors])

    def optional(vectors: Sequence[Tensor | None]) -> Tensor | None:
        if all(vector is None for vector in vectors):
            return None
        # A group that has no use for it has it all the same: layers are told by their place.
        return joined(
            [torch.zeros_like(g) if v is None else v for v, g in zip(vectors, grad_scale, strict=True)]
        )

    found, active, keys = zip(*parts, strict=True)
    grad_scale, step_size, decay, ahead, row_root, column_root = zip(*found, strict=True)
    columns = [vector for vector in column_root if vector is not None]
    forward = optional(ahead)
    scale = joined(grad_scale)
    each = (scale, joined(step_size), joined(decay), torch.zeros_like(scale) if forward is None else forward)
    options = [
        (beta1, 1 - beta1 if g["grad_averaging"] else 1.0, g["weight_decay"], g["eps"])
        for g in groups
        for beta1 in g["betas"][:1]
    ]
    return Coefficients(
        torch.stack(each, dim=1),
        torch.tensor(options, dtype=scale.dtype, device=scale.device),
        joined(active),
        joined(keys).to(torch.int32),
        optional(row_root),
        joined(columns) if columns else None,
    )


def clipped(
    S: Tensor, of_columns: Tensor, totals: Tensor, clip: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of gradients that are multiplied by ``clip``."""
    of_statistic = power(clip, options)
    if len(totals):
        totals = torch.cat((totals[:1] * of_statistic, totals[1:]))
    return S * of_statistic, of_columns * of_statistic, totals


def power(factor: Tensor, options: Options) -> Tensor:
    """What the statistic of a layer is multiplied by where the gradients are multiplied by ``factor``."""
    return factor if options["norm_type"] == 0 else factor.square()


def clip_coefficient(total: Tensor, max_grad_norm: float | None) -> Tensor | None:
    """What ``torch.nn.utils.clip_grad_norm_`` multiplies the gradients by; None without clipping.

    Args:
        total: 0-dim: the sum of squares of the whole model.
        max_grad_norm: None or 0: no clipping.
    """
    if not max_grad_norm:
        return None
    return (max_grad_norm / (total.sqrt() + 1e-6)).clamp(max=1)
