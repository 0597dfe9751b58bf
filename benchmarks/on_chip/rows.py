"""What the parts find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Row = dict[str, Any]


def attempted(row: Row, find: Callable[[], Row]) -> Row:
    """A row with what a function finds; with why, where it fails: the next row may not."""
    try:
        return row | find()
    except Exception as error:  # of Triton, of CUDA, of another package: all are to be told
        return row | {"failed": f"{type(error).__name__}: {error}"}


def name_of(dtype: torch.dtype) -> str:
    """As the tables have it."""
    return str(dtype).removeprefix("torch.")
