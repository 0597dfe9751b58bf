"""Index arithmetic on whole tables, int64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def repeated(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Each index as often as ``counts`` says, and which of its repetitions each is: int64, on the CPU."""
    index = torch.repeat_interleave(counts)
    return index, torch.arange(len(index), device="cpu") - (counts.cumsum(0) - counts)[index]


def finder(keys: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that finds integers among ``keys``, int64 ``[keys]``: the place of each, or -1."""
    ordered, order = torch.sort(keys)

    def find(wanted: Tensor) -> Tensor:
        if not len(ordered):
            return torch.full_like(wanted, -1)
        place = torch.searchsorted(ordered, wanted).clamp(max=len(ordered) - 1)
        return torch.where(ordered[place] == wanted, order[place], -1)

    return find
