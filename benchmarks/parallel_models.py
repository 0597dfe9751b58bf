"""Shardings for which ``novoscale verify`` has no configuration, measured by what the tests' ranks run.

Meshes of several dimensions, and models that are parallel themselves. Under torch a number is the distance
from one process in float64; under DeepSpeed from Algorithm 1 in float64 on the gradients that it reduced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "tests"))
sys.path.append(str(Path(__file__).parent.parent / "tests" / "distributed"))
sys.path.append(str(Path(__file__).parent.parent / "tests" / "integrations"))

import torch
import torch_ranks
import wrapper_ranks
import zero_ranks
from oracle import deviation
from training import reference

from novoscale.tools.local_ranks import run_ranks

FLOAT32 = 2e-5
Measure = Callable[[int], float]
# The world sizes on which a configuration can be measured here, its bound, and what measures it.
Case = tuple[tuple[int, ...], float, Measure]


def _trained(function: Callable[..., dict[str, Any]], *args: Any) -> Measure:
    """For a function whose ranks return their weights."""

    def measure(ranks: int) -> float:
        expected = reference(torch_ranks.LR)
        found = run_ranks(function, ranks, *args)
        return max(deviation(w[name], expected[name]) for w in found for name in expected)

    return measure


def _tensor_parallel(data_world: int) -> Measure:
    def measure(ranks: int) -> float:
        found = run_ranks(torch_ranks.tensor_parallel, ranks, data_world)
        return max(max(deviations.values()) for deviations, _ in found)

    return measure


def _wrapped(
    stage: int, more: dict[str, Any] | None = None, *args: Any, bound: float = FLOAT32, **section: Any
) -> Case:
    """A DeepSpeed wrapper; ``args`` are those of ``wrapper_ranks.against_oracle``."""

    def measure(ranks: int) -> float:
        ds = {**zero_ranks.config(stage, ranks, **section), **(more or {})}
        found = run_ranks(wrapper_ranks.against_oracle, ranks, ds, *args)
        return max(max(deviations.values()) for _, deviations in found)

    return (2, 3, 4), bound, measure


def _parallel(
    function: Callable[..., dict[str, float]], config: Callable[[int, int], dict[str, Any]], stage: int
) -> Case:
    """A model that is parallel itself, under DeepSpeed."""

    def measure(ranks: int) -> float:
        found = run_ranks(function, ranks, config(stage, ranks))
        return max(max(deviations.values()) for deviations in found)

    return (2, 3, 4), FLOAT32, measure


EXPERTS = (wrapper_ranks.experts_against_oracle, zero_ranks.config)
MPU = (wrapper_ranks.tensor_parallel_against_oracle, wrapper_ranks.tensor_parallel_config)

CONFIGURATIONS: dict[str, Case] = {
    "ZeroRedundancyOptimizer": ((2, 3, 4), FLOAT32, _trained(torch_ranks.data_parallel, "zero redundancy")),
    "HSDP, 2 x 2": ((4,), FLOAT32, _trained(torch_ranks.fsdp2, (2, 2), {})),
    "tensor parallel, sequence parallel": ((2, 3, 4), FLOAT32, _tensor_parallel(data_world=1)),
    "FSDP2 + tensor parallel, 2 x 2": ((4,), FLOAT32, _tensor_parallel(data_world=2)),
    "stage 3, zero.Init": _wrapped(3, None, torch.float32, True, sub_group_size=50),
    **{f"stage {n}, fp16": _wrapped(n, wrapper_ranks.FP16, torch.float16) for n in (0, 1, 2, 3)},
    **{
        f"stage {n}, bf16 master weights and optimizer states": _wrapped(
            n, wrapper_ranks.BF16_MASTER, torch.bfloat16, bound=wrapper_ranks.BF16_MASTER_BOUND
        )
        for n in (1, 2, 3)
    },
    **{f"stage {n}, experts (MoE)": _parallel(*EXPERTS, n) for n in (1, 2)},
    **{f"stage {n}, tensor parallel (mpu)": _parallel(*MPU, n) for n in (1, 2)},
}
