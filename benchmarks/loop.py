"""One step of a training, the same in every comparison of optimizers: clipped, and on a schedule."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.language_models import schedule


class Loop:
    """Takes the steps of one training.

    Args:
        model: whose gradients are clipped.
        optimizer: of the model.
        steps: of the whole schedule.
        clip: the largest global norm of the gradients; None: they are not clipped.
        warmup: steps of warm-up; None: a twentieth of all.
        clock: gives a moment; a GPU's own, where the host does not wait for the step.

    Attributes:
        scheduler: of the learning rate.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int,
        clip: float | None,
        warmup: int | None = None,
        clock: Callable[[], Any] = time.perf_counter,
    ) -> None:
        self._model, self._optimizer, self._clip, self._clock = model, optimizer, clip, clock
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(steps, warmup))

    def step(self, loss: Tensor) -> tuple[Any, Any]:
        """Take a step from a loss; returns the moments before and after the optimizer's own step."""
        loss.backward()
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        before = self._clock()
        self._optimizer.step()
        after = self._clock()
        self.scheduler.step()
        self._optimizer.zero_grad()
        return before, after
