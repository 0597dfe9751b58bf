"""DeepSpeed's checkpoints of a NovoGrad, where a rank cannot write its files or a file is not there.

``engine.save_checkpoint`` writes ``latest`` when rank 0 has written its files, and a rank that cannot write
raises alone: the others wait for it. Here ``latest`` is written, in one piece, when the ranks have agreed
that all files are. In ``engine.load_checkpoint`` a rank whose file is missing raises alone, and the others go
on or wait. Here all raise the same error before anything is loaded.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from packaging.version import Version

from novoscale.checkpoint.errors import CheckpointError
from novoscale.checkpoint.integrity import LATEST, SavedTraining, missing_or_truncated, saved_training

from .engine import extend

# Before, it loads what it saves of BF16_Optimizer at stage 0.
LOADS_ZERO_ONLY = Version("0.18")


def register() -> None:
    """Extend DeepSpeed's engine, where its optimizer is a NovoGrad. Idempotent."""
    extend("save_checkpoint", _save)
    extend("load_checkpoint", _load)


# ---- saving ----------------------------------------------------------------------------------------------


def _save(
    original: Callable[..., Any],
    engine: Any,
    save_dir: Any,
    tag: Any = None,
    client_state: Any = None,
    save_latest: bool = True,
    **more: Any,
) -> Any:
    tag = str(f"global_step{engine.global_steps}" if tag is None else tag)
    more["client_state"] = client_state or {}
    storage = engine.checkpoint_engine
    if getattr(storage, "is_decoupled", lambda: False)():  # it writes later, in processes of its own
        return original(save_dir, tag, save_latest=save_latest, **more)
    call = f"save_checkpoint({str(save_dir)!r}, {tag!r})"
    problems: list[str] = []
    writers = ((storage, "makedirs"), (storage, "save"), (engine, "_copy_recovery_script"))
    with ExitStack() as during:
        for owner, name in writers:
            if hasattr(owner, name):
                during.enter_context(_noting(owner, name, problems))
        result = original(save_dir, tag, save_latest=False, **more)
    _agree(problems, call, _CANNOT_SAVE)
    if save_latest:
        if dist.get_rank() == 0:
            _write_latest(Path(save_dir), tag, problems)
        _agree(problems, call, _CANNOT_SAVE)
    return result


@contextmanager
def _noting(owner: Any, name: str, problems: list[str]) -> Iterator[None]:
    """Have a method note its errors, and go on to where the other ranks wait."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def noting(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            path = next((a for a in (*args, *kwargs.values()) if isinstance(a, str)), "its files")
            problems.append(f"{path} cannot be written to its end: {_brief(error)}")

    setattr(owner, name, noting)
    try:
        yield
    finally:
        delattr(owner, name)  # of the instance: that of its class is there again


def _write_latest(folder: Path, tag: str, problems: list[str]) -> None:
    """In one piece or not at all: the name that is there is of use until the new one is."""
    new = folder / f"{LATEST}.new"
    try:
        new.write_text(tag)
        new.replace(folder / LATEST)
    except OSError as error:
        new.unlink(missing_ok=True)
        problems.append(f"{folder / LATEST} cannot be written: {_brief(error)}")


def _brief(error: Exception) -> str:
    """What the system says, or else torch."""
    first: BaseException = error
    while not isinstance(first, OSError) and first.__context__ is not None:
        first = first.__context__
    said = first if isinstance(first, OSError) else error
    lines = str(said).strip().splitlines() or [""]
    return f"{type(said).__name__}: {lines[0]}"


_CANNOT_SAVE = (
    "What was saved before is as it was, and 'latest' names what it named. Make room, and save again with "
    "another tag"
)


# ---- loading ---------------------------------------------------------------------------------------------


def _load(
    original: Callable[..., Any], engine: Any, load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any
) -> Any:
    if not engine.load_universal_checkpoint() and not engine.use_node_local_storage():
        given = inspect.signature(original).bind(load_dir, tag, *args, **kwargs)
        given.apply_defaults()
        path = _path(Path(load_dir), tag)
        if path is not None:  # else DeepSpeed says that there is none, and loads nothing
            try:
                problems = list(_problems(engine, path, given.arguments))
            except (OSError, ValueError) as error:
                problems = [f"{path} cannot be read: {_brief(error)}"]
            _agree(problems, f"load_checkpoint({str(load_dir)!r})", _CANNOT_LOAD)
    return original(load_dir, tag, *args, **kwargs)


def _path(folder: Path, tag: Any) -> Path | None:
    if tag is None and not (folder / LATEST).is_file():
        return None
    return folder / str((folder / LATEST).read_text().strip() if tag is None else tag)


def _problems(engine: Any, path: Path, given: dict[str, Any]) -> Iterator[str]:
    if not path.is_dir():
        yield f"there is no folder {path}. {_NAMES_COMPLETE.format(path.parent)}"
        return
    missing = missing_or_truncated(path)
    if missing:
        more = f" (and {len(missing) - 3} more)" if len(missing) > 3 else ""
        yield f"{path.name}: {'; '.join(missing[:3])}{more}. {_NAMES_COMPLETE.format(path.parent)}"
    elif given["load_optimizer_states"] and not given["load_module_only"]:
        mp_rank = _model_parallel_rank(engine)
        found, stage = saved_training(path, mp_rank), engine.zero_optimization_stage()
        bf16_at_stage_0 = stage == 0 and isinstance(engine.optimizer, BF16_Optimizer)
        if bf16_at_stage_0 and Version(deepspeed.__version__) >= LOADS_ZERO_ONLY:
            yield _OF_BF16_AT_STAGE_0
        elif found is None:
            yield (
                f"{path.name} has no model-parallel rank {mp_rank}: it was saved with fewer stages of a "
                "pipeline, or fewer tensor-parallel ranks, and can be loaded with as many only"
            )
        elif (found.stage in (0, 3) or stage in (0, 3)) and found.stage != stage:
            yield (
                f"{path.name} was saved under stage {found.stage} of ZeRO, and this training is of stage "
                f"{stage}. {_OTHER_STAGES}"
            )
        elif stage and given["custom_load_fn"] is None and given["load_module_strict"]:
            yield from _of_other_parameters(path.name, found, engine)


def _model_parallel_rank(engine: Any) -> int:
    """The model-parallel rank in the names of this rank's files: in a pipeline the stage."""
    if hasattr(engine, "checkpoint_mp_rank"):
        return int(engine.checkpoint_mp_rank)
    return 0 if engine.mpu is None else int(engine.mpu.get_model_parallel_rank())  # DeepSpeed 0.16


