"""What a step needs to know of its tensors: built once, and reused while they stay where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from novoscale import kernels, momentum, rounding
from novoscale.layout import Layout, from_local, local_gradient, local_tensor
from novoscale.plan import Placed, Plan

Group = dict[str, Any]
Groups = list[tuple[Group, list[Tensor]]]  # the tensors to step, by param group
State = Mapping[Tensor, dict[str, Any]]

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
)

COUNT, NUMEL, NUMBER = 0, 1, 2  # the columns of Prepared.parameters


@dataclass
class Prepared:
    """Tables for a set of tensors that is stepped together. Keeps no tensor alive beyond a step.

    Attributes:
        plan: which layers have to be completed over which process groups.
        kernels: both passes over the elements.
        second_moments: for each param group v of all its layers, float32; the ``exp_avg_sq`` of its tensors
            are views of it, so that a step need not gather them.
        steps: the same of ``step``, where the group has one.
        parameters: for each param group, of each parameter: int64 ``[parameters, 3]``, how many of its layers
            are here, their elements each, and its number.
        rounds: for each param group, whether anything in it is rounded stochastically.
        tensors: of each shard of the kernels, which tensor it is; most tensors are one shard.
        first_layout: id of the layout of the first tensor.
        gradients: of the present step, in the order of the tensors.
        addresses: where the tables have the gradients.
        facts: what else the tables rest on, see :func:`facts`; empty if they serve one step only.
    """

    plan: Plan
    kernels: kernels.Kernels
    second_moments: list[Tensor]
    steps: list[Tensor | None]
    parameters: list[Tensor]
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
        self.gradients, addresses = gradients, _addresses(gradients)
        if addresses != self.addresses:
            self.addresses = addresses
            self.kernels.moved([addresses[tensor] for tensor in self.tensors])
        return True

    def by_group(self, vector: Tensor) -> Sequence[Tensor]:
        """The parts of a vector with one element per layer that belong to each param group."""
        return torch.split(vector, [len(v) for v in self.second_moments])

    def by_layer(self, group: int, column: int) -> Tensor:
        """A column of ``parameters`` with one element per layer of the group."""
        table = self.parameters[group]
        layers = len(self.second_moments[group])
        return torch.repeat_interleave(table[:, column], table[:, COUNT], output_size=layers)

    def keys(self, group: int, seed: int) -> Tensor:
        """What random bits each layer of a param group has in this step: see ``rounding.keys``."""
        t = self.steps[group]
        if t is None or not self.rounds[group]:
            return torch.zeros_like(self.second_moments[group], dtype=torch.int64)
        return rounding.keys(seed, self.by_layer(group, NUMBER), t.long())

    def unscale(self, statistic: Tensor, groups: Groups, inverse_scale: Tensor) -> None:
        """Make the statistic of scaled gradients that of the gradients, in place."""
        for (group, _), S in zip(groups, self.by_group(statistic), strict=True):
            S.mul_(inverse_scale if group["norm_type"] == 0 else inverse_scale.square())

    def release(self) -> None:
        """Let go of tensors, at the end of a step."""
        self.gradients = []
        self.kernels.release()


def build(
    groups: Groups,
    layouts: Sequence[Sequence[Layout]],
    gradients: list[Tensor],
    state: State,
    before: Prepared | None,
) -> Prepared:
    """Make the tables of a set of tensors.

    Args:
        groups: the tensors, by param group.
        layouts: of each tensor.
        gradients: see :func:`local_gradients`.
        state: of the optimizer, which has one for every tensor; see :func:`join`.
        before: what was made for the same tensors earlier.
    """
    device = local_tensor(groups[0][1][0]).device
    second_moments = [join(params, state, "exp_avg_sq", device) for _, params in groups]
    steps = [join(params, state, "step", device) if counts_steps(group) else None for group, params in groups]
    made, tensors = shards(groups, layouts, gradients, state)
    tables = kernels.Kernels(made, device, sum(map(len, second_moments)))
    held = [[h for layout in known for h in layout.held] for known in layouts]
    rows = [[(h.count, h.parameter.layer_numel, h.parameter.number) for h in group] for group in held]
    return Prepared(
        # The ranks compare their layers when a plan is made: not again when a tensor has moved.
        plan=plan(groups, layouts, device) if before is None else before.plan,
        kernels=tables,
        second_moments=second_moments,
        steps=steps,
        parameters=[torch.tensor(r, dtype=torch.int64, device=device).view(-1, 3) for r in rows],
        rounds=[rounds(group) for group, _ in groups],
        tensors=tensors,
        first_layout=id(layouts[0][0]),
        gradients=gradients,
        addresses=_addresses(gradients) if tables.reusable else [],
        facts=facts(groups, gradients, state) if tables.reusable else [],
    )


def rounds(group: Group) -> bool:
    """Whether anything of a param group is rounded stochastically."""
    weights = group["stochastic_rounding"] and any(p.dtype == torch.bfloat16 for p in group["params"])
    return bool(weights) or group["momentum_dtype"] != "float32"


def counts_steps(group: Group) -> bool:
    """Whether the steps of each layer of a param group have to be known."""
    return group["bias_correction"] or rounds(group)


def key(groups: Groups) -> tuple[Any, ...]:
    """Which tensors are stepped, and what their statistic is. Tensors by id: no reference is kept."""
    return tuple((group["norm_type"], *map(id, params)) for group, params in groups)


def local_gradients(groups: Groups) -> list[Tensor]:
    """This rank's part of the gradient of every tensor, in order. A collective for those to redistribute."""
    params = [p for _, members in groups for p in members]
    if _has_dtensors(params):
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
    found += map(id, state)
    found += _addresses([t for s in state.values() for t in s.values() if isinstance(t, Tensor)])
    return found


