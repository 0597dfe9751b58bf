"""One all-reduce of a step, with what the ranks have to know beside the numbers of the layers.

Which gradients there are is a fact of each rank: a rank may have none of a DTensor, for its expert has had no
tokens, and it may have parameters that no other rank has. What an all-reduce carries must not depend on that,
but has to say it. So each DTensor has a *vote*, 1 where it has a gradient; and where the norm of the model is
clipped, each rank says what its other layers add to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from novoscale.sharding.collectives import Collective, ranks_of

# Replicas have the same gradient, but for its rounding: n * sum(x**2) and sum(x)**2 differ by no more.
ALIKE = 1e-9

# Of the layers that an all-reduce does not complete: the sums of those of plain tensors, and of DTensors.
PLAIN, SHARDED = range(2)


@dataclass
class Tally:
    """What has been found so far in a step.

    Attributes:
        uneven: float64 ``[votes]``: above 0 where some ranks have a gradient of a DTensor and others none.
        norm: float64 ``[2]``: what PLAIN and SHARDED layers add to the squared norm of the model, as far as
            it is known; None: it is not asked for.
    """

    uneven: Tensor
    norm: Tensor | None = None


@dataclass
class Exchange:
    """An all-reduce, ready for any number of steps.

    The buffer has ``length`` numbers of the step's vector; the ranks' verdict; sums over scattered layers;
    the votes; and of the norm ``[3, 2]``: of x, what this rank adds to it, x, x**2 and its share of x.

    Attributes:
        collective: the all-reduce.
        slots: int64: the places in the buffer of what this rank has.
        places: int64: their places in the vector of the step.
        votes: int64: which votes are taken; twice each for MAX: whether there is a gradient, whether there is
            none.
        vote: float64: those of this rank.
        expected: float64: what comes of each if the other ranks have said the same.
        ranks: how many there are.
        totals: int64: the places in the buffer of the layers that are complete with this all-reduce; None:
            the norm of the model is not asked for.
        completes: the sums over scattered layers that are.
        share: what this rank adds of what it has in common with other ranks of this group.
    """

    collective: Collective
    slots: Tensor
    places: Tensor
    votes: Tensor
    vote: Tensor
    expected: Tensor
    ranks: int
    totals: Tensor | None = None
    completes: Sequence[int] = ()
    share: float = 1.0

    @property
    def numbers(self) -> int:
        """How many numbers the ranks give."""
        of_norm = 0 if self.totals is None else 6
        return self.collective.length + 1 + len(self.collective.scattered) + len(self.vote) + of_norm

    def reduce(self, buffer: Tensor, tally: Tally) -> Tensor:
        """Complete a buffer, of which the verdict says too whether a gradient is missing on some ranks.

        Args:
            buffer: float64: as far as the votes.
            tally: brought up to date.

        Returns:
            The buffer, complete.
        """
        parts = [buffer]
        if len(self.vote):  # what one group has found is passed on to the others of a mesh
            parts.append(self.vote.masked_fill(tally.uneven[self.votes] > 0, torch.inf))
        if tally.norm is not None:
            parts += [tally.norm, tally.norm.square(), tally.norm * self.share]
        if len(parts) == 1:
            return self.collective.all_reduce(buffer)
        sizes = [len(buffer), len(self.vote)]
        whole = self.collective.all_reduce(torch.cat(parts))
        buffer, votes, norm = torch.split(whole, [*sizes, len(whole) - sum(sizes)])
        if len(self.vote):
            wrong = votes != self.expected
            tally.uneven.index_add_(0, self.votes, wrong.to(tally.uneven.dtype))
            buffer[self.collective.length].add_(wrong.any())
        if tally.norm is not None:
            assert self.totals is not None
            tally.norm = _together(norm.view(3, 2), self.ranks)
            tally.norm[SHARDED].add_(buffer[self.totals].sum())
        return buffer


def _together(norm: Tensor, ranks: int) -> Tensor:
    """What layers outside of an all-reduce add to the norm: of replicas once, of other layers all of them."""
    added, squares, shares = norm.unbind(0)
    alike = ranks * squares - added.square() <= ALIKE * added.square()
    return torch.where(alike, added / ranks, shares)


def ballot(
    collective: Collective, votes: Sequence[tuple[int, bool]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, int]:
    """``Exchange.votes``, ``vote``, ``expected`` and ``ranks``; of each vote its number, and what it says."""
    index = [number for number, _ in votes]
    vote = torch.tensor([has for _, has in votes], dtype=torch.float64, device="cpu")
    ranks = dist.get_world_size(collective.process_group) if votes else 1  # a wrapper's tensors do not vote
    expected = vote * ranks
    if collective.op == dist.ReduceOp.MAX:
        index, vote = [*index, *index], torch.cat((vote, 1 - vote))
        expected = vote
    votes_of = torch.tensor(index, dtype=torch.int64, device="cpu")
    return votes_of.to(device), vote.to(device), expected.to(device), ranks


def shares(collectives: Sequence[Collective]) -> list[float]:
    """``Exchange.share`` of each: what ranks have added up in an earlier group, each of them now has.

    Of a mesh's dimensions, two groups have only this rank in common, and it adds all of it.
    """
    found, known = [], set[int]()
    for collective in collectives:
        ranks = {*ranks_of(collective.process_group)}
        found.append(1 / max(1, len(ranks & known)))
        known |= ranks
    return found
