"""Real text, as bytes: Python's own standard library, or files of the user's."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor


def load(path: Path | None) -> tuple[Tensor, Tensor]:
    """Training and validation text, uint8.

    Args:
        path: a file, or a folder of which every text file (UTF-8) is taken; None: the Python standard
            library's source. Of several files every twentieth is for validation; of one, its last
            twentieth.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if there is too little text in it.
    """
    files = _standard_library() if path is None else _files(path)
    texts = [text for f in files if (text := _read(f))]
    if len(texts) >= 20:
        train = b"".join(t for i, t in enumerate(texts) if i % 20 != 19)
        validation = b"".join(texts[19::20])
    else:
        joined = b"".join(texts)
        border = len(joined) - len(joined) // 20
        train, validation = joined[:border], joined[border:]
    if len(validation) < 1000:
        raise ValueError(
            f"{path}: only {len(train) + len(validation)} bytes of UTF-8 text in it, need 20,000 or more"
        )
    return tuple(torch.frombuffer(bytearray(t), dtype=torch.uint8) for t in (train, validation))


def windows(text: Tensor, count: int, length: int, seed: int) -> Tensor:
    """``count`` random windows of the text: int64 ``[count, length]``; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(text) - length + 1, (count,), generator=generator)
    return torch.stack([text[s : s + length] for s in starts.tolist()]).long()


def batch(text: Tensor, count: int, length: int, seed: int, step: int) -> Tensor:
    """The windows of one training step; the same for the same seed and step."""
    return windows(text, count, length, seed * 1_000_003 + step)


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    return sorted(f for f in root.rglob("*.py") if not skipped & set(f.relative_to(root).parts))


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"--text {path}: there is no such file or folder")
    return [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())


def _read(file: Path) -> bytes:
    content = file.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return b""
    return content