def _addresses(tensors: list[Any]) -> list[int]:
    # Once a step for each tensor: for 1,000 layers this is most of the step's time.
    if _has_dtensors(tensors):
        tensors = [*map(local_tensor, tensors)]
    return [*map(Tensor.data_ptr, tensors)]


def _has_dtensors(tensors: list[Any]) -> bool:
    return any(issubclass(kind, DTensor) for kind in set(map(type, tensors)))


def shards(
    groups: Groups, layouts: Sequence[Sequence[Layout]], gradients: Sequence[Tensor], state: State
) -> tuple[list[kernels.Shard], list[int]]:
    """Make the tensors of a step known to the kernels, and place their layers in one vector.

    Returns:
        The shards, and which tensor each of them is.
    """
    made: list[kernels.Shard] = []
    tensors: list[int] = []
    first = tensor = 0
    for (group, params), known in zip(groups, layouts, strict=True):
        beta1 = group["betas"][0]
        for p, layout in zip(params, known, strict=True):
            for part in momentum.stored(layout, group["momentum_dtype"] if beta1 != 0 else "float32"):
                scale = state[p].get("exp_avg_scale") if part.in_blocks else None
                made.append(
                    kernels.Shard(
                        param=local_tensor(p),
                        grad=gradients[tensor],
                        exp_avg=local_tensor(state[p][part.key]) if beta1 != 0 else None,
                        exp_avg_scale=None if scale is None else local_tensor(scale),
                        pieces=momentum.pieces(layout, part, first),
                        norm_type=group["norm_type"],
                        beta1=beta1,
                        beta3=1 - beta1 if group["grad_averaging"] else 1.0,
                        weight_decay=group["weight_decay"],
                        reg_inside_moment=group["reg_inside_moment"],
                        stochastic_rounding=group["stochastic_rounding"],
                        fused=False if group["foreach"] else group["fused"],
                    )
                )
                tensors.append(tensor)
            first += layout.layers
            tensor += 1
    return made, tensors


def plan(groups: Groups, layouts: Sequence[Sequence[Layout]], device: torch.device) -> Plan:
    """The plan of the layers of a step."""
    ops = {2: dist.ReduceOp.SUM, 0: dist.ReduceOp.MAX}
    placed, first = [], 0
    for (group, _), known in zip(groups, layouts, strict=True):
        for layout in known:
            placed.append(Placed(layout, first, ops[group["norm_type"]]))
            first += layout.layers
    return Plan(placed, device)


def join(params: Sequence[Tensor], state: State, name: str, device: torch.device) -> Tensor:
    """One vector of a state that has one element per layer; the states become views of it.

    Args:
        params: the tensors of one param group.
        state: of the optimizer; changed in place unless it is joined already.
        name: ``exp_avg_sq`` or ``step``.
        device: of the vector.
    """
    kept = [state[p][name] for p in params]
    parts = [*map(local_tensor, kept)] if _has_dtensors(kept) else kept
    joined = _joined(parts, device)
    if joined is None:
        joined = torch.cat([part.to(device) for part in parts])
        views = torch.split(joined, [part.numel() for part in parts])
        for p, old, view in zip(params, kept, views, strict=True):
            is_cut = isinstance(old, DTensor)
            state[p][name] = from_local(view, old, old.shape, old.placements) if is_cut else view
    return joined


def _joined(parts: Sequence[Tensor], device: torch.device) -> Tensor | None:
    """The vector of which ``parts`` are consecutive views, if they are."""
    first, end = parts[0], parts[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        # Addresses alone do not do: two storages may lie next to each other.
        if part.data_ptr() != end or part.untyped_storage().data_ptr() != storage:
            return None
        end += part.numel() * part.element_size()
    if first.device != device:
        return None
    length = sum(part.numel() for part in parts)
    return first.as_strided((length,), (1,), first.storage_offset())
