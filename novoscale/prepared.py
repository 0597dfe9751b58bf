"""What a step needs to know of its tensors: built once, and reused while they stay where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from novoscale import kernels, momentum, rounding, second_moment
from novoscale.blocks import NONE
from novoscale.collectives import Placed, Plan
from novoscale.dtensors import local_gradient
from novoscale.kernels import Coefficients, Kernels
from novoscale.layer_tables import Groups, Kept, State, has_dtensors, layers_of_group, rounds
from novoscale.layout import Layout, local_tensor
from novoscale.second_moment import Layers

# Options of a param group that the tables contain.
OPTIONS = (
    "betas",
    "weight_decay",
    "bias_correction",
    "grad_averaging",
    "reg_inside_moment",
    "momentum_dtype",
    "granularity",
    "stochastic_rounding",
    "fused",
    "foreach",
    "eps",
    "nesterov",
    "clip_threshold",
    "scale_parameter",
)

# Those on which the ranks that share a layer must agree.
SHARED = (
    *(option for option in OPTIONS if option not in ("fused", "foreach")),
    *("lr", "norm_type", "normalize", "init_zero", "max_grad_norm", "maximize", "seed"),
)


@dataclass
class Prepared:
    """Tables for a set of tensors that is stepped together. Keeps no tensor alive beyond a step.

    Attributes:
        plan: which layers have to be completed over which process groups.
        agreed: what it rests on, see :func:`agreed`.
        kernels: both passes over the elements.
        weights: the first of them over the weights, where ``scale_parameter`` asks for their norms.
        layers: of each param group; its vectors are the state of its tensors, see :class:`Kept`.
        kept: where that state is.
        rounds: for each param group, whether anything in it is rounded stochastically.
        tensors: of each shard of the kernels, which tensor it is; most tensors are one shard.
        first_layout: id of the layout of the first tensor.
        gradients: of the present step, in the order of the tensors.
        addresses: where the tables have the gradients.
        facts: what else the tables rest on, see :func:`facts`; empty if they serve one step only.
    """

    plan: Plan
    agreed: list[Any]
    kernels: Kernels
    weights: Kernels | None
    layers: list[Layers]
    kept: list[Kept]
    rounds: list[bool]
    tensors: list[int]
    first_layout: int
    gradients: list[Tensor]
    addresses: list[int]
    facts: list[Any]

    def serves(self, groups: Groups, gradients: list[Tensor], state: State) -> bool:
        """Whether the tables are right for the coming step. Gradients may have moved: that is mended."""
        try:
            if not self.facts or self.facts != facts(groups, gradients, state):
                return False
        except RuntimeError:  # a gradient without an address is sparse: for checks to say
            return False
        for kept in self.kept:
            kept.gather()
        self.gradients, addresses = gradients, _addresses(gradients)
        if addresses != self.addresses:
            self.addresses = addresses
            self.kernels.moved([addresses[tensor] for tensor in self.tensors])
        return True

    def statistic(self, groups: Groups, inverse_scale: Tensor | None) -> Tensor:
        """This rank's part of the vector of the step: see ``collectives.Plan``."""
        statistic = self.kernels.sum_of_squares()
        if inverse_scale is not None:
            for (group, _), (S, of_columns, _) in zip(groups, self.by_group(statistic), strict=True):
                of_statistic = second_moment.power(inverse_scale, group)
                S.mul_(of_statistic)
                of_columns.mul_(of_statistic)
        if not self.plan.numbers:
            return statistic
        numbers = statistic.new_zeros(self.plan.numbers, self.plan.parameters)
        if self.weights is not None:
            numbers[second_moment.WEIGHTS] = self.weights.sum_of_squares()
        statistic = torch.cat((statistic, numbers.view(-1)))
        rows = zip(groups, self.layers, self.by_group(statistic), strict=True)
        for (group, _), layers, (S, _, totals) in rows:
            if second_moment.adds_up(group):
                totals[: second_moment.WEIGHTS] = second_moment.sums(layers, S, group)
        return statistic

    def second_moments(
        self,
        groups: Groups,
        statistic: Tensor,
        finite: Tensor,
        clip: Tensor | None,
        inverse_scale: Tensor | None,
    ) -> Coefficients:
        """Update v of every layer; return what the update of m and w needs to know of it.

        Args:
            groups: the tensors, by param group.
            statistic: the complete vector of the step.
            finite: bool: whether there is a step at all; 0-dim, or one for each parameter.
            clip: 0-dim: what clipping multiplies the gradients by; None: nothing.
            inverse_scale: the same of a loss scale.
        """
        scale = clip if inverse_scale is None else inverse_scale if clip is None else clip * inverse_scale
        steps = []
        if finite.ndim and finite.device.type == "cpu" and bool(finite.all()):
            finite = finite.all()  # which a GPU would have to be asked for
        counts = [len(layers.here) for layers in self.layers]
        verdicts = torch.split(finite, counts) if finite.ndim else [finite] * len(counts)
        given = zip(groups, self.layers, self.by_group(statistic), verdicts, strict=True)
        for (group, _), layers, sums, verdict in given:
            S, of_columns, totals = sums if clip is None else second_moment.clipped(*sums, clip, group)
            active = second_moment.advance(layers, S, of_columns, totals, verdict, group)
            steps.append((S, totals, active))
        parts = []
        rows = zip(groups, self.layers, steps, self._mean_square_updates(groups, steps), strict=True)
        for index, ((group, _), layers, (_, totals, active), mean_square) in enumerate(rows):
            factor = second_moment.update_scale(layers, totals, mean_square, group)
            found = second_moment.coefficients(layers, totals, scale, factor, group)
            parts.append((found, active, self.keys(index, group["seed"])))
        return second_moment.of_all(parts, [group for group, _ in groups])

    def update(self, coefficients: Coefficients) -> None:
        """Change m and w of every active layer. The ranks first agree on the scales of cut blocks."""
        if self.plan.cut_blocks:
            largest = self.kernels.largest(coefficients)
            coefficients = replace(coefficients, cut=self.plan.agree_on_blocks(largest))
        self.kernels.update(coefficients)

    def _mean_square_updates(
        self, groups: Groups, steps: Sequence[tuple[Tensor, Tensor, Tensor]]
    ) -> list[Tensor | None]:
        """For each param group rms(u)**2 of its parameters, where its ``clip_threshold`` asks for it.

        A second collective where a parameter's layers are on different ranks: their second moments are known
        after the first only.
        """
        rows = zip(groups, self.layers, steps, strict=True)
        found = [
            second_moment.mean_square_update(layers, S, active, group) if group["clip_threshold"] else None
            for (group, _), layers, (S, _, active) in rows
        ]
        if all(part is None for part in found):
            return found
        counts = [len(layers.here) for layers in self.layers]
        none = torch.zeros(0, dtype=torch.float64, device=self.plan.device)
        parts = [none.new_zeros(n) if part is None else part for part, n in zip(found, counts, strict=True)]
        shared = torch.split(self.plan.share(torch.cat(parts)), counts)
        return [None if part is None else whole for part, whole in zip(found, shared, strict=True)]

    def by_group(self, vector: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The parts of the vector of the step that belong to each param group: views.

        One element for each layer; for each column; and, for each parameter, the columns of a matrix.
        """
        counts = [(len(x.v), 0 if x.columns is None else len(x.columns), len(x.here)) for x in self.layers]
        layers, columns, parameters = ([*n] for n in zip(*counts, strict=True))
        first = self.plan.layers + self.plan.columns
        rows = self.plan.numbers if len(vector) == first + self.plan.numbers * self.plan.parameters else 0
        numbers = vector[first:].view(rows, self.plan.parameters)
        return list(
            zip(
                torch.split(vector[: self.plan.layers], layers),
                torch.split(vector[self.plan.layers : first], columns),
                torch.split(numbers, parameters, dim=1),
                strict=True,
            )
        )

    def keys(self, group: int, seed: int) -> Tensor:
        """What random bits each layer of a param group has in this step: see ``rounding.keys``."""
        layers = self.layers[group]
        if layers.t is None or not self.rounds[group]:
            return torch.zeros_like(layers.v, dtype=torch.int64)
        return rounding.keys(seed, layers.by_layer(layers.number), layers.by_count(layers.t).long())

    def release(self) -> None:
        """Put the state back where it is kept, and let go of tensors, at the end of a step."""
        for kept in self.kept:
            kept.put_back()
        self.gradients = []
        self.kernels.release()
        if self.weights is not None:
            self.weights.release()


def build(
    groups: Groups,
    layouts: Sequence[Sequence[Layout]],
    gradients: list[Tensor],
    state: State,
    before: Prepared | None,
    apart: bool = False,
) -> Prepared:
    """Make the tables of a set of tensors.

    Args:
        groups: the tensors, by param group.
        layouts: of each tensor.
        gradients: see :func:`local_gradients`.
        state: of the optimizer, which has one for every tensor; see :class:`Kept`.
        before: what was made for the same tensors earlier.
        apart: see ``collectives.Plan``.
    """
    device = local_tensor(groups[0][1][0]).device
    kept = [Kept(group, params, state, device) for group, params in groups]
    known = zip(groups, layouts, kept, strict=True)
    layers = [layers_of_group(group, of_group, k, device) for (group, _), of_group, k in known]
    # The ranks compare their layers when a plan is made: not again when a tensor has moved.
    rests_on = agreed(groups, apart)
    planned = before.plan if before and before.agreed == rests_on else plan(groups, layouts, device, apart)
    made, tensors = shards(groups, planned.placed, gradients, state)
    columns = sum(len(x.columns) for x in layers if x.columns is not None)
    tables = Kernels(made, device, sum(len(x.v) for x in layers), columns, planned.cut_blocks)
    weights = None
    if any(group["scale_parameter"] for group, _ in groups):
        parameters = sum(len(x.here) for x in layers)
        weights = Kernels(of_weights(groups, planned.placed, made, tensors), device, parameters)
    reusable = tables.reusable and (weights is None or weights.reusable)
    return Prepared(
        plan=planned,
        agreed=rests_on,
        kernels=tables,
        weights=weights,
        layers=layers,
        kept=kept,
        rounds=[rounds(group) for group, _ in groups],
        tensors=tensors,
        first_layout=id(layouts[0][0]),
        gradients=gradients,
        addresses=_addresses(gradients) if reusable else [],
        facts=facts(groups, gradients, state) if reusable else [],
    )


def key(groups: Groups, apart: bool) -> tuple[Any, ...]:
    """Which tensors are stepped, and what their statistic is. Tensors by id: no reference is kept."""
    return (apart, *((group["norm_type"], *map(id, params)) for group, params in groups))


def local_gradients(groups: Groups) -> list[Tensor]:
    """This rank's part of the gradient of every tensor, in order. A collective for those to redistribute."""
    params = [p for _, members in groups for p in members]
    if has_dtensors(params):
        return [*map(local_gradient, params)]
    return [p.grad for p in params]  # type: ignore[misc]


def facts(groups: Groups, gradients: list[Tensor], state: State) -> list[Any]:
    """What tables rest on, beside the addresses of the gradients: options, and where all else lies.

    Raises:
        RuntimeError: a gradient is not dense.
    """
    found: list[Any] = [group[name] for group, _ in groups for name in OPTIONS]
    for _, params in groups:
        found += _addresses(params)
        # Other tensors may come to lie at the same address.
        found += map(Tensor.numel, params)
        found += [p.dtype for p in params]
    found += [g.dtype for g in gradients]
    found += map(Tensor.is_contiguous, gradients)
    states = [state[p] for _, params in groups for p in params if p in state]
    found += _addresses([t for s in states for t in s.values() if isinstance(t, Tensor)])
    return found


def _addresses(tensors: list[Any]) -> list[int]:
    # Once a step for each tensor: for 1,000 layers this is most of the step's time.
    if has_dtensors(tensors):
        tensors = [*map(local_tensor, tensors)]
    return [*map(Tensor.data_ptr, tensors)]


def shards(
    groups: Groups, placed: Sequence[Placed], gradients: Sequence[Tensor], state: State
) -> tuple[list[kernels.Shard], list[int]]:
    """Make the tensors of a step known to the kernels.

    Returns:
        The shards, and which tensor each of them is.
    """
    made: list[kernels.Shard] = []
    tensors: list[int] = []
    tensor = 0
    for index, (group, params) in enumerate(groups):
        beta1 = group["betas"][0]
        for p in params:
            at = placed[tensor]
            for part in momentum.stored(at.layout, group["momentum_dtype"] if beta1 != 0 else "float32"):
                scale = state[p].get("exp_avg_scale") if part.in_blocks else None
                pieces = momentum.pieces(
                    at.layout, part, at.first, at.first_column, at.cut_blocks, at.first_block
                )
                made.append(
                    kernels.Shard(
                        param=local_tensor(p),
                        grad=gradients[tensor],
                        exp_avg=local_tensor(state[p][part.key]) if beta1 != 0 else None,
                        exp_avg_scale=None if scale is None else local_tensor(scale),
                        pieces=pieces,
                        norm_type=group["norm_type"],
                        group=index,
                        decays=group["weight_decay"] != 0,
                        reg_inside_moment=group["reg_inside_moment"],
                        stochastic_rounding=group["stochastic_rounding"],
                        fused=False if group["foreach"] else group["fused"],
                        nesterov=group["nesterov"] and beta1 != 0,
                    )
                )
                tensors.append(tensor)
            tensor += 1
    return made, tensors


def of_weights(
    groups: Groups, placed: Sequence[Placed], made: Sequence[kernels.Shard], tensors: Sequence[int]
) -> list[kernels.Shard]:
    """Shards whose statistic is the sum of squares of the weights of each parameter."""
    scaled = [group["scale_parameter"] for group, params in groups for _ in params]
    shown: dict[int, kernels.Shard] = {}
    for shard, tensor in zip(made, tensors, strict=True):
        if scaled[tensor] and tensor not in shown:
            at = placed[tensor]
            one = at.layout.by_parameter()
            shown[tensor] = replace(
                shard,
                grad=shard.param,
                exp_avg=None,
                exp_avg_scale=None,
                nesterov=False,  # which needs a first moment
                pieces=momentum.pieces(one, momentum.stored(one, "float32")[0], at.first_parameter),
            )
    return list(shown.values())


def plan(
    groups: Groups, layouts: Sequence[Sequence[Layout]], device: torch.device, apart: bool = False
) -> Plan:
    """The plan of the layers of a step."""
    ops = {2: dist.ReduceOp.SUM, 0: dist.ReduceOp.MAX}
    placed = []
    first = column = parameter = block = 0
    for (group, _), known in zip(groups, layouts, strict=True):
        for layout in known:
            cut_blocks = layout.cut_blocks() if momentum.in_blocks(group) else NONE
            op = ops[group["norm_type"]]
            placed.append(Placed(layout, first, op, column, parameter, block, cut_blocks))
            first += layout.layers
            column += layout.columns
            parameter += len(layout.held)
            block += len(cut_blocks)
    return Plan(placed, device, sums(groups), apart, _options(groups))


def _options(groups: Groups) -> dict[str, str]:
    """The options on which ranks must agree, as they are written; those of param groups one after another."""
    return {name: " and ".join(_written(group[name]) for group, _ in groups) for name in SHARED}


def _written(value: Any) -> str:
    if isinstance(value, Tensor):  # to read it would wait for the device
        return "a tensor"
    return repr(tuple(value) if isinstance(value, list) else value)


def agreed(groups: Groups, apart: bool) -> list[Any]:
    """What a plan rests on, beside the tensors."""
    return [apart, sums(groups), *(momentum.in_blocks(group) for group, _ in groups)]


def sums(groups: Groups) -> int:
    """How many numbers of each parameter the ranks add up in a step."""
    return second_moment.SUMS if any(second_moment.adds_up(group) for group, _ in groups) else 0
