"""What a task is: data, a model, a loss, a measure, and a budget; and how it is learned."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.loop import Loop


class Task(ABC):
    """One training problem; constructing it loads its data.

    Attributes:
        name: as in the tables and for ``--only``.
        steps: of a training, with ``batch`` samples each.
        clip: of the gradient's global norm; None: not clipped.
        measures: what ``evaluate`` returns, with units.
        data: where the data is from, and its licence.

    Raises:
        MissingDataError: the data has not been fetched.
    """

    name: ClassVar[str]
    steps: ClassVar[int]
    batch: ClassVar[int]
    clip: ClassVar[float | None]
    measures: ClassVar[dict[str, str]]
    data: ClassVar[str]

    @abstractmethod
    def model(self) -> nn.Module:
        """A new model; torch's seed decides its weights."""

    @abstractmethod
    def loss(self, model: nn.Module, count: int, step: int, seed: int) -> Tensor:
        """Mean loss over the ``count`` samples of a step; the same samples for the same seed."""

    @abstractmethod
    def evaluate(self, model: nn.Module, full: bool) -> dict[str, float]:
        """The loss on held-out data, and the other measures; on a part of the data if not ``full``."""


class Step(NamedTuple):
    """One step of a training: the loss before it, and the seconds of the optimizer's step."""

    loss: float
    seconds: float


def learn(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    seed: int,
    count: int | None = None,
    warmup: int | None = None,
) -> Iterator[Step]:
    """Train; end at a loss that is not finite, without a step.

    Args:
        task: what is learned.
        model: is trained.
        optimizer: of the model.
        steps: how many.
        seed: of the samples.
        count: samples of a step; None: the task's batch.
        warmup: steps of it; None: a twentieth of all.
    """
    loop = Loop(model, optimizer, steps, task.clip, warmup)
    for step in range(steps):
        loss = task.loss(model, count or task.batch, step, seed)
        if not loss.isfinite():
            yield Step(loss.item(), math.nan)
            return
        before, after = loop.step(loss)
        yield Step(loss.item(), after - before)


def samples(total: int, count: int, step: int, seed: int) -> Tensor:
    """Which of ``total`` samples a step has: int64 ``[count]``; each epoch takes every sample once."""
    places = torch.arange(step * count, (step + 1) * count)
    first, last = int(places[0]) // total, int(places[-1]) // total
    epochs = [
        torch.randperm(total, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for epoch in range(first, last + 1)
    ]
    return torch.cat(epochs)[places - first * total]
