"""DeepSpeed's checkpoints of a NovoGrad: for any number of ranks, and without DeepSpeed.

DeepSpeed's own converter, ``ds_to_universal``, splits every state as if it were Adam's. :func:`to_universal`
writes what DeepSpeed loads with ``"checkpoint": {"load_universal": true}``, and beside each parameter's
weight its full state, as one process has it. Read in DeepSpeed 0.19.8.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from novoscale.checkpoint import FlatState, kinds, reshard
from novoscale.checkpoint.errors import CheckpointError
from novoscale.checkpoint.integrity import MODEL, OPTIMIZER
from novoscale.sharding.layout import Layout

STATE_FILE = "novograd.state"  # not *.pt: those are read by DeepSpeed as states of Adam's kind
# Of the model, under stages 1 and 2 and under stage 3.
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


@dataclass
class TrainingState:
    """The training state in a DeepSpeed checkpoint, of unsharded parameters.

    Attributes:
        weights: the float32 weights that the optimizer updates, by name.
        states: of the optimizer, by name, as one process saves them.
        param_groups: with the names of their parameters.
        common: the rest of what a rank has saved of the optimizer.
    """

    weights: dict[str, Tensor]
    states: dict[str, dict[str, Any]]
    param_groups: list[dict[str, Any]]
    common: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        """The same in plain form: of the model, and of the optimizer by names."""
        optimizer = {"state": self.states, "param_groups": self.param_groups}
        return {"model": self.weights, "optimizer": optimizer}


def read(folder: Path) -> TrainingState:
    """Put together what the ranks have saved in the folder of a tag.

    Raises:
        CheckpointError: it is none of a NovoGrad under ZeRO, or files of ranks are missing.
    """
    saved = [_optimizer_of(path) for path in _files_of_ranks(folder)]
    parts = [part for of_rank in saved for part in _parts(folder, of_rank)]
    full_states = reshard.gather((layout, state) for layout, state, _ in parts)
    weights: dict[str, Tensor] = {}
    for layout, _, flat in parts:
        for index, shard in enumerate(layout.local_shards):
            name, shape = shard.parameter.name, shard.parameter.shape
            if name not in weights:
                weights[name] = torch.zeros(shape, dtype=flat.dtype, device="cpu")
            weight = weights[name]
            for begin, s in _saved_fragments(layout, flat):
                if s.parameter == index:
                    weight.view(-1)[s.offset : s.offset + s.numel] = flat[begin : begin + s.numel]
    first = saved[0]
    return TrainingState(
        weights,
        {name: full.finished() for name, full in full_states.items()},
        _param_groups(saved),
        {key: value for key, value in first.items() if key not in SHARDED},
    )


def _param_groups(saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The param groups with the names of their parameters, in the order in which they were made."""
    groups = []
    for group in _base(saved[0])["param_groups"]:
        parameters: dict[int, str] = {}
        for of_rank in saved:
            for index in group["params"]:
                recorded = _base(of_rank)["state"][index][FlatState.LAYOUT]["parameters"]
                parameters |= {p["number"]: p["name"] for p in recorded}
        named = {"params": [parameters[number] for number in sorted(parameters)]}
        groups.append({**group, **named})
    return groups


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
        match = OPTIMIZER.fullmatch(path.name)
        if match and int(match[3]) > 0:
            raise CheckpointError(
                f"{path}: of a model under tensor or pipeline parallelism, whose state cannot be put together"
            )
        if match:
            found[int(match[2])] = path
    if not found:
        _refuse_other_folders(folder)
        raise CheckpointError(
            f"{folder}: no *zero_pp_rank_*_optim_states.pt in it: it is not the folder of a checkpoint's "
            "tag, or not one of ZeRO (with stage 0 the ordinary checkpoint loads on any number of ranks)"
        )
    missing = sorted(set(range(max(found) + 1)) - set(found))
    if missing:
        raise CheckpointError(f"{folder}: the files of the ranks {missing} are missing")
    return [found[rank] for rank in sorted(found)]


def _refuse_other_folders(folder: Path) -> None:
    """Raise CheckpointError for what is not there, and for the folder that holds those of the tags."""
    if not folder.exists():
        raise CheckpointError(f"{folder}: there is no such folder. Give that of a checkpoint's tag")
    tags = {path.parent for path in folder.glob("*/*_optim_states.pt")}
    if tags:
        latest = max(tags, key=lambda tag: tag.stat().st_mtime)
        raise CheckpointError(
            f"{folder}: it is not the folder of a checkpoint's tag, but has such folders in it: give one of "
            f"them, of which the latest is {latest}"
        )


def _optimizer_of(path: Path) -> dict[str, Any]:
    try:
        saved = _opened(path)
    except Exception as error:  # torch raises what it likes of a broken file
        raise CheckpointError(f"{path}: it cannot be read: {str(error).splitlines()[0]}") from error
    found: dict[str, Any] = saved["optimizer_state_dict"]
    return found


def _opened(path: Path) -> Any:
    """What a file of DeepSpeed's has; tensors are read when they are used."""
    # Not weights_only: DeepSpeed's own classes are in it.
    return torch.load(path, map_location="cpu", weights_only=False, mmap=True)


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
        yield reshard.layout_of(state[FlatState.LAYOUT]), state[FlatState.STATE], flat.view(-1)


def _saved_fragments(layout: Layout, flat: Tensor) -> Iterator[tuple[int, Any]]:
    """Where each fragment begins in the saved weights, from which DeepSpeed has taken the padding."""
    fragments = sorted(layout.fragments, key=lambda s: s.start)
    compact = flat.numel() < layout.numel and flat.numel() == sum(s.numel for s in fragments)
    place = 0
    for s in fragments:
        yield place if compact else s.start, s
        place += s.numel


