"""The cuts that ``novoscale verify`` has no configuration for, measured by what the tests' ranks run.

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

from novoscale.ranks import run_ranks

FLOAT32 = 2e-5
BF16_MASTER = wrapper_ranks.STEPS * 2**-9  # each step rounds the weight once
BF16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


def _trained(function: Callable[..., dict[str, Any]], *args: Any) -> Callable[[int], float]:
    """For a function whose ranks return their weights."""

    def measure(ranks: int) -> float:
        expected = reference(torch_ranks.LR)
        found = run_ranks(function, ranks, *args)
        return max(deviation(w[name], expected[name]) for w in found for name in expected)

    return measure


def _compared(function: Callable[..., Any], *args: Any) -> Callable[[int], float]:
    """For a function whose ranks return how far they are off, alone or in a pair."""

    def measure(ranks: int) -> float:
        given = [arg(ranks) if callable(arg) else arg for arg in args]
        found = [
            next(p for p in (f if isinstance(f, tuple) else (f,)) if isinstance(p, dict))
            for f in run_ranks(function, ranks, *given)
        ]
        return max(max(f.values()) for f in found)

    return measure


def _zero(stage: int, **section: Any) -> Callable[[int], dict[str, Any]]:
    return lambda ranks: zero_ranks.config(stage, ranks, **section)


def _fp16(stage: int) -> Callable[[int], dict[str, Any]]:
    return lambda ranks: {**zero_ranks.config(stage, ranks), "fp16": {"enabled": True, "loss_scale": 64}}


def _bf16(stage: int) -> Callable[[int], dict[str, Any]]:
    return lambda ranks: {**zero_ranks.config(stage, ranks), "bf16": BF16}


# configuration: the numbers of ranks that it can be cut over here, bound, and what measures it
CONFIGURATIONS: dict[str, tuple[tuple[int, ...], float, Callable[[int], float]]] = {
    "ZeroRedundancyOptimizer": ((2, 3, 4), FLOAT32, _trained(torch_ranks.data_parallel, "zero redundancy")),
    "HSDP, 2 x 2": ((4,), FLOAT32, _trained(torch_ranks.fsdp2, (2, 2), {})),
    "tensor parallel, sequence parallel": ((2, 3, 4), FLOAT32, _compared(torch_ranks.tensor_parallel, 1)),
    "FSDP2 + tensor parallel, 2 x 2": ((4,), FLOAT32, _compared(torch_ranks.tensor_parallel, 2)),
    "stage 3, zero.Init": (
        (2, 3, 4),
        FLOAT32,
        _compared(wrapper_ranks.against_oracle, _zero(3, sub_group_size=50), torch.float32, True),
    ),
    **{
        f"stage {stage}, fp16": (
            (2, 3, 4),
            FLOAT32,
            _compared(wrapper_ranks.against_oracle, _fp16(stage), torch.float16),
        )
        for stage in (0, 1, 2, 3)
    },
    **{
        f"stage {stage}, bf16 master weights and optimizer states": (
            (2, 3, 4),
            BF16_MASTER,
            _compared(wrapper_ranks.against_oracle, _bf16(stage), torch.bfloat16),
        )
        for stage in (1, 2, 3)
    },
    **{
        f"stage {stage}, experts (MoE)": (
            (2, 3, 4),
            FLOAT32,
            _compared(wrapper_ranks.experts_against_oracle, _zero(stage)),
        )
        for stage in (1, 2)
    },
    **{
        f"stage {stage}, tensor parallel (mpu)": (
            (2, 3, 4),
            FLOAT32,
            _compared(
                wrapper_ranks.tensor_parallel_against_oracle,
                lambda ranks, stage=stage: wrapper_ranks.tensor_parallel_config(stage, ranks),
            ),
        )
        for stage in (1, 2)
    },
}
