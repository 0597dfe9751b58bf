"""Whether a checkpoint is complete: every file of every rank there, and readable to its end.

A training that is killed while it saves leaves some of a checkpoint's files, and DeepSpeed's ``latest`` may
name it already. Files are read from beginning to end, to compare their checksums, but never loaded: of what
is pickled only numbers and names are looked at (``pickle_scan``). What a pipeline or experts save beside the
files of every rank is read where it is there; how many files it should be is not known.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from novoscale.checkpoint import pickle_scan

MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
OPTIMIZER = re.compile(r"(bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
SINGLE = (".pt", ".pth")
METADATA = ".metadata"
LATEST = "latest"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, and what keeps it from being complete.

    Attributes:
        name: of its folder or file.
        problems: what is missing or broken; none: it is complete.
    """

    name: str
    problems: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether it can be loaded."""
        return not self.problems


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the last written one first.

    Folders that DeepSpeed or torch.distributed.checkpoint writes, those that hold such folders, empty ones,
    and files of ``torch.save``.
    """
    found = [path for path in folder.iterdir() if _is_checkpoint(path)]
    return sorted(found, key=lambda path: (_written(path), _natural(path.name)), reverse=True)


def check(path: Path) -> Checkpoint:
    """What is missing or broken of a checkpoint; reads all of it."""
    return Checkpoint(path.name, tuple(_problems(path)))


def missing_or_truncated(path: Path) -> list[str]:
    """What of one of DeepSpeed's checkpoints is missing, or has no end; reads the ends of its files only."""
    return list(_of_deepspeed(path, {file.name for file in path.iterdir()}, ends_only=True))


@dataclass(frozen=True)
class SavedTraining:
    """What one of DeepSpeed's checkpoints says of the training.

    Attributes:
        stage: of ZeRO.
        ranks: over which it was sharded.
        shapes: of the parameters that it trained, by name, for each param group; none without ZeRO.
    """

    stage: int
    ranks: int
    shapes: tuple[dict[str, tuple[int, ...]], ...]


def saved_training(path: Path, mp_rank: int = 0) -> SavedTraining | None:
    """What a complete checkpoint of DeepSpeed's says of the training.

    Args:
        path: the folder of its tag.
        mp_rank: the model-parallel rank whose parameters are asked for; in a pipeline the stage. None is
            returned if the checkpoint has no such rank.
    """
    found = ((MODEL.fullmatch(file.name), file) for file in path.iterdir())
    files = sorted(file for match, file in found if match and int(match[2]) == mp_rank)
    if not files:
        return None
    said = _model_states(files[0])
    groups = [group for group in said.get("param_shapes") or () if isinstance(group, dict)]
    shapes = ({str(name): _shape(of) for name, of in group.items()} for group in groups)
    return SavedTraining(_stage(said), said["dp_world_size"], tuple(shapes))


def _shape(pickled: Any) -> tuple[int, ...]:
    """Of a torch.Size, which is read as an object with its numbers as the argument."""
    return tuple(int(n) for n in getattr(pickled, "args", (pickled,))[0])


def _is_checkpoint(path: Path) -> bool:
    if path.is_file():
        return path.suffix in SINGLE
    if not path.is_dir():
        return False
    files = list(path.rglob("*"))
    return not files or any(file.suffix in (*SINGLE, ".distcp") or file.name == METADATA for file in files)


def _written(path: Path) -> float:
    """When the last of a checkpoint's files was written."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else []
    return max(file.stat().st_mtime for file in files or [path])


def _natural(name: str) -> list[tuple[int, str]]:
    """A key to sort names by, numbers in them by their value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _problems(path: Path) -> Iterator[str]:
    if path.is_file():
        yield from _of_file(path, path.name)
        return
    names = {file.name for file in path.iterdir()}
    if any(map(MODEL.fullmatch, names)) or any(map(OPTIMIZER.fullmatch, names)):
        yield from _of_deepspeed(path, names)
    elif METADATA in names or any(name.endswith(".distcp") for name in names):
        yield from _of_distributed(path, names)
    elif inner := _inner(path):
        for part in inner:
            yield from (f"{part.name}: {problem}" for problem in _problems(part))
    else:
        yield "no file of a checkpoint is there"


def _inner(path: Path) -> list[Path]:
    """The checkpoints that a folder holds, as the Trainer's do; of those that DeepSpeed lists, the latest."""
    if (path / LATEST).is_file():
        return [path / (path / LATEST).read_text().strip()]
    return sorted(part for part in path.iterdir() if _is_checkpoint(part))


# ---- DeepSpeed -------------------------------------------------------------------------------------------


