"""Param groups for a model: weight decay as the Hugging Face Trainer has it, and layers that learn well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from novoscale.optimizer import presets


class ParamGroups(list[dict[str, Any]]):
    """Param groups for an optimizer. ``print`` it to see what is in them."""

    def __str__(self) -> str:
        lines = []
        for group in self:
            options = ", ".join(f"{k}={v!r}" for k, v in group.items() if k not in ("params", "param_names"))
            numel = sum(_shape(p).numel() for p in group["params"])
            lines.append(f"{options}: {len(group['params'])} parameters, {numel:,} elements")
            rows = zip(group["param_names"], group["params"], strict=True)
            lines += [f"    {name} {tuple(_shape(p))}" for name, p in rows]
        return "\n".join(lines)


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.0,
    preset: str | None = None,
    fused: Mapping[str, int] | None = None,
) -> ParamGroups:
    """The recommended param groups of a model, for ``NovoGrad(param_groups(model, ...), ...)``.

    Matrices (two dimensions or more: embeddings, linear layers, convolutions) have weight decay; all else,
    which are biases and the weights of norms, has none. Parameters that need no gradient are left out.

    Args:
        model: before or after it is wrapped.
        weight_decay: of the matrices.
        preset: of all groups, see ``NovoGrad``: it says what a layer is. None: matrices have one second
            moment for each row, all else one for each parameter.
        fused: how many layers of equal size a parameter consists of, by a part of its name, such as
            ``{"qkv": 3}``; one second moment for each of them instead of for each row.

    Raises:
        ValueError: no parameter has a part of ``fused`` in its name, or an unknown preset.
        TypeError: no model, such as its parameters.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"param_groups needs the model, whose modules and names it reads, and got a "
            f"{type(model).__name__}: param_groups(model)"
        )
    fused = fused or {}
    if preset is not None:
        presets.check(preset, "param_groups")
    made: dict[tuple[float, str | int | None], dict[str, Any]] = {}
    unseen = set(fused)
    norms = {
        id(p)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for p in module.parameters(recurse=False)
    }
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        parts = [part for part in fused if part in name]
        unseen -= set(parts)
        is_matrix = len(_shape(p)) > 1 and id(p) not in norms
        decay = weight_decay if is_matrix else 0.0
        granularity: str | int | None = None if preset else "row" if is_matrix else "tensor"
        if parts:
            granularity = fused[parts[0]]
        empty: dict[str, Any] = {"weight_decay": decay, "params": [], "param_names": []}
        if granularity is not None:
            empty["granularity"] = granularity
        if preset is not None:
            empty["preset"] = preset
        group = made.setdefault((decay, granularity), empty)
        group["params"].append(p)
        group["param_names"].append(name)
    if unseen:
        raise ValueError(f"fused: no parameter of the model has {' or '.join(sorted(unseen))} in its name")
    return ParamGroups(made.values())


def _shape(p: Tensor) -> Any:
    return getattr(p, "ds_shape", p.shape)  # as it was before DeepSpeed's zero.Init
