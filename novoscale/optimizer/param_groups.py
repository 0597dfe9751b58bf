"""Param groups for a model: weight decay as the Hugging Face Trainer has it, and layers that learn well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from novoscale.optimizer import hidden, presets
from novoscale.optimizer.hidden import Role, shape_of


class ParamGroups(list[dict[str, Any]]):
    """Param groups for an optimizer. ``print`` it to see what is in them, and with "muon" why."""

    def __init__(self, groups: Any = (), why: Mapping[str, str] | None = None) -> None:
        super().__init__(groups)
        self._why = why or {}  # by the parameter's name

    def __str__(self) -> str:
        lines = []
        for group in self:
            options = ", ".join(f"{k}={v!r}" for k, v in group.items() if k not in ("params", "param_names"))
            numel = sum(shape_of(p).numel() for p in group["params"])
            lines.append(f"{options}: {len(group['params'])} parameters, {numel:,} elements")
            for name, p in zip(group["param_names"], group["params"], strict=True):
                why = f": {self._why[name]}" if name in self._why else ""
                lines.append(f"    {name} {tuple(shape_of(p))}{why}")
        return "\n".join(lines)


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.0,
    preset: str | None = None,
    fused: Mapping[str, int] | None = None,
    exclude: Sequence[str] | None = None,
    others: str | None = None,
) -> ParamGroups:
    """The recommended param groups of a model, for ``NovoGrad(param_groups(model, ...), ...)``.

    Matrices (two dimensions or more: embeddings, linear layers, convolutions) have weight decay; all else,
    which are biases and the weights of norms, has none. Parameters that need no gradient are left out.

    With ``preset="muon"`` the matrices of hidden layers are in groups with ``orthogonalize=True``.
    Embeddings, what shares their weights, heads and vectors are not: as the modules say, or the names. A
    parameter of three dimensions that is no convolution is a stack of matrices, such as experts.

    Args:
        model: before or after it is wrapped.
        weight_decay: of the matrices.
        preset: of all groups, see ``NovoGrad``: it says what a layer is. None: matrices have one second
            moment for each row, all else one for each parameter.
        fused: how many layers of equal size a parameter consists of, by a part of its name, such as
            ``{"qkv": 3}``; one second moment for each of them instead of for each row.
        exclude: with "muon": patterns of names, such as ``["router.*"]``, of what else is not to be
            orthogonalised. ``[]`` says that a model has neither an embedding nor a head, where none is found.
        others: with "muon": another preset for all that is not orthogonalised, such as "adamw".

    Raises:
        ValueError: no parameter has a part of ``fused`` in its name, or a name like a pattern of ``exclude``;
            an unknown preset; with "muon" a model with neither an embedding nor a head.
        TypeError: no model, such as its parameters.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"param_groups needs the model, whose modules and names it reads, and got a "
            f"{type(model).__name__}: param_groups(model)"
        )
    fused = fused or {}
    for name in filter(None, (preset, others)):
        presets.check(name, "param_groups")
    if preset != "muon" and not (exclude is others is None):
        raise ValueError('param_groups: exclude and others are for preset="muon"')
    roles = hidden.of_model(model, exclude) if preset == "muon" else {}
    norms = _of_norms(model)
    made: dict[Any, dict[str, Any]] = {}
    unseen, why = set(fused), {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        parts = [part for part in fused if part in name]
        unseen -= set(parts)
        is_matrix = len(shape_of(p)) > 1 and id(p) not in norms
        options: dict[str, Any] = {"weight_decay": weight_decay if is_matrix else 0.0}
        if parts:
            options["granularity"] = fused[parts[0]]
        elif preset is None:
            options["granularity"] = "row" if is_matrix else "tensor"
        if preset is not None:
            options["preset"] = preset
        if role := roles.get(id(p)):
            options |= _of_role(role, options, others)
            why[name] = role.why
        group = made.setdefault(tuple(options.items()), {**options, "params": [], "param_names": []})
        group["params"].append(p)
        group["param_names"].append(name)
    if unseen:
        raise ValueError(f"fused: no parameter of the model has {' or '.join(sorted(unseen))} in its name")
    return ParamGroups(made.values(), why)


def _of_role(role: Role, options: Mapping[str, Any], others: str | None) -> dict[str, Any]:
    """The options of a parameter with ``preset="muon"``."""
    if role.hidden:
        stacked = {"granularity": role.matrices} if role.matrices > 1 and "granularity" not in options else {}
        return {"orthogonalize": True, **stacked}
    return {"orthogonalize": False, "preset": others or "muon"}


def _of_norms(model: nn.Module) -> set[int]:
    """The parameters of norms, by id."""
    return {
        id(p)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for p in module.parameters(recurse=False)
    }
