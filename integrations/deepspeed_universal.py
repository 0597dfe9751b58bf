"""Loading a universal checkpoint of a NovoGrad under DeepSpeed: see ``deepspeed_checkpoint.to_universal``."""

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

from novoscale import NovoGrad, reassembly
from novoscale.checkpoint import STRUCTURE
from novoscale.layout import Layout

from .deepspeed_checkpoint import MODEL_FILES, STATE_FILE, CheckpointError


class _States(Mapping[str, Any]):
    """The states of whole parameters in a universal checkpoint, each read when it is asked for."""

    def __init__(self, zero: Path) -> None:
        self._zero = zero

    def __getitem__(self, name: str) -> Any:
        path = self._zero / name / STATE_FILE
        if not path.exists():
            raise KeyError(name)
        return torch.load(path, map_location="cpu", weights_only=True)

    def __iter__(self) -> Iterator[str]:
        return (path.parent.relative_to(self._zero).as_posix() for path in self._zero.rglob(STATE_FILE))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def load_universal(wrapper: Any, bound: Sequence[tuple[int, Tensor, Layout]]) -> None:
    """Have a wrapper of DeepSpeed load what :func:`to_universal` has written.

    Args:
        wrapper: of a NovoGrad.
        bound: of each flat tensor the index of its param group, the tensor and its layout.
    """
    original = wrapper._load_universal_checkpoint

    @functools.wraps(original)
    def load(checkpoint_folder: str, load_optimizer_states: bool, load_from_fp32_weights: bool) -> None:
        zero = Path(checkpoint_folder) / "zero"
        groups = wrapper.optimizer.param_groups
        kept = [{option: group[option] for option in STRUCTURE} for group in groups]
        with _on_every_rank():
            saved = _saved_groups(zero, len(groups))
            states = _states(zero, bound, groups) if load_optimizer_states else []
        with _without_adam(wrapper):
            original(checkpoint_folder, load_optimizer_states, load_from_fp32_weights)
        if not load_optimizer_states:
            return
        for group, of_saved, structure in zip(groups, saved, kept, strict=True):
            group.update(
                {k: v for k, v in of_saved.items() if k not in ("params", "param_names")} | structure
            )
        for flat, state in states:
            wrapper.optimizer.state[flat] = state
        if getattr(wrapper, "round_robin_gradients", False):  # for which DeepSpeed's own map is wrong
            _load_weights(zero, bound)

    wrapper._load_universal_checkpoint = load


@contextmanager
def _on_every_rank() -> Iterator[None]:
    """Have an error of one rank raised on all: each reads other parameters, and none may wait for another."""
    error = None
    try:
        yield
    except (ValueError, OSError) as found:
        error = f"{type(found).__name__}: {found}"
    said: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(said, error)
    errors = [text for text in said if text is not None]
    if errors:
        raise CheckpointError(errors[0])


def _states(
    zero: Path, bound: Sequence[tuple[int, Tensor, Layout]], groups: Sequence[Mapping[str, Any]]
) -> list[tuple[Tensor, dict[str, Any]]]:
    """The states of the flat tensors."""
    _refuse_other_optimizers(zero, bound)
    wholes = _States(zero)
    return [(flat, reassembly.scatter(wholes, flat, layout, groups[index])) for index, flat, layout in bound]


def _saved_groups(zero: Path, count: int) -> list[dict[str, Any]]:
    path = zero / "optimizer_state.pt"
    if not path.exists():
        raise CheckpointError(f"{path} is missing: it is not a universal checkpoint, or not a whole one")
    found: list[dict[str, Any]] = torch.load(path, map_location="cpu", weights_only=False)["param_groups"]
    if len(found) != count:
        raise CheckpointError(
            f"{zero.parent}: it has {len(found)} param groups, and the optimizer {count}: make the same ones"
        )
    return found


def _refuse_other_optimizers(zero: Path, bound: Sequence[tuple[int, Tensor, Layout]]) -> None:
    for _, _, layout in bound:
        for h in layout.held:
            folder = zero / h.parameter.name
            if not (folder / "fp32.pt").exists():
                raise CheckpointError(
                    f"{h.parameter.name}: the checkpoint {zero.parent} has nothing of it: it is of another "
                    "model"
                )
            if not (folder / STATE_FILE).exists():
                kept = ", ".join(sorted(path.stem for path in folder.glob("*.pt")))
                raise CheckpointError(
                    f"{h.parameter.name}: the checkpoint {zero.parent} is not of a NovoGrad (it has {kept}). "
                    "Load the weights alone, with load_optimizer_states=False, or convert a NovoGrad's by "
                    "`novoscale to-universal`"
                )


@contextmanager
def _without_adam(wrapper: Any) -> Iterator[None]:
    """Stage 3 loads Adam's states whatever the optimizer: give it nothing for them."""
    original = getattr(wrapper, "load_hp_checkpoint_state", None)
    if original is not None:

        def load(folder: str, key: str, *args: Any, **kwargs: Any) -> Any:
            return torch.empty(0) if key != "fp32" else original(folder, key, *args, **kwargs)

        wrapper.load_hp_checkpoint_state = load
    try:
        yield
    finally:
        vars(wrapper).pop("load_hp_checkpoint_state", None)


def _load_weights(zero: Path, bound: Sequence[tuple[int, Tensor, Layout]]) -> None:
    for _, flat, layout in bound:
        for index, h in enumerate(layout.held):
            path = zero / h.parameter.name / "fp32.pt"
            weight = torch.load(path, map_location="cpu", weights_only=True)["param"].view(-1)
            for s in layout.segments:
                if s.parameter == index:
                    flat.data[s.start : s.stop].copy_(weight[s.offset : s.offset + s.numel])


# ---- what DeepSpeed leaves out ---------------------------------------------------------------------------


def register() -> None:
    """Have the engine restore frozen parameters and buffers too, which DeepSpeed does not."""
    original = DeepSpeedEngine._load_checkpoint
    if hasattr(original, "_novoscale"):
        return

    @functools.wraps(original)
    def load(self: Any, load_dir: str, tag: str, *args: Any, **kwargs: Any) -> Any:
        found = original(self, load_dir, tag, *args, **kwargs)
        if self.load_universal_checkpoint() and isinstance(self.basic_optimizer, NovoGrad):
            _restore_the_rest(self.module, Path(load_dir) / str(tag) / MODEL_FILES[0])
        return found

    load._novoscale = True  # type: ignore[attr-defined]
    DeepSpeedEngine._load_checkpoint = load


def _restore_the_rest(module: torch.nn.Module, path: Path) -> None:
    saved = torch.load(path, map_location="cpu", weights_only=False)["module"]
    with torch.no_grad():
        for name, tensor in module.named_buffers():
            if name in saved:
                tensor.copy_(saved[name])
        for name, p in module.named_parameters():
            if name in saved and not p.requires_grad:
                with deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=hasattr(p, "ds_id")):
                    p.copy_(saved[name])
