"""State dicts of other optimizers, as NovoGrad's: which optimizer they are of, and what of it goes over.

An Adam's moments are converted (``from_adam``), which loses what NovoGrad does not keep. Of another NovoGrad
the same numbers are elsewhere, or norms and not their squares (``other_novograds``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from novoscale.checkpoint.imported import adam_states, from_adam, other_novograds
from novoscale.checkpoint.imported.from_adam import Target

Group = Mapping[str, Any]
StateDict = dict[str, Any]

# An option that every state dict of this NovoGrad has, and of no other optimizer.
OWN = "reg_inside_moment"
ACCEPTED = (
    "NovoGrad takes its own state, that of Adam or AdamW (torch's, Apex's, DeepSpeed's, bitsandbytes') and "
    "that of another NovoGrad (docs/coming-from.md)"
)
# Whose state has these keys, for messages; the first that fits.
KNOWN = (
    ({"momentum_buffer"}, "SGD or Muon"),
    ({"exp_avg_sq_row"}, "Adafactor"),
    ({"row_var"}, "Adafactor"),
    ({"variance"}, "Adafactor"),
    ({"exp_inf"}, "Adamax"),
    ({"square_avg"}, "RMSprop or Adadelta"),
    ({"sum"}, "Adagrad"),
    ({"state1"}, "an 8-bit optimizer with one state (Lion, SGD, RMSprop)"),
    ({"exp_avg"}, "Lion"),
)
# Options of Adams that say nothing to NovoGrad, or another thing under the same name.
OF_ADAM = frozenset(
    {
        *("lr", "initial_lr", "weight_decay", "betas", "eps", "amsgrad", "bias_correction", "capturable"),
        *(
            "differentiable",
            "step",
            "momentum_decay",
            "decoupled_weight_decay",
            "alpha",
            "t_alpha",
            "t_beta3",
        ),
    }
)


@dataclass(frozen=True)
class _Known:
    """A tensor whose state is in the state dict."""

    key: Any
    target: Target
    state: Mapping[str, Any]
    group: int


def is_own(state_dict: Mapping[str, Any]) -> bool:
    """Whether a state dict is that of this NovoGrad."""
    return all(OWN in group for group in state_dict["param_groups"])


def check_groups(state_dict: Mapping[str, Any], groups: Sequence[Group]) -> None:
    """Raise ValueError where a state dict has other param groups than an optimizer, by number or size."""
    saved, present = ([len(g["params"]) for g in gs] for gs in (state_dict["param_groups"], groups))
    if saved != present:
        raise ValueError(
            f"the state dict has a different number of parameter groups, or of parameters in them: it has "
            f"{_sizes(saved)}, and this NovoGrad {_sizes(present)}. Make the optimizer with the same param "
            "groups, in the same order"
        )


def _sizes(sizes: Sequence[int]) -> str:
    listed = ", ".join(map(str, sizes))
    return f"{len(sizes)} param group{'s' * (len(sizes) != 1)} of {listed} parameters"


def converted(
    state_dict: StateDict, groups: Sequence[Group], targets: Sequence[Target]
) -> tuple[StateDict, str | None]:
    """A state dict of another optimizer as that of this NovoGrad.

    Args:
        state_dict: left as it is.
        groups: the present param groups.
        targets: every tensor of them, in order.

    Returns:
        The state dict; what to say of a conversion that loses anything.

    Raises:
        ValueError: the state is none that is taken, or is converted with loss and a param group has not
            ``allow_lossy_load``.
    """
    saved_groups: list[dict[str, Any]] = state_dict["param_groups"]
    keys = ((index, key) for index, group in enumerate(saved_groups) for key in group["params"])
    known = [
        _Known(key, target, state_dict["state"][key], index)
        for (index, key), target in zip(keys, targets, strict=True)
        if state_dict["state"].get(key)
    ]
    said = None
    if other_novograds.is_one(saved_groups, [k.state for k in known]):
        numbered = [(k.group, k.target.name, k.state) for k in known]
        states = other_novograds.converted(numbered, saved_groups)
        options = [other_novograds.options(*both) for both in zip(saved_groups, groups, strict=True)]
    else:
        _refuse_others(known, saved_groups)
        _check_directions(saved_groups, groups)
        _refuse_lossy(known)
        adams = _with_steps(known, saved_groups)
        states = list(from_adam.converted([k.target for k in known], [k.state for k in known], adams))
        options = [options_from_adam(*both) for both in zip(saved_groups, groups, strict=True)]
        said = _said(known, saved_groups, options) if known else None
    state = {k.key: state for k, state in zip(known, states, strict=True)}
    for group in options:
        group.pop("momentum_dtype", None)  # the moments are in none of its formats yet
    return {**state_dict, "state": state, "param_groups": options}, said


def _refuse_others(known: Sequence[_Known], groups: Sequence[Group]) -> None:
    """Raise ValueError for a state that is not an Adam's, with what it is."""
    for k in known:
        if not adam_states.is_one(k.state):
            keys = set(map(str, k.state))
            whose = next((name for theirs, name in KNOWN if theirs <= keys), "another optimizer")
            raise ValueError(
                f"the state dict is that of {whose}: {k.target.name} has {', '.join(sorted(keys))}. "
                f"{ACCEPTED}"
            )
    for index, group in enumerate(groups):
        if not isinstance(group.get("betas"), (tuple, list)) or len(group["betas"]) != 2:
            options = ", ".join(sorted(group.keys() - {"params", "param_names"}))
            raise ValueError(
                f"the state dict is not that of an Adam: param group {index} has {options}, and no betas of "
                f"two numbers. {ACCEPTED}"
            )


