"""Sets of options under one word, and what of a param group comes from them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

PRESETS: dict[str, dict[str, Any]] = {
    # Algorithm 1 of arXiv 1905.11286.
    "paper": {
        "betas": (0.95, 0.98),
        "bias_correction": False,
        "grad_averaging": False,
        "init_zero": False,
        "granularity": "tensor",
        "normalize": "norm",
        "nesterov": False,
        "orthogonalize": False,
    },
    # What learns as AdamW does, at its learning rates: docs/quality.md.
    "adamw": {
        "betas": (0.9, 0.98),
        "bias_correction": True,
        "grad_averaging": True,
        "init_zero": True,
        "granularity": "factored",
        "normalize": "rms",
        "nesterov": True,
        "orthogonalize": False,
    },
    # Orthogonal directions for hidden matrices, and one scalar for each tensor: docs/quality.md.
    "muon": {
        "betas": (0.95, 0.98),
        "bias_correction": True,
        "grad_averaging": True,
        "init_zero": True,
        "granularity": "tensor",
        "normalize": "rms",
        "nesterov": True,
        "orthogonalize": True,
    },
}
DEFAULT = "adamw"
# With the preset "muon", how many times the learning rate of all else hidden matrices move with.
HIDDEN_LR = 4.0


def check(preset: Any, where: str) -> None:
    """Raise ValueError for a preset that there is not, with the nearest that there is."""
    if preset not in PRESETS:
        near = difflib.get_close_matches(str(preset), PRESETS, n=1)
        advice = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{where}: preset must be one of {', '.join(PRESETS)}, got {preset!r}{advice}")


def complete(options: dict[str, Any], where: str) -> None:
    """Give a set of options those of its ``preset`` that it has not, or that are None; in place.

    Raises:
        ValueError: an unknown preset.
    """
    check(options["preset"], where)
    for option, value in PRESETS[options["preset"]].items():
        if options.get(option) is None:
            options[option] = value


def of_group(group: dict[str, Any], defaults: Mapping[str, Any], where: str) -> None:
    """Complete the options of a param group, in place.

    What the group gives wins; then what the optimizer was given beside its own preset; then the group's
    preset, if it names one.

    Raises:
        ValueError: an unknown preset.
    """
    for option in [*PRESETS[DEFAULT], "preset"]:
        if option in group and group[option] is None:
            del group[option]
    if "preset" in group:
        check(group["preset"], where)
        given = {o: v for o, v in defaults.items() if v != PRESETS[defaults["preset"]].get(o, v)}
        for option, value in {**PRESETS[group["preset"]], **given}.items():
            group.setdefault(option, value)
    if "lr" not in group:
        group["lr"] = _lr(group, defaults, where)
    for option, default in defaults.items():
        group.setdefault(option, default)


def _lr(group: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> Any:
    """The learning rate of a param group that has none of its own."""
    known = {**defaults, **group}
    if known["preset"] != "muon" or not known["orthogonalize"]:
        return defaults["lr"]
    if isinstance(defaults["lr"], Tensor):
        raise ValueError(
            f'{where}: preset="muon" has {HIDDEN_LR:g} times the learning rate for the matrices of hidden '
            "layers, which cannot follow a tensor: give every param group an lr of its own"
        )
    return HIDDEN_LR * defaults["lr"]


def chosen(group: Mapping[str, Any]) -> dict[str, Any]:
    """The preset of a param group and its options; without betas, which schedules change."""
    return {option: group[option] for option in ("preset", *PRESETS[DEFAULT]) if option != "betas"}


def check_effect(group: Mapping[str, Any], noted: Mapping[str, Any], where: str) -> None:
    """Raise RuntimeError where the preset of a param group was changed, and what it stands for was not.

    Args:
        group: the param group.
        noted: what :func:`chosen` said of it when it was made or loaded.
        where: said in the error, such as "param group 0".
    """
    if {**chosen(group), "preset": noted["preset"]} == noted:
        raise RuntimeError(
            f"{where}: preset was {noted['preset']!r} and is {group['preset']!r} now, which has no effect: a "
            "preset chooses options when a param group is made. Make a new optimizer with "
            f"preset={group['preset']!r}"
        )


def origin(group: Mapping[str, Any], option: str) -> str:
    """Where an option of a param group comes from, for messages; empty if it was given."""
    preset = group.get("preset")
    of_preset = PRESETS.get(str(preset), {})
    return f" (from preset={preset!r})" if option in of_preset and group[option] == of_preset[option] else ""


def described(group: Mapping[str, Any], common: Mapping[str, Any]) -> str:
    """The options of a param group, and where each comes from.

    Args:
        group: the param group.
        common: the default of every option that is in no preset.
    """
    lines = [f"    preset: {group['preset']}"]
    for option in sorted(group.keys() - {"params", "param_names", "preset"}):
        known = origin(group, option)
        if not known and option in common and group[option] == common[option]:
            known = " (default)"
        lines.append(f"    {option}: {group[option]!r}{known}")
    return "\n".join(lines)
