"""What the optimizer of a sharded run is really given; and the same, given to one process.

Under a sharding the wrapper has averaged, unscaled and clipped the gradients that reach ``step``, in another
order than one process does. Given to one process, these gradients leave one question: does the optimizer
compute from shards what it computes from unsharded parameters?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from novoscale.sharding.layout import Fragment
from novoscale.verify import runs
from novoscale.verify.config import Setup

# By id of a tensor that the optimizer steps: where its elements lie. ``Fragment.parameter`` is the number of
# the parameter among the trained ones of the model.
Where = Mapping[int, Sequence[Fragment]]
# Number of the parameter, its first element here, values.
Pieces = list[tuple[int, int, Tensor]]


@dataclass(frozen=True)
class Bits:
    """Whether the sharded optimizer computes what one process computes, given the same gradients.

    Attributes:
        identical: every bit of every weight that the optimizer keeps, on every rank.
        elements: how many have been compared.
        different: how many of each parameter differ, most first; only of those in which some do.
    """

    identical: bool
    elements: int
    different: dict[str, int]


class Recorder:
    """Writes down what the optimizer of this rank is given, from its construction to :meth:`end`.

    A wrapper that steps its param groups one by one, or steps zero gradients when it is made, is recorded as
    it does so.

    Args:
        folder: of the files; the same for all ranks.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._optimizer: Optimizer | None = None
        self._given: list[tuple[Tensor, Tensor]] = []
        self._tensors: dict[int, Tensor] = {}
        self._steps = 0
        self._hook = register_optimizer_step_pre_hook(self._note)

    def _note(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._optimizer is None:
            self._optimizer = optimizer
        if optimizer is not self._optimizer:  # one inside another, such as Lookahead's
            return
        for group in optimizer.param_groups:
            for p in group["params"]:
                self._tensors[id(p)] = p
                if p.grad is not None:
                    self._given.append((p, runs.gathered(p.grad.detach()).clone()))

    def end_step(self, where: Where) -> None:
        """What has been given since the last call is one step; if nothing has, it is none."""
        _save(self._folder, f"step{self._steps}", self._pieces(self._given, where))
        self._given.clear()
        self._steps += 1

    def end(self, where: Where, weights: dict[str, Tensor]) -> None:
        """Write down the optimizer's own weights, and the full ``weights`` of the model; record no more."""
        self._hook.remove()
        kept = self._pieces([(p, runs.gathered(p.detach())) for p in self._tensors.values()], where)
        _save(self._folder, "end", kept)
        if dist.get_rank() == 0:
            weights = {name: weight.cpu() for name, weight in weights.items()}
            outcome = {"weights": weights, "threads": torch.get_num_threads()}
            torch.save(outcome, self._folder / "outcome")

    def _pieces(self, tensors: Sequence[tuple[Tensor, Tensor]], where: Where) -> Pieces:
        """The fragments of parameters that tensors consist of, given what to take from each."""
        return [
            (s.parameter, s.offset, values.reshape(-1)[s.start : s.stop].to("cpu", copy=True))
            for p, values in tensors
            for s in where.get(id(p), ())
        ]


def full_tensors(params: Sequence[Tensor]) -> Where:
    """Where the elements lie if the optimizer is given the model's own parameters."""
    return {id(p): [Fragment(0, p.numel(), number)] for number, p in enumerate(params)}


def replay(setup: Setup, folder: Path) -> Bits | None:
    """Give one process the gradients that a sharded run was given, and compare the optimizer's weights.

    Its weights have the dtype of those of the sharded run: float32 masters where there are such. A parameter
    that was given no gradient is given none.

    Returns:
        None if what the optimizer keeps was not recorded, all of it.
    """
    kept = _load(setup, folder, "end")
    if not kept:
        return None
    dtype = kept[0][2].dtype
    model, _ = runs.make_model(setup)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    params = [nn.Parameter(p.detach().to(dtype)) for p in named.values()]
    optimizer = runs.make_optimizer(setup, params)
    for step in range(len(list(folder.glob("step*_rank0")))):
        optimizer.zero_grad()
        for number, offset, values in _load(setup, folder, f"step{step}"):
            p = params[number]
            if p.grad is None:
                p.grad = torch.zeros_like(p, memory_format=torch.contiguous_format)
            p.grad.view(-1)[offset : offset + values.numel()] = values
        if any(p.grad is not None for p in params):
            optimizer.step()
    known, differs = (
        [torch.zeros(p.numel(), dtype=torch.bool, device="cpu") for p in params] for _ in range(2)
    )
    for number, offset, values in kept:
        there = slice(offset, offset + values.numel())
        known[number][there] = True
        differs[number][there] |= _bits(values) != _bits(params[number].detach().reshape(-1)[there].cpu())
    if not all(k.all() for k in known):
        return None
    counts = {name: int(d.sum()) for name, d in zip(named, differs, strict=True) if d.any()}
    different = dict(sorted(counts.items(), key=lambda item: item[1], reverse=True))
    return Bits(not different, sum(p.numel() for p in params), different)


def _bits(values: Tensor) -> Tensor:
    # As integers: a zero is not a negative zero, and a NaN is what it is.
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def _save(folder: Path, what: str, pieces: Pieces) -> None:
    torch.save(pieces, folder / f"{what}_rank{dist.get_rank()}")


def _load(setup: Setup, folder: Path, what: str) -> Pieces:
    """What the ranks have saved, of all of them."""
    return [piece for rank in range(setup.ranks) for piece in torch.load(folder / f"{what}_rank{rank}")]
