"""What a step needs to know of its tensors: built once, and reused while they stay where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from novoscale import kernels
from novoscale.layout import Layout, Placed, Plan, local_gradient, local_tensor

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
    "fused",
    "foreach",
)


@dataclass
class Prepared:
    """Tables for a set of tensors that is stepped together. Keeps no parameter and no gradient alive.

    Attributes:
        plan: which layers have to be completed over which process groups.
        kernels: both passes over the elements.
        second_moments: for each param group v of all its layers, float32; the ``exp_avg_sq`` of its tensors
            are views of it, so that a step need not gather them.
        steps: the same of ``step``, where the group has one.
        addresses: where everything lay when the tables were made; empty if they serve one step only.
        first_layout: id of the layout of the first tensor.
        options: those of the param groups that the tables contain.
        signature: what else the tables depend on beside the addresses.
        held: what has to live to the end of the step for which the tables were made.
    """

    plan: Plan
    kernels: kernels.Kernels
    second_moments: list[Tensor]
    steps: list[Tensor | None]
    addresses: list[Any]
    first_layout: int
    options: list[Any]
    signature: list[Any]
    held: list[Tensor]

    def stands(self, groups: Groups, state: State) -> bool:
        """Whether the tables are right for the coming step: nothing has moved or changed."""
        try:
            same = self.options == options(groups)
            return same and bool(self.addresses) and self.addresses == addresses(groups, state)
        except RuntimeError:  # a gradient without an address is sparse: for checks to say
            return False

    def by_group(self, vector: Tensor) -> Sequence[Tensor]:
        """The parts of a vector with one element per layer that belong to each param group."""
        return torch.split(vector, [len(v) for v in self.second_moments])

    def unscale(self, statistic: Tensor, groups: Groups, inverse_scale: Tensor) -> None:
        """Make the statistic of scaled gradients that of the gradients, in place."""
        for (group, _), S in zip(groups, self.by_group(statistic), strict=True):
            S.mul_(inverse_scale if group["norm_type"] == 0 else inverse_scale.square())

    def release(self) -> None:
        """Let go of tensors, at the end of a step."""
        self.held = []
        self.kernels.release()


def build(
    groups: Groups, layouts: Sequence[Sequence[Layout]], state: State, before: Prepared | None
) -> Prepared:
    """Make the tables of a set of tensors.

    Args:
        groups: the tensors, by param group.
        layouts: of each tensor.
        state: of the optimizer, which has one for every tensor; see :func:`join`.
        before: what was made for the same tensors earlier; used again as far as possible.
    """
    device = local_tensor(groups[0][1][0]).device
    second_moments = [join(params, state, "exp_avg_sq", device) for _, params in groups]
    steps = [
        join(params, state, "step", device) if group["bias_correction"] else None for group, params in groups
    ]
    made = shards(groups, layouts, state)
    present, signature = options(groups), _signature(made, device)
    only_moved = before is not None and (before.options, before.signature) == (present, signature)
    if before is not None and only_moved and before.kernels.reusable:
        tables = before.kernels
        tables.moved(made)
    else:
        tables = kernels.Kernels(made, device, sum(map(len, second_moments)))
    # A gradient that had to be redistributed belongs to this step alone.
    direct = all(
        p.grad.placements == p.placements
        for _, params in groups
        for p in params
        if isinstance(p, DTensor) and isinstance(p.grad, DTensor)
    )
    return Prepared(
        # The ranks compare their layers when a plan is made: not again when a tensor has moved.
        plan=plan(groups, layouts, device) if before is None else before.plan,
        kernels=tables,
        second_moments=second_moments,
        steps=steps,
        addresses=addresses(groups, state) if direct and tables.reusable else [],
        first_layout=id(layouts[0][0]),
        options=present,
        signature=signature,
        held=[] if direct else [shard.grad for shard in made],
    )


def _signature(made: Sequence[kernels.Shard], device: torch.device) -> list[Any]:
    """What tables depend on beside the addresses and what is in :func:`key`."""
    tensors = [t for shard in made for t in (shard.param, shard.grad, shard.exp_avg) if t is not None]
    return [device, *((t.dtype, t.device, t.stride(), type(t)) for t in tensors)]


def key(groups: Groups) -> tuple[Any, ...]:
    """Which tensors are stepped, and what their statistic is. Tensors by id: no reference is kept."""
    return tuple((group["norm_type"], *map(id, params)) for group, params in groups)


def options(groups: Groups) -> list[Any]:
    """The options that tables contain."""
    return [group[name] for group, _ in groups for name in OPTIONS]


def addresses(groups: Groups, state: State) -> list[Any]:
    """Where the tensors of a step lie, and all states; if none has moved, tables are still right.

    Of DTensor gradients also how they are placed: a partial sum may lie where a shard has lain.

    Raises:
        RuntimeError: a gradient has no address (it is sparse).
    """
    found: list[Any] = [*map(id, state)]
    for _, params in groups:
        grads = [p.grad for p in params]
        found += _addresses(params)
        found += _addresses(grads)
        # Other tensors may come to lie at the same address.
        found += map(Tensor.numel, params)
        found += [t.dtype for t in (*params, *grads)]  # type: ignore[union-attr]
        found += [g.is_contiguous() for g in grads]  # type: ignore[union-attr]
        if _has_dtensors(grads):
            found += [g.placements for g in grads if isinstance(g, DTensor)]
    for name in ("exp_avg", "exp_avg_sq", "step"):
        found += _addresses([s[name] for s in state.values() if name in s])
    return found


def _addresses(tensors: list[Any]) -> list[int]:
    # Once a step for each tensor: for 1,000 layers this is most of the step's time.
    if _has_dtensors(tensors):
        tensors = [*map(local_tensor, tensors)]
    return [*map(Tensor.data_ptr, tensors)]


def _has_dtensors(tensors: list[Any]) -> bool:
    return any(issubclass(kind, DTensor) for kind in set(map(type, tensors)))


def shards(groups: Groups, layouts: Sequence[Sequence[Layout]], state: State) -> list[kernels.Shard]:
    """Make the tensors of a step known to the kernels, and place their layers in one vector."""
    made: list[kernels.Shard] = []
    first = 0
    for (group, params), known in zip(groups, layouts, strict=True):
        beta1 = group["betas"][0]
        fused = False if group["foreach"] else group["fused"]
        for p, layout in zip(params, known, strict=True):
            exp_avg = state[p].get("exp_avg") if beta1 != 0 else None
            made.append(
                kernels.Shard(
                    param=local_tensor(p),
                    grad=local_gradient(p),
                    exp_avg=None if exp_avg is None else local_tensor(exp_avg),
                    segments=layout.segments,
                    first=first,
                    norm_type=group["norm_type"],
                    beta1=beta1,
                    beta3=1 - beta1 if group["grad_averaging"] else 1.0,
                    weight_decay=group["weight_decay"],
                    reg_inside_moment=group["reg_inside_moment"],
                    fused=fused,
                )
            )
            first += len(layout.layers)
    return made


def plan(groups: Groups, layouts: Sequence[Sequence[Layout]], device: torch.device) -> Plan:
    """The plan of the layers of a step, in the order of :func:`shards`."""
    placed: list[Placed] = []
    first = 0
    for (group, _), known in zip(groups, layouts, strict=True):
        op = dist.ReduceOp.SUM if group["norm_type"] == 2 else dist.ReduceOp.MAX
        for layout in known:
            placed.append(Placed(layout, first, op))
            first += len(layout.layers)
    return Plan(placed, device)


def join(params: Sequence[Tensor], state: State, name: str, device: torch.device) -> Tensor:
    """One vector of a state that has one element per layer; the states become views of it.

    Args:
        params: the tensors of one param group.
        state: of the optimizer; changed in place unless it is joined already.
        name: ``exp_avg_sq`` or ``step``.
        device: of the vector.
    """
    parts = [state[p][name] for p in params]
    joined = _joined(parts, device)
    if joined is None:
        joined = torch.cat([part.to(device) for part in parts])
        for p, part in zip(params, torch.split(joined, [part.numel() for part in parts]), strict=True):
            state[p][name] = part
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
