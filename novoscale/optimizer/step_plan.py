"""The plan of a step: made of the tensors that are given, whether or not this rank has a gradient of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from novoscale.kernels.layers import SUMS
from novoscale.optimizer.layer_table import Group, Groups
from novoscale.sharding.blocks import NONE
from novoscale.sharding.layout import Layout
from novoscale.sharding.placed import PlacedLayout
from novoscale.sharding.plan import Plan
from novoscale.state import momentum, second_moment

# What of a param group the tables depend on; the other options are numbers that are given to the kernels.
STRUCTURE = (
    "bias_correction",
    "reg_inside_moment",
    "momentum_dtype",
    "granularity",
    "norm_type",
    "stochastic_rounding",
    "fused",
    "foreach",
    "nesterov",
    "scale_parameter",
    "orthogonalize",
    "ns_steps",
    "row_normalize",
)

OPS = {2: dist.ReduceOp.SUM, 0: dist.ReduceOp.MAX}  # by norm_type

# Those on which the ranks that share a layer must agree.
SHARED = (
    *(option for option in STRUCTURE if option not in ("fused", "foreach")),
    *("lr", "betas", "eps", "weight_decay", "grad_averaging", "normalize", "init_zero", "clip_threshold"),
    *("max_grad_norm", "maximize", "seed"),
)


@dataclass(frozen=True, slots=True)
class Mode:
    """How tensors are stepped, and what their ranks have agreed on.

    Attributes:
        per_parameter: see ``plan.Plan``.
        clips: whether the norm of the model is clipped.
        agreed: see ``plan.Plan``.
    """

    per_parameter: bool
    clips: bool
    agreed: set[Any]


@dataclass(frozen=True, slots=True)
class AbsentLayout:
    """A DTensor without a gradient on this rank.

    Attributes:
        group: its param group.
        layout: of the tensor.
        before: how many of the tensors that are stepped come before it in ``param_groups``.
    """

    group: Group
    layout: Layout
    before: int


def plan(
    groups: Groups,
    layouts: Sequence[Sequence[Layout]],
    absent: Sequence[AbsentLayout],
    device: torch.device,
    mode: Mode,
) -> Plan:
    """The plan of the layers of a step."""
    placed: list[PlacedLayout] = []
    written: dict[int, dict[str, str]] = {}  # by id(group)
    first = column = parameter = block = number = 0
    left = [*absent]

    def place(group: Group, layout: Layout, here: bool) -> None:
        nonlocal block
        sharded_blocks = layout.sharded_blocks() if momentum.in_blocks(group) else NONE
        if id(group) not in written:
            written[id(group)] = _options(group)
        placed.append(
            PlacedLayout(
                layout,
                first,
                OPS[group["norm_type"]],
                column,
                parameter,
                block,
                sharded_blocks,
                sums=SUMS if second_moment.adds_up(group) else 0,
                shares=bool(group["clip_threshold"]),
                here=here,
                options=written[id(group)],
            )
        )
        block += len(sharded_blocks)

    for (group, _), known in zip(groups, layouts, strict=True):
        for layout in known:
            while left and left[0].before <= number:
                missing = left.pop(0)
                place(missing.group, missing.layout, here=False)
            place(group, layout, here=True)
            first += layout.layers
            column += layout.columns
            parameter += len(layout.local_shards)
            number += 1
    for missing in left:
        place(missing.group, missing.layout, here=False)
    return Plan(placed, device, mode.per_parameter, mode.clips, mode.agreed)


def _options(group: Group) -> dict[str, str]:
    """The options on which ranks must agree, as they are written."""
    return {name: _written(group[name]) for name in SHARED}


def _written(value: Any) -> str:
    if isinstance(value, Tensor):  # to read it would wait for the device
        return "a tensor"
    return repr(tuple(value) if isinstance(value, list) else value)


def plan_key(options: Sequence[Group], mode: Mode) -> tuple[Any, ...]:
    """What a plan depends on, beside the tensors: options of their param groups, and how they are stepped."""
    of_groups = (
        (second_moment.adds_up(group), bool(group["clip_threshold"]), momentum.in_blocks(group))
        for group in options
    )
    return (mode.per_parameter, mode.clips, *of_groups)