def _refuse_lossy(known: Sequence[_Known]) -> None:
    for k in known:
        if not k.target.group["allow_lossy_load"]:
            layers = k.target.layout.layers + k.target.layout.columns
            raise ValueError(
                f"the state dict is that of an Adam. Of {k.target.name}, and of all other parameters, "
                f"NovoGrad keeps fewer second moments (here {layers:,} of {k.target.p.numel():,}) and has "
                "the first moment divided by their roots: there is no way back. Make NovoGrad with "
                "allow_lossy_load=True to have it converted"
            )


def _with_steps(known: Sequence[_Known], groups: Sequence[Group]) -> list[Group]:
    """Of each tensor its param group, with a count of steps for those that have none, or 0, of their own.

    Under DeepSpeed's FusedAdam, without ZeRO, only the last tensor of a group counts them.
    """
    most: dict[int, int] = {}
    for k in known:
        most[k.group] = max(most.get(k.group, 0), int(k.state.get("step", 0)))
    return [
        {"step": most[k.group], **groups[k.group]} if most[k.group] and not own else groups[k.group]
        for k, own in ((k, int(k.state.get("step", 0))) for k in known)
    ]


def _check_directions(saved: Sequence[Group], present: Sequence[Group]) -> None:
    for index, (theirs, ours) in enumerate(zip(saved, present, strict=True)):
        if bool(theirs.get("maximize", ours["maximize"])) != ours["maximize"]:
            raise ValueError(
                f"param group {index}: maximize is {theirs['maximize']} in the state dict and "
                f"{ours['maximize']} here: the first moment points the other way. Give NovoGrad the same"
            )


def rates_mean_the_same(group: Group) -> bool:
    """Whether a learning rate (and weight decay) of AdamW means the same to a param group of NovoGrad."""
    of_update = group["scale_parameter"] or group["orthogonalize"]
    return group["normalize"] == "rms" and group["grad_averaging"] and not of_update


def options_from_adam(saved: Group, present: Group) -> dict[str, Any]:
    """A param group of a state dict of NovoGrad, from that of an Adam.

    Only what means the same comes from the state dict: the learning rate, where one of AdamW does, with the
    weight decay, if that was decoupled; and what the user or a scheduler has put there.
    """
    options = {**present, "params": saved["params"]}
    for key, value in saved.items():
        if key not in OF_ADAM and key not in options:
            options[key] = value
    if rates_mean_the_same(present):
        decay = ("weight_decay",) if saved.get("decoupled_weight_decay", True) else ()
        options |= {key: saved[key] for key in ("lr", "initial_lr", *decay) if key in saved}
    return options


def _said(known: Sequence[_Known], saved: Sequence[Group], options: Sequence[Group]) -> str:
    """In one line what was converted, and whose options hold."""
    taken = [
        option
        for option in ("lr", "weight_decay")
        if all(theirs.get(option) == ours[option] for theirs, ours in zip(saved, options, strict=True))
        and all(map(rates_mean_the_same, options))
    ]
    theirs = f"{' and '.join(taken)} from the state dict, " if taken else ""
    return (
        f"NovoGrad has taken over the state of an Adam for {len(known)} parameters: v is its exp_avg_sq over "
        f"each layer, m its exp_avg over the root of that; {theirs}all other options as NovoGrad was made"
    )