# ---- as DeepSpeed loads it -------------------------------------------------------------------------------


def to_universal(source: Path, target: Path) -> None:
    """Write a universal checkpoint of a NovoGrad's training, for any number of ranks and any stage of ZeRO.

    Args:
        source: the folder of a tag of a checkpoint; or a file of :func:`to_state_dict`'s form.
        target: the folder to be made; beside it ``latest_universal`` will name it.

    Raises:
        CheckpointError: see :func:`read`; or ``target`` is there already. Nothing has been written then.
    """
    if target.exists():
        raise CheckpointError(f"{target}: it is there already: give a folder that is not")
    found = read(source) if source.is_dir() or not source.exists() else from_state_dict(source)
    temporary = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    zero = temporary / "zero"
    for name, weight in found.weights.items():
        folder = zero / name
        folder.mkdir(parents=True)
        torch.save({"param": weight, "cat_dim": 0}, folder / "fp32.pt")
        torch.save(found.states[name], folder / STATE_FILE)
    if source.is_dir():
        for path in source.glob("*model_states.pt"):
            shutil.copy2(path, temporary)
    else:
        torch.save(_of_new_model(found.weights), temporary / MODEL_FILES[0])
    version = _for_other_stages(temporary, found.weights)
    groups = {"param_groups": found.param_groups}
    # Stage 3 looks for a step there, stages 1 and 2 for a version.
    step = {"optimizer_state_dict": {**groups, "state": {0: {"step": 0}}}}
    torch.save({"ds_version": version, **found.common, **groups, **step}, zero / "optimizer_state.pt")
    temporary.rename(target)
    (target.parent / "latest_universal").write_text(target.name)


def to_state_dict(source: Path, target: Path) -> None:
    """Write a training as a file that torch loads without DeepSpeed.

    It has "model", the float32 weights by name, and "optimizer", a state dict by names, as
    ``torch.distributed.checkpoint.state_dict.set_optimizer_state_dict`` takes it.

    Args:
        source: the folder of a tag of a checkpoint.
        target: the file.

    Raises:
        CheckpointError: see :func:`read`; or ``target`` is there already.
    """
    if target.exists():
        raise CheckpointError(f"{target}: it is there already: give a file that is not")
    found = read(source).state_dict()
    temporary = target.with_name(f"{target.name}.unfinished")
    torch.save(found, temporary)
    temporary.rename(target)


def from_state_dict(path: Path) -> TrainingState:
    """Read what :func:`to_state_dict` writes, or a user with torch's ``get_optimizer_state_dict``.

    Raises:
        CheckpointError: it is not of that form.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        weights, optimizer = dict(found["model"]), found["optimizer"]
        groups, states = optimizer["param_groups"], kinds.unmarked(optimizer)["state"]
        names = [name for group in groups for name in group["params"]]
        return TrainingState(
            {n: weights[n].float() for n in names}, {n: states[n] for n in names}, groups, {}
        )
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f'{path}: a file with "model" and "optimizer" is needed, a state dict by names with the full '
            f"state of every parameter of the optimizer: {type(error).__name__}: {error}"
        ) from error


def _of_new_model(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What DeepSpeed's engine reads besides, at the beginning of a training."""
    none = dict.fromkeys(("optimizer", "lr_scheduler", "data_sampler", "random_ltd"))
    counts = dict.fromkeys(("skipped_steps", "global_steps", "global_samples"), 0)
    return {
        "module": dict(weights),
        "buffer_names": [],
        "param_shapes": [{name: weight.shape for name, weight in weights.items()}],
        "shared_params": {},
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": importlib.metadata.version("deepspeed"),
        **none,
        **counts,
    }


def _for_other_stages(folder: Path, weights: Mapping[str, Tensor]) -> str:
    """Make the file of the model that stages 1 and 2 load, or the one of stage 3, of the other.

    Returns:
        The version of DeepSpeed that has saved them.
    """
    full, partitioned = (folder / name for name in MODEL_FILES)
    given = full if full.exists() else partitioned
    saved = _opened(given)
    module = dict(saved["module"])
    if given == partitioned:
        names = {**{name: name for name in weights}, **saved.get("shared_params", {})}
        for name, original in names.items():
            module[name] = weights[original].to(module[name].dtype)
        frozen = _frozen(folder, saved.get("frozen_param_shapes") or {})
        torch.save({**saved, "module": module | frozen, "frozen_param_shapes": None}, full)
    else:
        # Of it stage 3 reads all but the parameters.
        torch.save({**saved, "frozen_param_shapes": {}, "frozen_param_fragments": {}}, partitioned)
    return str(saved["ds_version"])


def full_module(folder: Path) -> dict[str, Tensor]:
    """What a universal checkpoint has of a model: buffers and frozen parameters, and maybe all others."""
    full, partitioned = (folder / name for name in MODEL_FILES)
    saved = _opened(full if full.exists() else partitioned)
    module: dict[str, Tensor] = dict(saved["module"])
    if full.exists():
        return module
    kept = {name: module[name] for name in saved["buffer_names"] if name in module}
    return kept | _frozen(folder, saved.get("frozen_param_shapes") or {})


def _frozen(folder: Path, shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    """The frozen parameters of stage 3, of which each rank has saved an equal part."""
    if not shapes:
        return {}
    files = sorted(folder.glob("zero_pp_rank_*_mp_rank_00_model_states.pt"), key=_rank_of)
    saved = [_opened(file)["frozen_param_fragments"] for file in files]
    return {
        name: torch.cat([of[name].view(-1) for of in saved])[: shape.numel()].view(shape)
        for name, shape in shapes.items()
    }


def _rank_of(path: Path) -> int:
    match = MODEL.fullmatch(path.name)
    assert match is not None
    return int(match[1])