def _of_deepspeed(path: Path, names: set[str], ends_only: bool = False) -> Iterator[str]:
    broken = {}
    for name in sorted(name for name in names if name.endswith(".pt")):
        for problem in _of_file(path / name, name, ends_only):
            broken[name] = problem
    yield from broken.values()
    readable = sorted(name for name in names - broken.keys() if MODEL.fullmatch(name))
    if not readable:
        yield "no readable file *model_states.pt says how many ranks there were"
        return
    try:
        said = _model_states(path / readable[0])
    except ValueError as error:
        yield f"{readable[0]}: {error}"
        return
    yield from (f"{name} is missing" for name in sorted(_expected(said, names) - names))


def _model_states(path: Path) -> dict[str, Any]:
    """What a file of model states says of the training."""
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        with archive.open(name) as file:
            found = pickle_scan.read(io.BytesIO(file.read()))
    if not isinstance(found, dict) or not isinstance(found.get("dp_world_size"), int):
        raise ValueError("it does not say how many ranks there were: not a file of DeepSpeed's model states")
    return found


def _expected(said: dict[str, Any], names: set[str]) -> set[str]:
    """The files that every rank writes."""
    ranks, parallel = range(said["dp_world_size"]), range(int(said.get("mp_world_size") or 1))
    stage = _stage(said)
    sharded = [match for match in map(OPTIMIZER.fullmatch, names) if match]
    expected = {f"mp_rank_{mp:02d}_model_states.pt" for mp in parallel}
    if stage == 3 or any(name.startswith("zero_pp_rank_") and MODEL.fullmatch(name) for name in names):
        expected = {f"zero_pp_rank_{dp}_{name}" for dp in ranks for name in expected}
    if stage > 0 or sharded:
        in_bf16 = isinstance(said.get("ds_config"), dict) and _enabled(said["ds_config"], "bf16", "bfloat16")
        prefix = (sharded[0][1] or "") if sharded else "bf16_" if in_bf16 else ""
        expected |= {
            f"{prefix}zero_pp_rank_{dp}_mp_rank_{mp:02d}_optim_states.pt" for dp in ranks for mp in parallel
        }
    return expected


def _stage(said: dict[str, Any]) -> int:
    """Of ZeRO."""
    section = (said.get("ds_config") or {}).get("zero_optimization")
    return int(section.get("stage", 0)) if isinstance(section, dict) else 0


def _enabled(config: dict[str, Any], *sections: str) -> bool:
    found = (config.get(section) for section in sections)
    return any(isinstance(section, dict) and section.get("enabled") for section in found)


# ---- torch.distributed.checkpoint ------------------------------------------------------------------------


def _of_distributed(path: Path, names: set[str]) -> Iterator[str]:
    if METADATA not in names:
        yield f"{METADATA} is missing, which is written when all files are"
        return
    try:
        with open(path / METADATA, "rb") as file:
            stored = pickle_scan.read(file).storage_data.values()
        places = [(str(s.relative_path), int(s.offset), int(s.length), s) for s in stored]
    except (ValueError, AttributeError) as error:
        yield f"{METADATA}: {error}"
        return
    for name in sorted({name for name, *_ in places}):
        if not (path / name).is_file():
            yield f"{name} is missing"
            continue
        end = max(offset + length for of, offset, length, _ in places if of == name)
        size = (path / name).stat().st_size
        if size < end:
            yield f"{name} has {size:,} bytes of {end:,}"
            continue
        for of, offset, length, s in places:
            if of == name and not getattr(s, "transform_descriptors", None):
                yield from _of_range(path / name, name, offset, length)


class _Range(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        data = self._file.read(min(len(buffer), max(self._length - self._at, 0)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _of_range(path: Path, name: str, offset: int, length: int) -> Iterator[str]:
    """Of one entry: a tensor is a file of ``torch.save``; other objects have no checksum."""
    with open(path, "rb") as file:
        file.seek(offset)
        if file.read(4) == b"PK\x03\x04":
            yield from _of_archive(
                io.BufferedReader(_Range(file, offset, length)), f"{name} at byte {offset:,}"
            )


# ---- files -----------------------------------------------------------------------------------------------


def _of_file(path: Path, name: str, ends_only: bool = False) -> Iterator[str]:
    with open(path, "rb") as file:
        yield from _of_archive(file, name, ends_only)


def _of_archive(file: Any, name: str, ends_only: bool = False) -> Iterator[str]:
    """Of a file of ``torch.save``, which is a zip archive: its end is there, and every checksum is right."""
    size = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            wrong = None if ends_only else archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        yield f"{name} is truncated or no file of torch.save ({size:,} bytes: {error})"
        return
    if wrong is not None:
        yield f"{name} is damaged: the checksum of {wrong} is not that of its bytes"
