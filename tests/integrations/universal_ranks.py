"""What each rank runs for the tests of DeepSpeed's checkpoints on another number of ranks."""

from __future__ import annotations

from typing import Any

import fixed_gradients
import torch
from zero_ranks import engine

HALF = fixed_gradients.STEPS // 2


def model(bfloat16: bool) -> torch.nn.Module:
    made = fixed_gradients.FixedGradients()
    return made.bfloat16() if bfloat16 else made


def parameters(model: torch.nn.Module, groups: bool) -> list[Any]:
    """All in one param group, or in two with other decays."""
    found = list(model.parameters())
    if not groups:
        return found
    matrices, others = ([p for p in found if (p.ndim > 1) == wanted] for wanted in (True, False))
    return [{"params": matrices}, {"params": others, "weight_decay": 0.0}]


def saved(ds: dict[str, Any], folder: str, bfloat16: bool = False, groups: bool = False) -> None:
    """Train half of the steps and save."""
    made = model(bfloat16)
    e = engine(ds, model=made, model_parameters=parameters(made, groups))
    for step in range(HALF):
        e.backward(e(torch.tensor(step)))
        e.step()
    e.save_checkpoint(folder, tag="half")


def resumed(ds: dict[str, Any], folder: str, bfloat16: bool = False, groups: bool = False) -> Any:
    """Load, train the other half, and return what this rank holds, or the error."""
    made = model(bfloat16)
    e = engine(ds, model=made, model_parameters=parameters(made, groups))
    before = [t.clone() for t in tensors_of(e)]
    try:
        e.load_checkpoint(folder, tag="half" if "checkpoint" not in ds else None)
    except Exception as error:
        unchanged = all(torch.equal(a, b) for a, b in zip(before, tensors_of(e), strict=True))
        return f"{type(error).__name__}: {error}{'' if unchanged else ' (something was changed)'}"
    decays = [group["weight_decay"] for group in e.basic_optimizer.param_groups]
    for step in range(HALF, fixed_gradients.STEPS):
        e.backward(e(torch.tensor(step)))
        e.step()
    return fixed_gradients.pieces(e.basic_optimizer), decays


def tensors_of(e: Any) -> list[torch.Tensor]:
    states = e.basic_optimizer.state.values()
    return [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]
