"""What a step needs to know of its tensors: built once, and reused while they stay where they are.

One way down: the layouts make a plan; the plan and the state's addresses make the tables of the kernels; and
what may change from step to step, the options' numbers and where the gradients are, is given to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from novoscale import kernels
from novoscale.kernels import Coefficients, Kernels, LayerKernels, ShardTensors, VectorSizes
from novoscale.kernels.interface import AdvanceInputs, States
from novoscale.kernels.layers import LR, WEIGHTS, OptionTable
from novoscale.optimizer.layer_table import Absent, Group, Groups, State, states_of, table_of_layers
from novoscale.optimizer.step_plan import STRUCTURE, AbsentLayout, Mode, plan, plan_key
from novoscale.optimizer.telemetry import Telemetry
from novoscale.sharding.dtensors import local_gradients, local_tensor, local_tensors
from novoscale.sharding.layers import layer_matrix
from novoscale.sharding.layout import Layout
from novoscale.sharding.placed import Packing, PlacedLayout
from novoscale.sharding.plan import Plan
from novoscale.state import momentum
from novoscale.state.second_moment import DIRECTION_AVG_SQ


@dataclass
class StepTables:
    """Tables for a set of tensors that is stepped together. Keeps no tensor alive beyond a step.

    Attributes:
        plan: which layers have to be completed over which process groups.
        plan_key: what the plan depends on, see :func:`plan_key`.
        kernels: both passes over the elements.
        weights: the first of them over the weights, where ``scale_parameter`` asks for their norms.
        layers: the pass over the layers between them.
        options: of the param groups, on the device.
        shards: of each shard of the kernels, which tensor it is, and the name of its first moment.
        weighed: of each shard of ``weights``, which tensor it is.
        dependencies: what the tables depend on, see :func:`dependencies`.
        addresses: where they have the gradients.
        packing: of the only collective of a step, if there is just one.
        clips_updates: whether a param group has ``clip_threshold``.
        captured: whether a CUDA graph has them, which reads them whenever it is replayed.
        gradients: of the present step: some may be copies that nobody else holds.
    """

    plan: Plan
    plan_key: tuple[Any, ...]
    kernels: Kernels
    weights: Kernels | None
    layers: LayerKernels
    options: OptionTable
    shards: list[tuple[int, str]]
    weighed: list[int]
    dependencies: list[Any]
    addresses: list[int]
    packing: Packing | None
    clips_updates: bool
    captured: bool = False
    gradients: Sequence[Tensor] = ()

    def serves(self, tensors: StepTensors) -> bool:
        """Whether the tables are right for the coming step, once they :meth:`hold` its tensors."""
        return self.dependencies == tensors.dependencies and not (self.captured and self._differs(tensors))

    def _differs(self, tensors: StepTensors) -> bool:
        """Whether something has to be written into the tables."""
        return self.addresses != tensors.addresses or self.options.differs(tensors.options)

    def hold(self, tensors: StepTensors) -> None:
        """Take what a step has of its own: where the gradients are, and the numbers among the options."""
        self.gradients = tensors.gradients
        self.options.take(tensors.options)
        if self.addresses != tensors.addresses:
            self.addresses = tensors.addresses
            self.kernels.move_gradients([tensors.addresses[tensor] for tensor, _ in self.shards])
        self.layers.hold(tensors.states)
        self.kernels.hold(lambda shard: tensors.of(*self.shards[shard]))
        if self.weights is not None:
            self.weights.hold(lambda shard: tensors.weights(self.weighed[shard]))

    def statistic(self, scale: Tensor | None) -> Tensor:
        """This rank's part of the vector of the step: see ``plan.Plan``."""
        statistic = self.kernels.sum_of_squares(self.plan.numbers * self.plan.parameters)
        if self.weights is not None:
            first = self.plan.layers + self.plan.columns + WEIGHTS * self.plan.parameters
            statistic[first : first + self.plan.parameters] = self.weights.sum_of_squares()
        self.layers.begin(self.options, statistic, scale)
        return statistic

    def complete(self, statistic: Tensor, veto: Tensor | None, telemetry: Telemetry) -> tuple[Tensor, Tensor]:
        """See ``plan.Plan.complete``; and note what the step shows."""
        plan = self.plan
        if self.layers.completes and not plan.per_parameter and (self.packing or not plan.collectives):
            skipped = telemetry.skipped(plan)
            finite, total = self.layers.complete(
                self.options, statistic, veto, self.packing, plan.noted, skipped, telemetry.step
            )
        else:
            finite, total = plan.complete(statistic, veto)
            telemetry.record(plan, statistic, finite)
        telemetry.add(total)
        return finite, total

    def second_moments(
        self, statistic: Tensor, finite: Tensor, total: Tensor, scale: Tensor | None
    ) -> Coefficients:
        """Update v of every layer; return what the update of m and w needs to know of it.

        Args:
            statistic: the complete vector of the step.
            finite: bool: whether there is a step at all; 0-dim, or one for each parameter.
            total: 0-dim: the sum of squares of the whole model.
            scale: 0-dim: of the loss; None: 1.
        """
        share = self.plan.share
        made = self.layers.advance(AdvanceInputs(self.options, statistic, finite, total, scale, share))
        made = replace(made, lr=self.options.table[:, LR])
        if self.plan.shares and not self.clips_updates:  # other ranks have tensors that are
            share(statistic.new_zeros(self.plan.parameters))
        return made

    def update(self, coefficients: Coefficients) -> None:
        """Change m and w of every active layer. The ranks first agree on the scales of sharded blocks."""
        if self.plan.sharded_blocks:
            largest = self.kernels.largest(coefficients)
            coefficients = replace(coefficients, sharded=self.plan.agree_on_blocks(largest))
        self.kernels.update(coefficients)

    def release(self) -> None:
        """Free tensors, at the end of a step."""
        self.gradients = ()
        self.layers.release()
        self.kernels.release()
        if self.weights is not None:
            self.weights.release()


