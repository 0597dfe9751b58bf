"""Loading under DeepSpeed what ``novoscale.checkpoint.deepspeed.to_universal`` has written of a NovoGrad."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from novoscale import NovoGrad
from novoscale.checkpoint import reshard
from novoscale.checkpoint.deepspeed import STATE_FILE, full_module
from novoscale.checkpoint.errors import CheckpointError
from novoscale.checkpoint.imported import from_adam, state_dicts
from novoscale.checkpoint.state_dict import STRUCTURE
from novoscale.sharding.layout import Layout

from .saving import problems_of_ranks


class _FullStates(Mapping[str, Any]):
    """The full states of parameters in a universal checkpoint, each read when it is asked for.

    Args:
        zero: the folder ``zero`` of the checkpoint.
        layout: of a flat tensor that holds some of them.
        group: its param group.
        saved: that in the checkpoint.
    """

    def __init__(
        self, zero: Path, layout: Layout, group: Mapping[str, Any], saved: Mapping[str, Any]
    ) -> None:
        self._zero, self._group, self._saved = zero, group, saved
        self._shapes = {shard.parameter.name: shard.parameter.shape for shard in layout.local_shards}

    def __getitem__(self, name: str) -> Any:
        path = self._zero / name / STATE_FILE
        if path.exists():
            return torch.load(path, map_location="cpu", weights_only=True)
        keys = ("exp_avg", "exp_avg_sq", "fp32")
        state = {key: _saved_tensor(self._zero / name / f"{key}.pt", self._shapes[name]) for key in keys}
        if (self._zero / name / "step.pt").exists():
            state["step"] = torch.load(self._zero / name / "step.pt", map_location="cpu", weights_only=True)
        weight = state.pop("fp32")
        return from_adam.novograd_state(name, state, self._saved, self._group, weight)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes and (self._zero / str(name) / "fp32.pt").exists()


def _saved_tensor(path: Path, shape: Sequence[int]) -> Tensor:
    """A tensor of a parameter as DeepSpeed's converter has written it: with what it is, or flat."""
    found = torch.load(path, map_location="cpu", weights_only=False)
    tensor: Tensor = found["param"] if isinstance(found, dict) else found
    return tensor.view(tuple(shape))


def load_universal(wrapper: Any, bound: Sequence[tuple[int, Tensor, Layout]]) -> None:
    """Have a wrapper of DeepSpeed load what :func:`to_universal` has written.

    Or, with ``allow_lossy_load``, what DeepSpeed's own converter has written of an Adam.

    Args:
        wrapper: of a NovoGrad.
        bound: of each flat tensor the index of its param group, the tensor and its layout.
    """
    original = wrapper._load_universal_checkpoint

    @functools.wraps(original)
    def load(checkpoint_folder: str, load_optimizer_states: bool, load_from_fp32_weights: bool) -> None:
        zero = Path(checkpoint_folder) / "zero"
        groups = wrapper.optimizer.param_groups
        with _on_every_rank():
            saved = _saved_groups(zero, len(groups))
            options = [_options(*both) for both in zip(saved, groups, strict=True)]
            states = _states(zero, bound, groups, saved) if load_optimizer_states else []
        with _without_adam(wrapper):
            original(checkpoint_folder, load_optimizer_states, load_from_fp32_weights)
        for group, of_group in zip(groups, options, strict=True):
            group.update(of_group)
        for flat, state in states:
            wrapper.optimizer.state[flat] = state
        if getattr(wrapper, "round_robin_gradients", False):  # for which DeepSpeed's own map is wrong
            _load_weights(zero, bound)

    wrapper._load_universal_checkpoint = load


