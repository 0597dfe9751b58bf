"""State in and out of the optimizer, without loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from novoscale.checkpoint import FlatState, kinds, requantise, sharded_format
from novoscale.checkpoint.kinds import SECOND_MOMENTS
from novoscale.sharding.dtensors import local_tensor
from novoscale.sharding.layout import Layout
from novoscale.state import formats, momentum, second_moment, step_counts
from novoscale.state.second_moment import DIRECTION_AVG_SQ

# Options that say what the state is, and not what to do with it.
STRUCTURE = ("momentum_dtype", "granularity", "allow_lossy_load", "orthogonalize")


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Have state made inside of ``torch.inference_mode()`` that can be stepped outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def recorded_load(
    optimizer: Optimizer, convert: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Convert the state dict that ``load_state_dict`` takes, as its hooks leave it; yield a record of it."""
    record: dict[str, Any] = {}

    def hook(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        record.update(convert(state_dict))
        return dict(record)

    handle = optimizer.register_load_state_dict_pre_hook(hook)
    try:
        yield record
    finally:
        handle.remove()


def keep_structural_options(
    loaded_groups: Sequence[dict[str, Any]], present_groups: Sequence[Mapping[str, Any]]
) -> None:
    """Have param groups of a state dict keep the present values of the options that say what the state is."""
    for group, present in zip(loaded_groups, present_groups, strict=True):
        group.update({option: present[option] for option in STRUCTURE})


def saved_state(p: Tensor, state: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The state of a parameter as it is saved: the same tensors, where they are in that form already."""
    if sharded_format.in_sharded_format(p, state):
        return dict(state)
    return {**state, **sharded_format.saved(p, state, layout)}


def loaded_state(
    name: str,
    saved: Mapping[str, Any],
    p: Tensor,
    layout: Layout,
    group: Mapping[str, Any],
    origin: kinds.Origin | None = None,
) -> dict[str, Any]:
    """The state of a tensor, from that in a state dict.

    Args:
        name: of the parameter.
        saved: its state; left as it is.
        p: the parameter.
        layout: its layout.
        group: its param group.
        origin: of the state, if that is to be compared with it.

    Raises:
        ValueError: a state that does not fit the parameter.
    """
    if FlatState.STATE in saved:
        _check_sharding(name, saved[FlatState.LAYOUT], layout)
        saved, origin = saved[FlatState.STATE], None
    given, saved = saved, kinds.without_gaps(saved)
    state = {key: value for key, value in saved.items() if not (kinds.is_known(key) or kinds.is_marker(key))}
    made = second_moment.allocate(p, layout) if any(key in saved for key in SECOND_MOMENTS) else {}
    if made:
        _check_second_moments(name, saved, made)
    kinds.check(name, given, p, group, origin)
    if made:
        for key, tensor in made.items():
            local_tensor(tensor).copy_(_local(saved[key]).reshape(_shape(tensor)))
        state.update(made)
    if "step" in saved:
        state["step"] = step_counts.allocate(p, layout)
        target = local_tensor(state["step"])
        target.copy_(_steps(name, saved["step"], target))
    if DIRECTION_AVG_SQ in saved:
        state[DIRECTION_AVG_SQ] = _direction(name, saved[DIRECTION_AVG_SQ], p, layout)
    if "exp_avg" in saved:
        state.update(_first_moment(name, saved, p, layout, group))
    return state


def _check_sharding(name: str, saved: Mapping[str, Any], layout: Layout) -> None:
    """Raise ValueError where a flat tensor was saved with other fragments than it has."""
    fragments = [[s.start, s.stop, s.parameter, s.offset] for s in layout.fragments]
    names = [shard.parameter.name for shard in layout.local_shards]
    if saved["segments"] != fragments or [of["name"] for of in saved["parameters"]] != names:
        raise ValueError(
            f"{name}: the checkpoint was saved with the parameters sharded in another way: of another model, "
            "on another number of ranks or by another stage of ZeRO. Convert it with `novoscale to-universal "
            'IN OUT`, and load it with "checkpoint": {"load_universal": true} in the DeepSpeed config'
        )


def _local(saved: Any) -> Tensor:
    """This rank's part of a saved tensor, or a number as one."""
    return local_tensor(saved) if isinstance(saved, Tensor) else torch.as_tensor(saved, device="cpu")


def _shape(tensor: Tensor) -> torch.Size:
    return local_tensor(tensor).shape


def _check_second_moments(name: str, saved: Mapping[str, Any], made: Mapping[str, Tensor]) -> None:
    """Raise ValueError where saved second moments are not those of the parameter's layers."""
    found = {key: _local(saved[key]).numel() for key in SECOND_MOMENTS if key in saved}
    expected = {key: local_tensor(tensor).numel() for key, tensor in made.items()}
    if found != expected:
        has = " and ".join(f"{key} of {name} has {numel} elements" for key, numel in found.items())
        wanted = " and ".join(f"{numel} in {key}" for key, numel in expected.items())
        raise ValueError(
            f"{has} where NovoGrad keeps one per layer, here {wanted}: this is not the state of a NovoGrad, "
            "or of one whose layers are sharded in another way (the option granularity has to be the same)"
        )


def _steps(name: str, saved: Any, target: Tensor) -> Tensor:
    value = _local(saved)
    if value.numel() == 1:  # other NovoGrads keep one number per parameter
        return value.reshape(()).expand(target.shape)
    if value.numel() != target.numel():
        raise ValueError(
            f"step of {name} has {value.numel()} elements where NovoGrad keeps {target.numel()}: this is not "
            "the state of a NovoGrad, or of one whose layers are others (the option granularity "
            "has to be the same)"
        )
    return value.reshape(target.shape)


def _direction(name: str, saved: Any, p: Tensor, layout: Layout) -> Tensor:
    made, given = second_moment.allocate_direction(p, layout), _local(saved)
    if given.numel() != made.numel():
        raise ValueError(
            f"{DIRECTION_AVG_SQ} of {name} has {given.numel()} elements where NovoGrad keeps one for each "
            f"row of its matrices, {made.numel()}: the option granularity has to be the same"
        )
    return made.copy_(given.reshape(-1))


def _first_moment(
    name: str, saved: Mapping[str, Any], p: Tensor, layout: Layout, group: Mapping[str, Any]
) -> dict[str, Tensor]:
    keys = [key for key in saved if key.startswith("exp_avg") and key not in SECOND_MOMENTS]
    given = {key: local_tensor(saved[key]) for key in keys}
    if given["exp_avg"].is_floating_point() and "exp_avg_small" not in given:
        given.pop("exp_avg_scale", None)  # of the present format: torch has left it as it was
    elif isinstance(p, DTensor) and not isinstance(saved.get("exp_avg_scale", p), DTensor):
        given["exp_avg_scale"] = sharded_format.local_scale(p, given["exp_avg_scale"])
    given = sharded_format.loaded(p, given, layout) or given
    form = formats.format_of(given["exp_avg"], given.get("exp_avg_scale")).name
    expected = _shapes(momentum.allocate(p, layout, form))
    if _shapes(given) != expected:
        raise ValueError(
            f"exp_avg of {name} has the shape {_shapes(given)}, where that of a parameter of "
            f"{tuple(p.shape)} is {expected}: the state belongs to another model or another sharding of it"
        )
    made = momentum.allocate(p, layout, group["momentum_dtype"])
    target = {key: local_tensor(tensor) for key, tensor in made.items()}
    if not (requantise.loses_nothing(given, target) or group["allow_lossy_load"]):
        raise ValueError(
            f"{name}: the first moment in the state dict is {given['exp_avg'].dtype} and momentum_dtype="
            f"{group['momentum_dtype']!r} cannot hold all its digits. Make the optimizer with the format "
            "that was saved, or with allow_lossy_load=True to have it rounded"
        )
    requantise.convert({key: t.to(p.device) for key, t in given.items()}, target, layout)
    return made


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{key} {tuple(local_tensor(tensors[key]).shape)}" for key in sorted(tensors))