class StepTensors:
    """The tensors of a step: this rank's parts of them.

    Args:
        groups: the tensors, by param group.
        state: of the optimizer.

    Attributes:
        groups: as given.
        params: local parts, in order.
        gradients: local parts; each in the order of its parameter, if need be by a copy for this step.
        addresses: of the gradients.
        own: the state of each.
        dependencies: see :func:`dependencies`.

    Raises:
        RuntimeError: a gradient is not dense.
    """

    def __init__(self, groups: Groups, state: State) -> None:
        self.groups = groups
        members = [p for _, params in groups for p in params]
        self.params = local_tensors(members)
        self.gradients = local_gradients(members)
        self.contiguous = [*map(Tensor.is_contiguous, self.params)]
        self._in_one_order()
        self.addresses = [*map(Tensor.data_ptr, self.gradients)]
        self.look_up(state)

    def look_up(self, state: State) -> None:
        """Find the state of each tensor, and what the tables depend on."""
        self.own = [state.get(p, {}) for _, params in self.groups for p in params]
        self.dependencies = dependencies(self)

    def _in_one_order(self) -> None:
        """Copy a gradient in the order of its parameter, if it has another: expanded, or channels_last."""
        plain = [*map(Tensor.is_contiguous, self.gradients)]
        if all(plain) and all(self.contiguous):
            return
        self.gradients = [*self.gradients]
        for i, (p, g) in enumerate(zip(self.params, self.gradients, strict=True)):
            if not (plain[i] and self.contiguous[i]) and g.stride() != p.stride():
                like = torch.empty_like(p, dtype=g.dtype)
                if like.stride() == p.stride():  # it has no gaps
                    self.gradients[i] = like.copy_(g)

    @property
    def options(self) -> list[Group]:
        """Of each param group."""
        return [group for group, _ in self.groups]

    def states(self) -> States:
        """The second moments and counts of steps."""
        return states_of(self.own)

    def of(self, tensor: int, name: str) -> ShardTensors:
        """What a shard is made of: a tensor, and its first moment of this name, if it has one."""
        own = self.own[tensor]
        exp_avg, scale = own.get(name), own.get("exp_avg_scale") if name == "exp_avg" else None
        moments = (
            None if t is None else local_tensor(t) for t in (exp_avg, scale, own.get(DIRECTION_AVG_SQ))
        )
        return ShardTensors(self.params[tensor], self.gradients[tensor], *moments)

    def weights(self, tensor: int) -> ShardTensors:
        """The same for a statistic of the weights."""
        return ShardTensors(self.params[tensor], self.params[tensor])


def dependencies(tensors: StepTensors) -> list[Any]:
    """What tables depend on: the structure that the options ask for, and where all lies but the gradients."""
    found: list[Any] = [structure(group) for group in tensors.options]
    found += tensors.contiguous
    if not all(tensors.contiguous):
        found += map(Tensor.stride, tensors.params)
        found += map(Tensor.stride, tensors.gradients)
    # Other tensors may come to lie at the same address.
    found += map(Tensor.numel, tensors.params)
    found += [p.dtype for p in tensors.params]
    found += [g.dtype for g in tensors.gradients]
    found += map(Tensor.data_ptr, tensors.params)
    states = [value for own in tensors.own for value in own.values()]
    if not all(issubclass(kind, Tensor) for kind in set(map(type, states))):  # a user's own
        states = [value for value in states if isinstance(value, Tensor)]
    found += map(Tensor.data_ptr, local_tensors(states))
    return found


def structure(group: Group) -> tuple[Any, ...]:
    """What the tables depend on of a param group's options: of the numbers, which of them are zero."""
    numbers = (group["betas"][0], group["weight_decay"], group["clip_threshold"], group["max_grad_norm"])
    return (*map(bool, numbers), *(group[option] for option in STRUCTURE))


