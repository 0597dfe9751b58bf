"""Blocks of the first moment, and those of which several pieces exist.

A block is 128 consecutive elements of a parameter, counted from its first element, and has one scale: see
``state.formats``. Where a boundary splits a block, each rank (or each run of a rank's elements) has a piece
of it. The pieces agree in each step on the block's largest magnitude, so that all have the scale of the
unsharded block: a MAX all-reduce over the ranks that share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from novoscale.sharding.indices import finder

BLOCK = 128  # elements
# Parameters of fewer elements (of all ranks) keep float32 where others are in blocks: they are biases and
# norms, which need little of a model's memory, and whose few numbers matter.
SMALL = 4096

_NUMBERS = 1 << 40  # more than a parameter has blocks


@dataclass(frozen=True, eq=False)
class ShardedBlocks:
    """The blocks of a tensor's parameters of which several pieces exist, in an order.

    Attributes:
        parameter: int64 ``[blocks]``: of each, the index of its parameter in ``Layout.local_shards``; -1
            where this rank holds nothing of it.
        number: int64 ``[blocks]``: which block of its parameter it is.
        stages: the process groups that have to agree, one after another, each with the blocks (places in that
            order, int64) that its ranks agree on, in the same order on every rank.
    """

    parameter: Tensor
    number: Tensor
    stages: tuple[tuple[Any, Tensor], ...] = ()

    def __len__(self) -> int:
        return len(self.number)

    def lookup(self) -> Callable[[Tensor, Tensor], Tensor]:
        """A function that finds blocks: their places, or -1, from their parameters and numbers."""
        find = finder(self.parameter * _NUMBERS + self.number)
        return lambda parameter, number: find(parameter * _NUMBERS + number)


def _int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


NONE = ShardedBlocks(_int64([]), _int64([]))


def none() -> ShardedBlocks:
    """No block is sharded."""
    return NONE


def sharded_at_ends(start: Tensor, length: Tensor, numel: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks that have elements within and beside one of some runs of consecutive elements.

    Args:
        start: int64 ``[runs]``: of each, the first element in its parameter.
        length: int64 ``[runs]``: how many.
        numel: int64 ``[runs]``: of the parameter.

    Returns:
        int64: the number of each such block, and the run. A block is there once for each run.
    """
    stop = start + length
    first, last = start // BLOCK, stop // BLOCK
    begins_within = (start % BLOCK > 0) & (length > 0)
    ends_within = (stop % BLOCK > 0) & (stop < numel) & (length > 0) & ~(begins_within & (first == last))
    run = torch.arange(len(start), device="cpu")
    return torch.cat((first[begins_within], last[ends_within])), torch.cat(
        (run[begins_within], run[ends_within])
    )


def of_partition(
    numels: Sequence[int], pieces: Sequence[tuple[int, int, int]], local: Sequence[int], process_group: Any
) -> ShardedBlocks:
    """The sharded blocks of parameters that lie in pieces over the ranks of one process group.

    Args:
        numels: elements of each parameter.
        pieces: of all ranks: parameter, first element in it, how many.
        local: for each parameter its index in ``Layout.local_shards``, or -1.
        process_group: of the ranks.
    """
    table = torch.tensor(pieces, dtype=torch.int64, device="cpu").view(-1, 3)
    numel = _int64(numels)[table[:, 0]]
    table, numel = table[numel >= SMALL], numel[numel >= SMALL]
    parameter, start, length = table.unbind(1)
    number, run = sharded_at_ends(start, length, numel)
    found = torch.unique(torch.stack((parameter[run], number), dim=1), dim=0)
    stage = (process_group, torch.arange(len(found), device="cpu"))
    return ShardedBlocks(_int64(local)[found[:, 0]], found[:, 1], (stage,))


def of_mesh(
    blocks: Tensor, coordinates: Tensor, mine: Sequence[int], process_groups: Sequence[Any]
) -> ShardedBlocks:
    """The sharded blocks of a parameter that lies over the ranks of a mesh, of which this rank has to know.

    The ranks agree along one dimension after another. Where a block is sharded along several, a rank between
    others passes on what it has been told, of blocks of which it holds nothing too.

    Args:
        blocks: int64 ``[pieces]``: of all pieces of sharded blocks, which block it is.
        coordinates: int64 ``[pieces, dimensions]``: where in the mesh it is.
        mine: this rank's coordinates.
        process_groups: of this rank, along each dimension.
    """
    numbers, of_piece = torch.unique(blocks, return_inverse=True)

    def having(pieces: Tensor) -> Tensor:
        """Of each block, whether one of these pieces is of it."""
        found = torch.zeros(len(numbers), dtype=torch.bool, device="cpu")
        return found.index_fill_(0, of_piece[pieces], True)

    stages: list[tuple[Any, Tensor]] = []
    known = _int64([])
    for dim, process_group in enumerate(process_groups):
        at = coordinates[:, dim]
        first = torch.zeros_like(numbers).scatter_(0, of_piece, at)
        shared = having(at != first[of_piece])
        # Along the dimensions after this one a rank of the group has a piece; those before have been told.
        shared &= having((coordinates[:, dim + 1 :] == _int64(mine[dim + 1 :])).all(dim=1))
        for before in range(dim):
            shared &= having(coordinates[:, before] == mine[before])
        stages.append((process_group, shared.nonzero().view(-1)))
        known = torch.cat((known, stages[-1][1]))
    here = having((coordinates == _int64(mine)).all(dim=1))
    known = torch.unique(torch.cat((known, here.nonzero().view(-1))))
    places = tuple((group, torch.searchsorted(known, shared)) for group, shared in stages)
    return ShardedBlocks(here[known].long() - 1, numbers[known], places)