def _of_other_parameters(tag: str, found: SavedTraining, engine: Any) -> Iterator[str]:
    """The first parameter in which a checkpoint and a training differ."""
    expected = [{n: tuple(s) for n, s in group.items()} for group in engine._get_zero_param_shapes()]
    saved = {name: shape for group in found.shapes for name, shape in group.items()}
    here = {name: shape for group in expected for name, shape in group.items()}
    for name in (*here, *saved):
        if here.get(name) != saved.get(name):
            has = f"has the shape {saved[name]} in {tag}" if name in saved else f"is not in {tag}"
            mine = f"{here[name]} here" if name in here else "is not trained here"
            yield f"{name} {has} and {mine}: it is a checkpoint of another model"
            return
    same_ranks = found.ranks == engine.seq_dp_world_size
    if same_ranks and [list(group) for group in found.shapes] != [list(group) for group in expected]:
        yield f"the parameters of {tag} are in other param groups, or in another order, than here"


_OF_BF16_AT_STAGE_0 = (
    "DeepSpeed saves the state of BF16_Optimizer at stage 0 and cannot load it, whatever the optimizer is "
    "(since 0.18; 0.19.8: KeyError: 0). Train with stage 1, which can; load_optimizer_states=False loads the "
    "weights"
)
_CANNOT_LOAD = "Nothing has been loaded"
_NAMES_COMPLETE = "`novoscale latest-good {}` names the last complete checkpoint: load it by tag=..."
_OTHER_STAGES = (
    "DeepSpeed goes from one to the other by a universal checkpoint, or by load_optimizer_states=False"
)


# ---- what the ranks agree on -----------------------------------------------------------------------------


def _agree(problems: list[str], call: str, advice: str) -> None:
    """Raise CheckpointError on every rank, the same, if any has a problem."""
    ranks = problems_of_ranks(problems)
    if ranks:
        said = [f"{_who(of, dist.get_world_size())}{problem}" for problem, of in ranks.items()]
        more = f" (and {len(said) - 3} more)" if len(said) > 3 else ""
        raise CheckpointError(f"{call}: {'; '.join(said[:3])}{more}. {advice}")


def problems_of_ranks(problems: list[str]) -> dict[str, list[int]]:
    """The problems of all ranks, and of each whose it is: a collective."""
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, problems)
    ranks: dict[str, list[int]] = {}
    for rank, found in enumerate(everyones):
        for problem in found:
            ranks.setdefault(problem, []).append(rank)
    return ranks


def _who(ranks: list[int], world: int) -> str:
    if len(ranks) == world:
        return ""
    return f"rank {ranks[0]}: " if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}: "