def build(
    tensors: StepTensors,
    layouts: Sequence[Sequence[Layout]],
    absent: Sequence[AbsentLayout],
    before: StepTables | None,
    mode: Mode,
) -> StepTables:
    """Make the tables of a set of tensors.

    Args:
        tensors: they have a state.
        layouts: of each tensor, by param group.
        absent: the DTensors without a gradient here.
        before: what was made for the same tensors earlier.
        mode: how they are stepped.
    """
    groups, device = tensors.groups, tensors.params[0].device
    # The ranks compare their layers when a plan is made: not again when a tensor has moved.
    wanted = plan_key([*tensors.options, *(missing.group for missing in absent)], mode)
    planned = (
        before.plan if before and before.plan_key == wanted else plan(groups, layouts, absent, device, mode)
    )
    made, named = shards(tensors, planned.placed)
    weighed = of_weights(groups, planned.placed, made, named)
    table = table_of_layers(groups, layouts, tensors.own)
    of_layers = kernels.layer_kernels(table, device, tensors.states(), made)
    sizes = VectorSizes(planned.layers, planned.columns, planned.sharded_blocks)
    return StepTables(
        plan=planned,
        plan_key=wanted,
        kernels=Kernels(made, device, sizes),
        weights=Kernels([*weighed.values()], device, VectorSizes(planned.parameters)) if weighed else None,
        layers=of_layers,
        options=OptionTable(len(groups), device, table.dtype),
        shards=named,
        weighed=[*weighed],
        dependencies=tensors.dependencies,
        addresses=tensors.addresses,
        packing=planned.packing() if of_layers.completes else None,
        clips_updates=any(group["clip_threshold"] for group in tensors.options),
    )


def tables_key(groups: Groups, absent: Absent, per_parameter: bool) -> tuple[Any, ...]:
    """Which tensors are stepped, and what their statistic is. Tensors by id: no reference is kept."""
    stepped = ((group["norm_type"], *map(id, params)) for group, params in groups)
    return (per_parameter, *stepped, *((group["norm_type"], -id(p)) for group, p in absent))


def shards(
    tensors: StepTensors, placed: Sequence[PlacedLayout]
) -> tuple[list[kernels.Shard], list[tuple[int, str]]]:
    """Make the tensors of a step known to the kernels.

    Returns:
        The shards, and of each which tensor it is, and the name of its first moment.
    """
    made: list[kernels.Shard] = []
    named: list[tuple[int, str]] = []
    tensor = 0
    for index, (group, params) in enumerate(tensors.groups):
        has_moment = group["betas"][0] != 0
        for _ in params:
            at = placed[tensor]
            for part in momentum.stored(at.layout, group["momentum_dtype"] if has_moment else "float32"):
                name = part.key if has_moment else ""
                pieces = momentum.pieces(
                    at.layout, part, at.first, at.first_column, at.sharded_blocks, at.first_block
                )
                made.append(
                    kernels.Shard(
                        **tensors.of(tensor, name)._asdict(),
                        pieces=pieces,
                        norm_type=group["norm_type"],
                        group=index,
                        decays=group["weight_decay"] != 0,
                        reg_inside_moment=group["reg_inside_moment"],
                        stochastic_rounding=group["stochastic_rounding"],
                        fused=False if group["foreach"] else group["fused"],
                        nesterov=group["nesterov"] and has_moment,
                        matrices=_matrices(group, at.layout),
                    )
                )
                named.append((tensor, name))
            tensor += 1
    return made, named


def _matrices(group: Group, layout: Layout) -> kernels.Matrices | None:
    """How the layers of a full parameter are made orthogonal, if they are."""
    if not group["orthogonalize"]:
        return None
    return kernels.Matrices(*layer_matrix(layout.local_shards[0].parameter), group["ns_steps"])


def of_weights(
    groups: Groups,
    placed: Sequence[PlacedLayout],
    made: Sequence[kernels.Shard],
    named: Sequence[tuple[int, str]],
) -> dict[int, kernels.Shard]:
    """Shards whose statistic is the sum of squares of the weights of each parameter; by tensor."""
    scaled = [group["scale_parameter"] for group, params in groups for _ in params]
    shown: dict[int, kernels.Shard] = {}
    for shard, (tensor, _) in zip(made, named, strict=True):
        if scaled[tensor] and tensor not in shown:
            at = placed[tensor]
            one = at.layout.by_parameter()
            shown[tensor] = replace(
                shard,
                grad=shard.param,
                exp_avg=None,
                exp_avg_scale=None,
                nesterov=False,  # which needs a first moment
                matrices=None,
                direction_avg_sq=None,
                pieces=momentum.pieces(one, momentum.stored(one, "float32")[0], at.first_parameter),
            )
    return shown
