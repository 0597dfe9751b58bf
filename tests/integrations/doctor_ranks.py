"""Runs a script that ``novoscale doctor`` has looked at, and says which optimizer its framework made."""

from __future__ import annotations

import os
from typing import Any

import torch


class FusedAdam(torch.optim.AdamW):
    """Stands for DeepSpeed's, whose kernel would have to be compiled: what is proven is that it is chosen."""

    def __init__(self, params: Any, **options: Any) -> None:
        known = {k: v for k, v in options.items() if k in ("lr", "betas", "eps", "weight_decay")}
        super().__init__(params, **known)


class DeepSpeedCPUAdam(FusedAdam):
    """The same."""


def run_all(scripts: list[str]) -> list[str]:
    """Run one after the other in this process: see ``run``."""
    import deepspeed.ops.adam
    from accelerate.state import AcceleratorState, GradientState

    deepspeed.ops.adam.FusedAdam = FusedAdam
    deepspeed.ops.adam.DeepSpeedCPUAdam = DeepSpeedCPUAdam
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    outcomes = []
    for script in scripts:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        outcomes.append(run(script))
    return outcomes


def run(script: str) -> str:
    """The class of the optimizer that the script leaves in ``ran``, or the error with which it stops."""
    found: dict[str, Any] = {"__name__": "__main__"}
    try:
        exec(compile(script, "train.py", "exec"), found)
    except Exception as error:  # what the frameworks raise
        return f"{type(error).__name__}: {error}"
    return type(found["ran"]).__name__
