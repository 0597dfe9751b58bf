"""DeepSpeed's checkpoints of a NovoGrad: for any number of ranks, and without DeepSpeed.

DeepSpeed's own converter, ``ds_to_universal``, cuts every state as if it were Adam's. :func:`to_universal`
writes what DeepSpeed loads with ``"checkpoint": {"load_universal": true}``, and beside each parameter's
weight the state of the whole parameter as one process has it. Read in DeepSpeed 0.19.8.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from novoscale import reassembly
from novoscale.checkpoint import STRUCTURE, FlatState
from novoscale.layout import Layout

STATE_FILE = "novograd.state"  # not *.pt: those are read by DeepSpeed as states of Adam's kind
# Of the model, under stages 1 and 2 and under stage 3.
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")


class CheckpointError(ValueError):
    """A checkpoint that cannot be converted or loaded; says what of it, and what to do."""


@dataclass
class Checkpoint:
    """The training state in a DeepSpeed checkpoint, of whole parameters.

    Attributes:
        weights: the float32 weights that the optimizer updates, by name.
        states: of the optimizer, by name, as one process saves them.
        param_groups: as saved.
        common: the rest of what a rank has saved of the optimizer.
        stage: of ZeRO.
    """

    weights: dict[str, Tensor]
    states: dict[str, dict[str, Any]]
    param_groups: list[dict[str, Any]]
    common: dict[str, Any]
    stage: int


def read(folder: Path) -> Checkpoint:
    """Put together what the ranks have saved in the folder of a tag.

    Raises:
        CheckpointError: it is none of a NovoGrad under ZeRO, or files of ranks are missing.
    """
    saved = [_optimizer_of(path) for path in _files_of_ranks(folder)]
    parts = [part for of_rank in saved for part in _parts(folder, of_rank)]
    wholes = reassembly.gather((layout, state) for layout, state, _ in parts)
    weights: dict[str, Tensor] = {}
    for layout, _, flat in parts:
        for index, h in enumerate(layout.held):
            weight = weights.setdefault(h.parameter.name, torch.zeros(h.parameter.shape, dtype=flat.dtype))
            for begin, s in _segments(layout, flat):
                if s.parameter == index:
                    weight.view(-1)[s.offset : s.offset + s.numel] = flat[begin : begin + s.numel]
    first = saved[0]
    return Checkpoint(
        weights,
        {name: whole.finished() for name, whole in wholes.items()},
        _base(first)["param_groups"],
        {key: value for key, value in first.items() if key not in SHARDED},
        int(first.get("zero_stage", 1)),
    )


SHARDED = (
    "base_optimizer_state",
    "param_slice_mappings",
    "single_partition_of_fp32_groups",
    "fp32_flat_groups",
    "optimizer_state_dict",
)


def _files_of_ranks(folder: Path) -> list[Path]:
    """The files of the ranks' optimizers, in order."""
    found = {}
    for path in folder.glob("*_optim_states.pt"):
        match = RANK.search(path.name)
        if match and int(match[2]) > 0:
            raise CheckpointError(
                f"{path}: of a model under tensor or pipeline parallelism, whose state cannot be put together"
            )
        if match:
            found[int(match[1])] = path
    if not found:
        raise CheckpointError(
            f"{folder}: no *zero_pp_rank_*_optim_states.pt in it: it is not the folder of a checkpoint's "
            "tag, or not one of ZeRO (with stage 0 the ordinary checkpoint loads on any number of ranks)"
        )
    missing = sorted(set(range(max(found) + 1)) - set(found))
    if missing:
        raise CheckpointError(f"{folder}: the files of the ranks {missing} are missing")
    return [found[rank] for rank in sorted(found)]


def _optimizer_of(path: Path) -> dict[str, Any]:
    try:
        # Not weights_only: DeepSpeed's own classes are in it.
        saved = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    except Exception as error:  # torch raises what it likes of a broken file
        raise CheckpointError(f"{path}: it cannot be read: {str(error).splitlines()[0]}") from error
    found: dict[str, Any] = saved["optimizer_state_dict"]
    return found


def _base(saved: Mapping[str, Any]) -> Any:
    """The state dict of the optimizer itself."""
    return saved.get("base_optimizer_state") or saved.get("optimizer_state_dict")