def _options(saved: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a param group after loading: of an Adam's only those that mean the same."""
    if state_dicts.is_own({"param_groups": [saved]}):
        found = {**saved, **{option: present[option] for option in STRUCTURE}}
    else:
        found = state_dicts.options_from_adam({"params": [], **saved}, present)
    return {option: value for option, value in found.items() if option not in ("params", "param_names")}


@contextmanager
def _on_every_rank() -> Iterator[None]:
    """Have an error of one rank raised on all: each reads other parameters, and none may wait for another."""
    error = None
    try:
        yield
    except (ValueError, OSError) as found:
        error = f"{type(found).__name__}: {found}"
    for text in problems_of_ranks([] if error is None else [error]):
        raise CheckpointError(text)


def _states(
    zero: Path,
    bound: Sequence[tuple[int, Tensor, Layout]],
    groups: Sequence[Mapping[str, Any]],
    saved: Sequence[Mapping[str, Any]],
) -> list[tuple[Tensor, dict[str, Any]]]:
    """The states of the flat tensors."""
    found = []
    for index, flat, layout in bound:
        for shard in layout.local_shards:
            _check(shard.parameter.name, zero, groups[index])
        full_states = _FullStates(zero, layout, groups[index], saved[index])
        found.append((flat, reshard.scatter(full_states, flat, layout, groups[index])))
    return found


def _check(name: str, zero: Path, group: Mapping[str, Any]) -> None:
    """Raise CheckpointError if there is no state of a parameter, or one that is not to be taken."""
    kept = {path.name for path in (zero / name).glob("*")}
    if "fp32.pt" not in kept:
        raise CheckpointError(
            f"{name}: the checkpoint {zero.parent} has nothing of it: it is of another model"
        )
    is_adams = {"exp_avg.pt", "exp_avg_sq.pt"} <= kept
    if STATE_FILE not in kept and not (is_adams and group["allow_lossy_load"]):
        raise CheckpointError(
            f"{name}: the checkpoint {zero.parent} is not of a NovoGrad (it has {', '.join(sorted(kept))}). "
            "That of an Adam is taken over with allow_lossy_load=True; the weights alone, with "
            "load_optimizer_states=False"
        )


def _saved_groups(zero: Path, count: int) -> list[dict[str, Any]]:
    path = zero / "optimizer_state.pt"
    if not path.exists():
        raise CheckpointError(f"{path} is missing: it is not a universal checkpoint, or not a complete one")
    saved = torch.load(path, map_location="cpu", weights_only=False)
    found: list[dict[str, Any]] = saved["param_groups"]
    if len(found) != count:
        raise CheckpointError(
            f"{zero.parent}: it has {len(found)} param groups, and the optimizer {count}: make the same ones"
        )
    if state_dicts.is_own(saved):
        return found
    # Of stage 3 the only count of Adam's steps.
    step = saved.get("optimizer_state_dict", {}).get("state", {}).get(0, {}).get("step")
    return found if step is None else [{"step": step, **group} for group in found]


@contextmanager
def _without_adam(wrapper: Any) -> Iterator[None]:
    """Stage 3 loads Adam's states whatever the optimizer: give it nothing for them."""
    original = getattr(wrapper, "load_hp_checkpoint_state", None)
    if original is not None:

        def load(folder: str, key: str, *args: Any, **kwargs: Any) -> Any:
            return torch.empty(0, device="cpu") if key != "fp32" else original(folder, key, *args, **kwargs)

        wrapper.load_hp_checkpoint_state = load
    try:
        yield
    finally:
        vars(wrapper).pop("load_hp_checkpoint_state", None)


def _load_weights(zero: Path, bound: Sequence[tuple[int, Tensor, Layout]]) -> None:
    for _, flat, layout in bound:
        for index, shard in enumerate(layout.local_shards):
            path = zero / shard.parameter.name / "fp32.pt"
            weight = _saved_tensor(path, shard.parameter.shape).view(-1)
            for s in layout.fragments:
                if s.parameter == index:
                    flat.data[s.start : s.stop].copy_(weight[s.offset : s.offset + s.numel])


# ---- what DeepSpeed leaves out ---------------------------------------------------------------------------


def register() -> None:
    """Have the engine restore frozen parameters and buffers too, which DeepSpeed does not."""
    original = DeepSpeedEngine.load_checkpoint
    if hasattr(original, "_restores_the_rest"):
        return

    @functools.wraps(original)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        path, client_state = original(self, *args, **kwargs)
        if path and self.load_universal_checkpoint() and isinstance(self.basic_optimizer, NovoGrad):
            _restore_the_rest(self.module, Path(path).parent)
        return path, client_state

    load._restores_the_rest = True  # type: ignore[attr-defined]
    DeepSpeedEngine.load_checkpoint = load


def _restore_the_rest(module: torch.nn.Module, folder: Path) -> None:
    buffers = dict(module.named_buffers())
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    saved = full_module(folder) if buffers or frozen else {}
    with torch.no_grad():
        for name, tensor in buffers.items():
            if name in saved:
                tensor.copy_(saved[name])
        for name, p in frozen.items():
            if name in saved:
                with deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=hasattr(p, "ds_id")):
                    p.copy_(saved[name])
