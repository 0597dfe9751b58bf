"""The state of an Adam as that of a NovoGrad, to go on with in the middle of a training.

Adam has both moments of every element: m = beta1*m + (1 - beta1)*g and v = beta2*v + (1 - beta2)*g**2, from
zero, t steps. Over 1 - beta1**t and 1 - beta2**t they are averages. NovoGrad's v is the sum of that average
over a layer (the mean over a row or column of a factored parameter), and its m what it would have been had
all gradients of the average been divided by the root of that v. Where beta2 and the averaging are the same
(``preset="adamw"``), v is exactly what NovoGrad would have collected from the same gradients. m is, where the
magnitudes of the gradients have not changed while beta1 remembers them. Of a weight decay inside the moment
nothing is known: m starts without it.

Nothing here knows a framework. :func:`novograd_state` converts one full parameter; :func:`converted` tensors
that are sharded, with one collective for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from novoscale.checkpoint.imported.adam_states import Moments, moments_of, shape_of
from novoscale.kernels.layers import LEAST_SCALE
from novoscale.sharding.dtensors import local_tensor
from novoscale.sharding.layers import counts_once, describe, matrix_dimensions
from novoscale.sharding.layout import Layout, unsharded
from novoscale.sharding.placed import PlacedLayout
from novoscale.sharding.plan import Plan
from novoscale.sharding.tiles import tiles
from novoscale.state.step_counts import counts_steps


@dataclass(frozen=True)
class Target:
    """A tensor of a NovoGrad, to be given a state.

    Attributes:
        name: of the parameter, for messages.
        p: the tensor.
        layout: of it.
        group: its param group.
    """

    name: str
    p: Tensor
    layout: Layout
    group: Mapping[str, Any]


class Sums(NamedTuple):
    """What is added up over the elements of a tensor, and over the ranks; float64.

    Attributes:
        layers: of each layer the sum of exp_avg_sq.
        columns: of each column.
        parameters: ``[2, parameters]``: of each parameter, and of its squared weights.
    """

    layers: Tensor
    columns: Tensor
    parameters: Tensor

    def to(self, device: torch.device) -> Sums:
        """The same on a device."""
        return Sums(*(vector.to(device) for vector in self))


# ---- one full parameter ------------------------------------------------------------------------------------


def novograd_state(
    name: str,
    state: Mapping[str, Any],
    adam: Mapping[str, Any],
    group: Mapping[str, Any],
    weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """The state of a NovoGrad for one full parameter, from that of an Adam.

    Args:
        name: of the parameter, for messages.
        state: of the parameter: ``exp_avg``, ``exp_avg_sq`` and ``step``, or bitsandbytes' ``state1``...
        adam: Adam's param group: ``betas``, and ``step`` where the state has none.
        group: NovoGrad's param group.
        weight: the parameter; read with ``scale_parameter`` only.

    Returns:
        New tensors: ``exp_avg`` (float32, or float64 as Adam's; not in blocks; absent if beta1 is 0),
        ``exp_avg_sq``, or ``exp_avg_sq_row`` and ``exp_avg_sq_col``, of the shapes of
        ``second_moment.allocate``, and ``step``, where NovoGrad counts steps.

    Raises:
        ValueError: the state is not an Adam's, or not finite, or the options need what it has not.
    """
    check_options(name, group)
    shape = shape_of(name, state)
    p = torch.empty(shape, device="meta") if weight is None else weight
    if group["scale_parameter"] and weight is None:
        raise ValueError(f"{name}: scale_parameter=True multiplies the moment by the weight: give weight")
    target = Target(name, p, unsharded(describe(name, shape, group["granularity"])), group)
    moments = moments_of(name, state, adam, p)
    return _made(target, moments, _checked(name, _sums(target, moments)))


# ---- tensors, sharded or not -------------------------------------------------------------------------------


def converted(
    targets: Sequence[Target], states: Sequence[Mapping[str, Any]], adams: Sequence[Mapping[str, Any]]
) -> list[dict[str, Tensor]]:
    """The states of a NovoGrad for some tensors, from those of an Adam.

    A collective where layers are sharded: one all-reduce for each process group that shards any, and one
    before it to see that the ranks mean the same.

    Args:
        targets: the tensors.
        states: of each the state of Adam, sharded as it is (or full, of a DTensor).
        adams: of each Adam's param group.

    Returns:
        Of each what :func:`novograd_state` returns, of this rank's part; local tensors.

    Raises:
        ValueError: as :func:`novograd_state`; on every rank, if on any.
    """
    error: ValueError | None = None
    moments: list[Moments | None] = []
    for target, state, adam in zip(targets, states, adams, strict=True):
        try:
            check_options(target.name, target.group)
            moments.append(moments_of(target.name, state, adam, target.p))
        except ValueError as found:
            error = error or found
            moments.append(None)
    both = zip(targets, moments, strict=True)
    sums = [_sums(t, m) if m is not None else _no_sums(t.layout, t.p.device) for t, m in both]
    if any(target.layout.reductions for target in targets):
        sums = _completed(targets, sums, error)
    elif error is not None:
        raise error
    made = []
    for target, m, s in zip(targets, moments, sums, strict=True):
        assert m is not None
        made.append(_made(target, m, _checked(target.name, s)))
    return made


def _completed(targets: Sequence[Target], sums: Sequence[Sums], error: ValueError | None) -> list[Sums]:
    """The sums of all ranks; raises on every rank if there is an error on any."""
    placed, layers, columns, parameters = [], 0, 0, 0
    for target in targets:
        at = PlacedLayout(target.layout, layers, first_column=columns, first_parameter=parameters, sums=2)
        placed.append(at)
        layers += target.layout.layers
        columns += target.layout.columns
        parameters += len(target.layout.local_shards)
    device = targets[0].p.device
    plan = Plan(placed, device)
    of_layers, of_columns, of_parameters = zip(*(s.to(device) for s in sums), strict=True)
    vector = torch.cat([*of_layers, *of_columns, torch.cat(of_parameters, dim=1).view(-1)])
    finite, _ = plan.complete(vector, torch.tensor(error is not None, device=device))
    if error is not None:
        raise error
    if not finite and vector.isfinite().all():
        raise ValueError("the state of Adam was refused on another rank, which says why")
    by_layer = torch.split(vector[:layers], [t.layout.layers for t in targets])
    by_column = torch.split(vector[layers : layers + columns], [t.layout.columns for t in targets])
    rest = torch.split(
        vector[layers + columns :].view(2, -1), [len(t.layout.local_shards) for t in targets], dim=1
    )
    parts = zip(by_layer, by_column, rest, targets, strict=True)
    return [Sums(*of_target).to(target.p.device) for *of_target, target in parts]


def check_options(name: str, group: Mapping[str, Any]) -> None:
    """Raise ValueError where NovoGrad needs what no Adam keeps."""
    if group["norm_type"] != 2:
        raise ValueError(
            f"{name}: norm_type=0 averages the largest magnitude of a layer, of which an Adam keeps nothing. "
            "Use norm_type=2"
        )


# ---- the layers --------------------------------------------------------------------------------------------


class _Elements(NamedTuple):
    """The elements start..stop of a tensor, which are of one parameter (an index into
    ``Layout.local_shards``), with the layer of each, and the column of factored ones."""

    start: int
    stop: int
    parameter: int
    layer: Tensor
    column: Tensor | None


def _elements(layout: Layout, device: torch.device) -> Iterator[_Elements]:
    """The elements of a tensor; some at a time."""
    places, columns = layout.places(), layout.column_places()
    for tile in tiles(layout.fragments, device):
        index, positions = tile.fragment.parameter, tile.positions
        shard = layout.local_shards[index]
        size = shard.parameter.layer_numel
        layer = places[index] - shard.first + positions // size
        column = columns[index] + positions % size if shard.columns else None
        yield _Elements(tile.start, tile.stop, index, layer, column)


def _no_sums(layout: Layout, device: torch.device) -> Sums:
    def zeros(*size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, device=device)

    return Sums(zeros(layout.layers), zeros(layout.columns), zeros(2, len(layout.local_shards)))


def _sums(target: Target, moments: Moments) -> Sums:
    """This rank's part."""
    layout, second = target.layout, moments.exp_avg_sq.reshape(-1)
    found, numbers = _no_sums(layout, second.device), layout.numbers()
    weights = local_tensor(target.p).detach().reshape(-1) if target.group["scale_parameter"] else None
    for start, stop, parameter, layer, column in _elements(layout, second.device):
        part = second[start:stop].double()
        found.layers.index_add_(0, layer, part)
        if column is not None:
            found.columns.index_add_(0, column, part)
        found.parameters[0, numbers[parameter]] += part.sum()
        if weights is not None:
            found.parameters[1, numbers[parameter]] += weights[start:stop].double().square().sum()
    return found


def _checked(name: str, sums: Sums) -> Sums:
    if not all(bool(vector.isfinite().all()) for vector in sums) or bool((sums.layers < 0).any()):
        raise ValueError(
            f"exp_avg_sq of {name} is not a finite number of at least 0 everywhere: load an earlier "
            "checkpoint"
        )
    return sums


# ---- the state of NovoGrad ---------------------------------------------------------------------------------


def _made(target: Target, moments: Moments, sums: Sums) -> dict[str, Tensor]:
    """The state of a tensor, from the complete sums of its layers."""
    layout, group, t = target.layout, target.group, moments.step
    averages = _Averages(t, moments.betas, group)
    parameters = [layout.local_shards[i].parameter for i in layout.in_order()]
    counts = torch.tensor(
        [layout.local_shards[i].count for i in layout.in_order()], device=sums.layers.device
    )

    def by_layer(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=counts.device).repeat_interleave(counts)

    factored = by_layer([p.factored for p in parameters]) > 0
    numel = by_layer([p.layer_numel * p.row_shares for p in parameters])
    rows = [p.layers * p.column_shares for p in parameters]
    rows_of_columns = [
        float(shard.parameter.layers * shard.parameter.column_shares)
        for shard in layout.local_shards
        for _ in range(shard.columns)
    ]
    v = (torch.where(factored, sums.layers / numel, sums.layers) * averages.of_squares).float()
    c = sums.columns / torch.tensor(rows_of_columns, dtype=torch.float64, device=counts.device)
    c = (c * averages.of_squares).float()
    state = _second_moments(target, v, c)
    if counts_steps(group):
        seen = sums.parameters[0] if counts_once(group["granularity"]) else v
        state["step"] = torch.where(seen > 0, float(t), 0.0).float()
    if group["betas"][0] != 0:
        mean = (sums.parameters[0] * averages.of_squares).repeat_interleave(counts) / numel / by_layer(rows)
        divided = v.double() * averages.correction
        if group["normalize"] == "rms":
            divided = torch.where(factored, divided / mean, divided / numel)
        root = torch.where(v > 0, divided.sqrt(), 0.0)
        times = averages.of_gradients * _update_scale(target, sums.parameters[1], averages)
        state["exp_avg"] = _first_moment(target, moments, root, c.double().sqrt(), times)
    return state


class _Averages:
    """What NovoGrad's running averages are over Adam's, t steps after their start.

    Attributes:
        of_squares: v over the sums of exp_avg_sq.
        of_gradients: m over exp_avg, had the gradients not been divided by anything.
        correction: what the step multiplies v by.
        last: the last S over v, if all S have been the same.
    """

    def __init__(self, t: int, adam: tuple[float, float], group: Mapping[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        of_v = 1 - beta2**t if group["init_zero"] else 1.0
        of_m = (1 - beta1**t) / (1.0 if group["grad_averaging"] else 1 - beta1)
        self.of_squares = of_v / (1 - adam[1] ** t) if t > 0 else 0.0
        self.of_gradients = of_m / (1 - adam[0] ** t) if t > 0 else 0.0
        self.correction = 1 / (1 - beta2**t) if group["bias_correction"] and t > 0 else 1.0
        self.last = 1 / (of_v * self.correction) if t > 0 else 0.0


def _update_scale(target: Target, squares_of_weights: Tensor, averages: _Averages) -> Tensor:
    """What each parameter's normalised gradient was multiplied by."""
    group = target.group
    parameters = [target.layout.local_shards[i].parameter for i in target.layout.in_order()]
    scale = torch.ones_like(squares_of_weights)
    if group["clip_threshold"] is not None:
        numel = [p.layer_numel * p.row_shares if group["normalize"] == "norm" else 1 for p in parameters]
        mean_square = averages.last / torch.tensor(numel, dtype=torch.float64, device=scale.device)
        scale = scale / (mean_square.sqrt() / group["clip_threshold"]).clamp(min=1)
    if group["scale_parameter"]:
        sizes = [p.numel * p.row_shares * p.column_shares for p in parameters]
        mean = squares_of_weights / torch.tensor(sizes, dtype=torch.float64, device=scale.device)
        scale = scale * mean.sqrt().clamp(min=LEAST_SCALE)
    return scale


def _second_moments(target: Target, v: Tensor, c: Tensor) -> dict[str, Tensor]:
    layout, shape = target.layout, target.p.shape
    plain = layout.layers - layout.rows
    state = {"exp_avg_sq": v[:plain]} if plain or not layout.columns else {}
    if layout.columns:
        rows = v[plain:]
        if len(layout.local_shards) == 1 and len(shape) > 1 and not isinstance(target.p, DTensor):
            split = matrix_dimensions(shape)
            rows, c = rows.view(shape[:split]), c.view(shape[split:])
        state |= {"exp_avg_sq_row": rows, "exp_avg_sq_col": c}
    return state


def _first_moment(
    target: Target, moments: Moments, root: Tensor, column_root: Tensor, times: Tensor
) -> Tensor:
    """Adam's, divided by the roots (0 of a layer that has seen no gradient), times that of its parameter."""
    group, numbers, first = target.group, target.layout.numbers(), moments.exp_avg.reshape(-1)
    made = torch.zeros(
        first.shape, dtype=torch.promote_types(first.dtype, torch.float32), device=first.device
    )
    for start, stop, parameter, layer, column in _elements(target.layout, first.device):
        part = first[start:stop].double() * times[numbers[parameter]]
        if group["reg_inside_moment"]:
            divisor = root[layer] if column is None else root[layer] * column_root[column]
            part = torch.where(divisor > 0, part / (divisor + group["eps"]), 0.0)
        made[start:stop] = part
    return made.view(moments.exp_avg.shape)
