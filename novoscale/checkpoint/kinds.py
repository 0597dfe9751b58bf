"""Of what kind a saved state is: one under the same keys, in the same shapes, can mean something else.

``torch.distributed.checkpoint`` copies what was saved into the tensors that the present optimizer has, and
converts nothing: codes of int8 become the moments of a float32. So a state dict has a marker beside each
parameter's state, a key that names the kind, of which torch's planner says before it copies anything that the
checkpoint has no such key. And what came all the same is compared with the options that came with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from novoscale.sharding.layers import LayoutError, describe
from novoscale.state.formats import format_of, kept_format
from novoscale.state.second_moment import DIRECTION_AVG_SQ
from novoscale.state.step_counts import counts_steps, rounds_weights

Group = Mapping[str, Any]
SECOND_MOMENTS = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")
MARKED = ("momentum_dtype=", "betas[0]=", "granularity=", "bias_correction=", "stochastic_rounding=")
# What loads another format, where torch.distributed.checkpoint does it.
CONVERT = (
    "Make a NovoGrad with momentum_dtype={saved!r}, load into that one, and give its state_dict() to the "
    "load_state_dict of this one, which converts it where nothing is lost, or with allow_lossy_load=True"
)


class Origin(NamedTuple):
    """Where a state that is loaded comes from, and goes.

    Attributes:
        saved: the param group that has come with it; an option that it has not is not known.
        present: the param group of the optimizer that loads it.
    """

    saved: Group
    present: Group


# ---- markers: for torch's planner ------------------------------------------------------------------------


def marked(p: Tensor, state: Mapping[str, Any], group: Group) -> dict[str, Any]:
    """The state of a parameter as it is saved, after the markers of what it is.

    An optimizer that loads asks for the markers that it has itself. So those of a state are among those of
    every state from which it can be copied without loss: bfloat16 has the marker of float32 too, and float64
    has none.
    """
    found = [f"granularity={_layers('', p, group['granularity'])}"]
    if "exp_avg" in state:
        found += [f"momentum_dtype={name}, betas[0]>0" for name in _copied_into(state)]
    else:
        found.append("betas[0]=0")
    # Not counting steps has no marker: a parameter in bfloat16 counts them where one in float32 does not.
    if group["bias_correction"]:
        found.append("bias_correction=True")
    if rounds_weights(group):
        found.append("stochastic_rounding=True")
    # Without elements, and so without memory. On the parameter's device: torch wants all on one. Of one
    # dimension: torch's set_optimizer_state_dict fails on a tensor of none under a key that is not here.
    markers = {key: torch.empty(0, dtype=torch.uint8, device=p.device) for key in found}
    return {**markers, **{key: value for key, value in state.items() if not is_marker(key)}}


def is_marker(key: Any) -> bool:
    """Whether a key of a state is a marker."""
    return isinstance(key, str) and key.startswith(MARKED)


def unmarked(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without markers; the given one is left as it is."""
    states = {
        of: {key: value for key, value in state.items() if not is_marker(key)}
        if type(state) is dict  # and not FlatState, which has none
        else state
        for of, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states}


def _copied_into(state: Mapping[str, Any]) -> Sequence[str]:
    """The formats into which torch can copy a first moment without loss, but for float64."""
    dtype = state["exp_avg"].dtype
    if dtype == torch.float64:
        return ()
    name = format_of(state["exp_avg"], state.get("exp_avg_scale")).name
    return (name, "float32") if name == "bfloat16" else (name,)


def _layers(name: str, p: Tensor, granularity: str | int) -> str | int:
    """What the layers of a parameter are, however that was asked for."""
    try:
        of = describe(name, p.shape, granularity)
    except LayoutError:  # changed meanwhile: the next step says it
        return granularity
    if of.factored:
        return "factored"
    if p.ndim < 2:
        return "element" if of.layers == of.numel > 1 else "tensor" if of.layers == 1 else of.layers
    return "tensor" if of.layers == 1 else "row" if of.layers == p.shape[0] else of.layers


# ---- what has come, against the options that came with it --------------------------------------------------


def is_known(key: str) -> bool:
    """Whether a key of a state is NovoGrad's, and not a user's own."""
    return key in ("step", DIRECTION_AVG_SQ) or key.startswith("exp_avg")