def _parts(folder: Path, saved: Mapping[str, Any]) -> Iterator[tuple[Layout, Mapping[str, Any], Tensor]]:
    """Of each flat tensor of a rank: its layout, state and weights."""
    base = _base(saved)
    flats = saved.get("single_partition_of_fp32_groups", saved.get("fp32_flat_groups"))
    if flats is None or len(base["state"]) != len(flats):
        raise CheckpointError(f"{folder}: it has {len(base['state'])} states for {len(flats or ())} tensors")
    for index, flat in enumerate(flats):
        state = base["state"][index]
        if FlatState.STATE not in dict(state):
            raise CheckpointError(
                f"{folder}: the state of its optimizer ({', '.join(map(str, state))}) is not NovoGrad's: "
                "convert it with DeepSpeed's ds_to_universal"
            )
        yield reassembly.layout_of(state[FlatState.LAYOUT]), state[FlatState.STATE], flat.view(-1)


def _segments(layout: Layout, flat: Tensor) -> Iterator[tuple[int, Any]]:
    """Where each segment begins in the saved weights, from which DeepSpeed has taken the padding."""
    segments = sorted(layout.segments, key=lambda s: s.start)
    compact = flat.numel() < layout.numel and flat.numel() == sum(s.numel for s in segments)
    place = 0
    for s in segments:
        yield place if compact else s.start, s
        place += s.numel


# ---- as DeepSpeed loads it -------------------------------------------------------------------------------


def to_universal(source: Path, target: Path) -> None:
    """Write a universal checkpoint of a NovoGrad's training, for any number of ranks.

    Args:
        source: the folder of a tag of a checkpoint.
        target: the folder to be made; beside it ``latest_universal`` will name it.

    Raises:
        CheckpointError: see :func:`read`; or ``target`` is there already. Nothing has been written then.
    """
    if target.exists():
        raise CheckpointError(f"{target}: it is there already: give a folder that is not")
    found = read(source)
    temporary = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    zero = temporary / "zero"
    for name, weight in found.weights.items():
        folder = zero / name
        folder.mkdir(parents=True)
        torch.save({"param": weight, "cat_dim": 0}, folder / "fp32.pt")
        torch.save(found.states[name], folder / STATE_FILE)
    groups = {"param_groups": found.param_groups}
    for path in source.glob("*model_states.pt"):
        shutil.copy2(path, temporary)
    version = _for_other_stages(temporary, found.weights)
    # Stage 3 looks for a step there, stages 1 and 2 for a version.
    step = {"optimizer_state_dict": {**groups, "state": {0: {"step": 0}}}}
    torch.save({"ds_version": version, **found.common, **groups, **step}, zero / "optimizer_state.pt")
    temporary.rename(target)
    (target.parent / "latest_universal").write_text(target.name)


def _for_other_stages(folder: Path, weights: Mapping[str, Tensor]) -> str:
    """Make the file of the model that stages 1 and 2 load, or the one of stage 3, of the other.

    Not for stage 3 where there are frozen parameters: it would need a part of them for each rank.

    Returns:
        The version of DeepSpeed that has saved them.
    """
    whole, partitioned = (folder / name for name in MODEL_FILES)
    given = whole if whole.exists() else partitioned
    saved = torch.load(given, map_location="cpu", weights_only=False)
    module = dict(saved["module"])
    names = {**{name: name for name in weights}, **saved.get("shared_params", {})}
    if given == partitioned:
        frozen = _frozen(folder, saved.get("frozen_param_shapes") or {})
        for name, original in names.items():
            module[name] = weights[original].to(module[name].dtype)
        torch.save({**saved, "module": module | frozen, "frozen_param_shapes": None}, whole)
    elif all(name in names or name in saved["buffer_names"] for name in module):
        empty = {name: module[name].new_empty(0) for name in names if name in module}
        nothing: dict[str, Any] = {"frozen_param_shapes": {}, "frozen_param_fragments": {}}
        torch.save({**saved, **nothing, "module": module | empty}, partitioned)
    return str(saved["ds_version"])


def _frozen(folder: Path, shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    """The frozen parameters of stage 3, of which each rank has saved an equal part."""
    if not shapes:
        return {}
    files = sorted(folder.glob("zero_pp_rank_*_mp_rank_00_model_states.pt"), key=_rank_of)
    saved = [torch.load(f, map_location="cpu", weights_only=False)["frozen_param_fragments"] for f in files]
    return {
        name: torch.cat([of[name].view(-1) for of in saved])[: shape.numel()].view(shape)
        for name, shape in shapes.items()
    }


def _rank_of(path: Path) -> int:
    return int(path.name.removeprefix("zero_pp_rank_").partition("_")[0])


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
        saved = _saved_groups(zero, len(groups))
        kept = [{option: group[option] for option in STRUCTURE} for group in groups]
        states = []
        if load_optimizer_states:
            _refuse_other_optimizers(zero, bound)
            states = [
                (flat, reassembly.scatter(_States(zero), flat, layout, groups[index]))
                for index, flat, layout in bound
            ]
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
