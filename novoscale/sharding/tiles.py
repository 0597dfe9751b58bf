"""Elements of fragments, some at a time: index tables for all of a tensor would take 8 bytes an element."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from novoscale.sharding.layout import Fragment

TILE = 1 << 20  # elements


class Tile(NamedTuple):
    """The elements ``start..stop`` of a tensor: equal parts of consecutive runs of one fragment.

    Attributes:
        start: the first element in the tensor.
        stop: the end.
        fragment: of which they are.
        runs: int64 ``[runs, 1]``: of which of its runs.
        within: int64 ``[elements of each]``: which elements of a run.
    """

    start: int
    stop: int
    fragment: Fragment
    runs: Tensor
    within: Tensor

    @property
    def offsets(self) -> Tensor:
        """Of each run the place of its first element in the parameter: int64 ``[runs, 1]``."""
        return self.fragment.offset + self.runs * self.fragment.stride

    @property
    def positions(self) -> Tensor:
        """The place of each element in the parameter: int64 ``[stop - start]``."""
        return (self.offsets + self.within).view(-1)


def tiles(fragments: Iterable[Fragment], device: torch.device | str = "cpu") -> Iterator[Tile]:
    """The elements of fragments, at most ``TILE`` at a time.

    Args:
        fragments: of one tensor.
        device: where the tables of indices are made.
    """
    for s in fragments:
        run = s.run or s.numel
        together = max(TILE // run, 1)
        for nth in range(0, s.numel // run, together):
            runs = torch.arange(nth, min(nth + together, s.numel // run), device=device)[:, None]
            for left in range(0, run, TILE):
                within = torch.arange(left, min(left + TILE, run), device=device)
                start = s.start + nth * run + left
                yield Tile(start, start + len(runs) * len(within), s, runs, within)