def without_gaps(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state without the empty dicts that torch's unflattening puts where a state dict has nothing."""
    return {key: value for key, value in state.items() if not (isinstance(value, dict) and not value)}


def check(name: str, state: Mapping[str, Any], p: Tensor, group: Group, origin: Origin | None) -> None:
    """Raise ValueError where the state of a parameter is not of the kind that its param group says.

    Args:
        name: of the parameter.
        state: as it has come.
        p: the parameter.
        group: the param group as it will be.
        origin: of the state; None: not known, and nothing is compared.
    """
    # Every optimizer saves second moments: a state of first moments alone was made by hand.
    if origin is None or not any(key in state for key in SECOND_MOMENTS):
        return
    state, saved_group = without_gaps(state), origin.saved
    group = {**origin.present, **group}  # older state dicts have not every option
    _check_second_moments(name, state, p, group, saved_group)
    if "momentum_dtype" in saved_group:
        _check_first_moment(name, state, p, group, saved_group)
    option = _counted_for(group, origin) if "step" not in state else None
    if option is not None:
        raise ValueError(
            f"{name}: its steps were counted when the state was saved ({option}={saved_group[option]!r}), "
            f"and their count (step) has not come. Make the optimizer with {option}={saved_group[option]!r}"
        )


def _counted_for(group: Group, origin: Origin) -> str | None:
    """The option for which the steps of a state were counted, and still are; None: they were not."""
    saved_group = origin.saved
    if saved_group.get("bias_correction"):
        return "bias_correction"
    if not counts_steps(group):
        return None
    if saved_group.get("momentum_dtype", "float32") != "float32" != group["momentum_dtype"]:
        return "momentum_dtype"
    # Weights may have become bfloat16 since: then an optimizer that rounds them has no counts yet.
    rounded = saved_group.get("stochastic_rounding") and not origin.present["stochastic_rounding"]
    return "stochastic_rounding" if rounded and rounds_weights(group) else None


def _check_second_moments(
    name: str, state: Mapping[str, Any], p: Tensor, group: Group, saved_group: Group
) -> None:
    saved = saved_group.get("granularity", group["granularity"])
    missing = not any(key in state for key in SECOND_MOMENTS)
    if missing or _layers(name, p, saved) != _layers(name, p, group["granularity"]):
        preset = f" (preset={saved_group['preset']!r})" if "preset" in saved_group else ""
        came = "no second moment" if missing else "second moments of other layers"
        raise ValueError(
            f"{name}: the state was saved with granularity={saved!r}{preset}, and this NovoGrad has "
            f"granularity={group['granularity']!r}: {came} came. Make the optimizer with the granularity (or "
            "preset) that was saved"
        )


def _check_first_moment(
    name: str, state: Mapping[str, Any], p: Tensor, group: Group, saved_group: Group
) -> None:
    saved, present = saved_group["momentum_dtype"], group["momentum_dtype"]
    if "exp_avg" not in state:
        if group["betas"][0] != 0:
            raise ValueError(
                f"{name}: the state was saved with betas={tuple(saved_group.get('betas', group['betas']))}, "
                "and no first moment (exp_avg) came with it. Make the optimizer with these betas, and load "
                "into it: one with betas=(0, ...) has no place for a first moment"
            )
        return
    if saved == present:  # in another format it was made by hand: it is converted, or refused, as any is
        return
    expected, here = (kept_format(dtype, p.numel()).name for dtype in (saved, present))
    found = _found(state)
    if expected == found or (expected == "bfloat16" and found == "float32"):
        return
    if (expected, found) == ("float32", "bfloat16") and (here != found or group["allow_lossy_load"]):
        return  # made so by hand; or asked for
    raise ValueError(
        f"{name}: the state was saved with momentum_dtype={saved!r}, and what came as exp_avg is "
        f"{found}, as by torch.distributed.checkpoint, which copies without converting into what the present "
        f"optimizer has (momentum_dtype={present!r}). {CONVERT.format(saved=saved)}"
    )


def _found(state: Mapping[str, Any]) -> str:
    """The format in which a first moment has come, by its own dtype; scales may be those of another."""
    exp_avg, scale = state["exp_avg"], state.get("exp_avg_scale")
    if exp_avg.is_floating_point():
        return "bfloat16" if exp_avg.dtype == torch.bfloat16 else "float32"
    if scale is None:
        return f"{str(exp_avg.dtype).removeprefix('torch.')} without scales"
    return format_of(exp_avg, scale).name
