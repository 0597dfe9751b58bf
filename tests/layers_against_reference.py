"""What the fused passes over the layers are compared by: the reference, on layers that nobody chose."""

from __future__ import annotations

from dataclasses import fields
from types import ModuleType
from typing import Any, NamedTuple

import hypothesis.strategies as st
import torch
from torch import Tensor

from novoscale.kernels.interface import AdvanceInputs, States
from novoscale.kernels.layers import NEEDED, RECORD, SUMS, LayerTable, OptionTable
from novoscale.kernels.reference import layers as reference_layers

LAYERS = [1, 2, 3, 7, 64, 130]


class LocalParameter(NamedTuple):
    """A parameter: how many of its layers are here, how many columns it has, and what else is known of it."""

    group: int
    count: int
    width: int
    numel: int
    scattered: bool


class Case(NamedTuple):
    """The layers of some steps."""

    groups: list[dict[str, Any]]
    parameters: list[LocalParameter]
    sums: bool
    scale: float | None
    one_verdict: bool
    seed: int


def group(draw: Any, factored: bool, limit: float | None) -> dict[str, Any]:
    flag = st.booleans()
    rms = factored or draw(flag)
    return {
        "lr": draw(st.sampled_from([0.01, 1.0])),
        "betas": draw(st.sampled_from([(0.9, 0.98), (0.95, 0.5), (0.0, 0.999)])),
        "eps": draw(st.sampled_from([1e-8, 0.0, 0.1])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "grad_averaging": draw(flag),
        "clip_threshold": draw(st.sampled_from([None, None, 0.5])),
        "maximize": draw(flag),
        "norm_type": 2 if rms else draw(st.sampled_from([0, 2])),
        "bias_correction": draw(flag),
        "init_zero": draw(flag),
        "normalize": "rms" if rms else "norm",
        "nesterov": draw(flag),
        "reg_inside_moment": draw(flag),
        "scale_parameter": draw(st.sampled_from([False, False, True])),
        "seed": draw(st.sampled_from([0, 7, 2**32 - 1])),
        "factored": factored,
        "max_grad_norm": limit,
        "counted": draw(flag),
        "rounds": draw(flag),
    }


def plain_group(**options: Any) -> dict[str, Any]:
    """The first choice of every option, but for some."""
    first = {
        "lr": 0.01,
        "betas": (0.9, 0.98),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip_threshold": None,
        "norm_type": 2,
        "normalize": "rms",
        "seed": 0,
        "max_grad_norm": None,
    }
    first |= dict.fromkeys(("grad_averaging", "maximize", "bias_correction", "init_zero", "nesterov"), False)
    first |= dict.fromkeys(("reg_inside_moment", "scale_parameter", "factored", "counted", "rounds"), False)
    return first | options


@st.composite
def cases(draw: Any) -> Case:
    limit = draw(st.sampled_from([None, 0.5, 1e6]))
    groups = [group(draw, draw(st.booleans()), limit) for _ in range(draw(st.integers(1, 3)))]
    parameters = []
    for index, of in enumerate(groups):
        for _ in range(draw(st.integers(1, 3))):
            count = draw(st.sampled_from([*LAYERS, 0]))
            width = draw(st.sampled_from(LAYERS)) if of["factored"] and draw(st.booleans()) else 0
            numel = width or draw(st.sampled_from([1, 5, 4096]))
            parameters.append(LocalParameter(index, count, width, numel, draw(st.booleans())))
    adds_up = any(g["factored"] or g["clip_threshold"] or g["scale_parameter"] for g in groups)
    return Case(
        groups,
        parameters,
        adds_up,
        draw(st.sampled_from([None, 1024.0])),
        draw(st.booleans()),
        draw(st.integers(0, 2**31)),
    )


class Tensors(NamedTuple):
    """The states, by parameter; 0-dim where there is none."""

    v: list[Tensor]
    columns: list[Tensor]
    steps: list[Tensor]

    def states(self) -> States:
        return States(*([t for t in of if t.ndim] for of in self))

    def copied(self, device: torch.device) -> Tensors:
        return Tensors(*([t.clone().to(device) for t in of] for of in self))


def numbers(generator: torch.Generator, *shape: int) -> Tensor:
    """Not negative, of all magnitudes, some 0."""
    found = torch.randn(shape, generator=generator, dtype=torch.float64).exp2() * 1e-3
    return torch.where(torch.rand(shape, generator=generator) < 0.2, 0.0, found)


def tensors(case: Case, generator: torch.Generator) -> Tensors:
    v, columns, steps = [], [], []
    for h in case.parameters:
        of = case.groups[h.group]
        counts = h.count if not of["factored"] else 1
        counted = of["counted"] or of["bias_correction"] or of["rounds"]
        v.append(numbers(generator, h.count).float())
        columns.append(numbers(generator, h.width).float() if h.width else torch.zeros(()))
        whole = torch.randint(0, 30, (counts,), generator=generator).float()
        steps.append(whole if counted else torch.zeros(()))
    return Tensors(v, columns, steps)


def table(case: Case, known: Tensors, generator: torch.Generator) -> LayerTable:
    records, layer, column = [], 0, 0
    for i, h in enumerate(case.parameters):
        of = case.groups[h.group]
        steps = known.steps[i].data_ptr() if known.steps[i].ndim else 0
        columns = known.columns[i].data_ptr() if h.width else 0
        facts = (h.numel, h.count + 3, 11 * i, of["factored"], of["rounds"] and steps != 0, h.scattered)
        records.append(
            [h.group, layer, h.count, column, h.width, *facts, known.v[i].data_ptr(), columns, steps]
        )
        layer, column = layer + h.count, column + h.width
    share = (torch.rand(layer, generator=generator) < 0.5).double() if case.sums else None
    uses = frozenset(name for name in NEEDED for of in case.groups if of[name])
    made = torch.tensor(records, dtype=torch.int64).view(-1, RECORD)
    return LayerTable(made, layer, column, share, uses)


def run(module: Any, case: Case, device: torch.device, steps: int = 2) -> dict[str, Tensor]:
    """What some steps make of the layers."""
    generator = torch.Generator().manual_seed(case.seed)
    known = tensors(case, generator).copied(device)
    made = table(case, known, generator)
    kernel, options = module.LayerKernels(made, device), OptionTable(len(case.groups), device)
    found: dict[str, Tensor] = {}
    for step in range(steps):
        options.take(case.groups)
        statistic = torch.zeros(made.layers + made.columns + SUMS * case.sums * len(case.parameters)).double()
        statistic[: made.layers + made.columns] = numbers(generator, made.layers + made.columns)
        if case.sums:
            statistic[-len(case.parameters) :] = numbers(generator, len(case.parameters))
        verdicts = torch.rand(len(case.parameters), generator=generator) < 0.8
        finite = verdicts[0] if case.one_verdict else verdicts
        total = statistic[: made.layers].sum().to(device)
        statistic, finite = statistic.to(device), finite.to(device)
        scale = None if case.scale is None else torch.tensor(case.scale, device=device)
        kernel.hold(known.states)
        kernel.begin(options, statistic, scale)
        found[f"statistic {step}"] = statistic.clone()
        c = kernel.advance(AdvanceInputs(options, statistic, finite, total, scale, lambda x: x * 2))
        kernel.release()
        found |= {f"{f.name} {step}": t for f in fields(c) if (t := getattr(c, f.name)) is not None}
        found |= {f"{n} {step} {i}": t.clone() for n, of in known._asdict().items() for i, t in enumerate(of)}
    return found


def assert_as_reference(module: ModuleType, case: Case, device: torch.device) -> None:
    """Every bit, but what a sum of float64 in another order makes of the last."""
    expected, found = run(reference_layers, case, device), run(module, case, device)
    assert expected.keys() == found.keys()
    for name, right in expected.items():
        tolerance = 1e-14 if right.dtype == torch.float64 else 0
        torch.testing.assert_close(
            found[name], right, rtol=tolerance, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
