"""The states of other NovoGrads, in the layouts that their sources have: docs/coming-from.md lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Group = Mapping[str, Any]
State = Mapping[str, Any]

# Options that mean the same to all of them, and come from the state dict as from one's own.
SHARED = (
    *("lr", "initial_lr", "betas", "eps", "weight_decay", "grad_averaging", "maximize"),
    *("bias_correction", "norm_type", "init_zero"),
)
NOT_KEPT = frozenset({"amsgrad", "step", "exp_avg_sq", "weight_decouple", "fixed_decay", "adam_debias"})
ARRAYS = frozenset({"mu", "nu", "count"})  # of optax, and of whatever else keeps arrays
PYTORCH_OPTIMIZER = frozenset({"moments", "grads_ema"})


def is_one(groups: Sequence[Group], states: Sequence[State]) -> bool:
    """Whether a state dict is that of another NovoGrad."""
    # No Adam has this option; all NovoGrads in PyTorch have it.
    return any("grad_averaging" in group for group in groups) or any("nu" in state for state in states)


def converted(states: Sequence[tuple[int, str, State]], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The states of tensors as this NovoGrad's.

    Args:
        states: of each tensor the index of its param group, its name and its state.
        groups: the param groups of the state dict.

    Raises:
        ValueError: a state that is in none of the layouts, or AMSGrad's.
    """
    for index, group in enumerate(groups):
        if group.get("amsgrad"):
            raise ValueError(
                f"param group {index} of the state dict has amsgrad=True, and NovoGrad has no AMSGrad "
                "variant. To go on without it, set amsgrad=False there and take max_exp_avg_sq out of all "
                "states"
            )
        for option in ("weight_decouple", "adam_debias"):
            if group.get(option):
                raise ValueError(
                    f"param group {index} of the state dict has {option}=True, which NovoGrad cannot do: "
                    "set it to False there to go on without it"
                )
    norms = _norms(states, groups)
    return [
        _converted(name, state, groups[index], norm)
        for (index, name, state), norm in zip(states, norms, strict=True)
    ]


def _converted(name: str, state: State, group: Group, norm: Tensor | None) -> dict[str, Any]:
    keys = set(state)
    if norm is not None and keys == {"exp_avg"}:
        squared = norm if group.get("norm_type", 2) == 0 else norm.square()
        return {"exp_avg": state["exp_avg"], "exp_avg_sq": squared, "step": int(group["step"])}
    if keys == ARRAYS:
        mu, nu = (torch.as_tensor(state[key], device="cpu") for key in ("mu", "nu"))
        return {"exp_avg": mu, "exp_avg_sq": nu, "step": int(state["count"])}
    if keys == PYTORCH_OPTIMIZER:
        return {"exp_avg": state["moments"], "exp_avg_sq": state["grads_ema"], "step": int(group["step"])}
    if {"exp_avg", "exp_avg_sq"} <= keys <= {"exp_avg", "exp_avg_sq", "step"}:
        return dict(state)
    raise ValueError(
        f"{name}: its state has {', '.join(sorted(keys))}, which is none of the layouts of NovoGrad that are "
        "listed in docs/coming-from.md"
    )


def _norms(states: Sequence[tuple[int, str, State]], groups: Sequence[Group]) -> list[Tensor | None]:
    """Apex's second moments: of each tensor the norm, which is in a vector in the param group.

    There are two vectors: for parameters in half precision and for the others, in their order, of those that
    had a gradient at the first step.
    """
    found: list[Tensor | None] = [None] * len(states)
    for index, group in enumerate(groups):
        if "exp_avg_sq" not in group:
            continue
        members = [nth for nth, (its, _, _) in enumerate(states) if its == index]
        for half, kept in zip((True, False), group["exp_avg_sq"], strict=True):
            vector = torch.empty(0, device="cpu") if kept is None else kept
            mine = [n for n in members if (states[n][2]["exp_avg"].dtype == torch.float16) is half]
            if len(mine) != len(vector):
                kind = "in half precision" if half else "in float32"
                raise ValueError(
                    f"param group {index} of the state dict has {len(vector)} norms in exp_avg_sq of "
                    f"parameters {kind}, and {len(mine)} of those have a state: which is whose is not known. "
                    "Load the state as Apex saved it, with exp_avg in the dtypes of its parameters"
                )
            for nth, norm in zip(mine, vector.unbind(), strict=True):
                found[nth] = norm.double()
    return found


def options(saved: Group, present: Group) -> dict[str, Any]:
    """A param group of a state dict of this NovoGrad: what means the same from theirs, the rest as it is."""
    kept = {key: value for key, value in present.items() if key != "params"}
    theirs = {
        key: value
        for key, value in saved.items()
        if key in SHARED or (key not in kept and key not in NOT_KEPT)
    }
    return {**kept, **theirs, "params": saved["params"]}
