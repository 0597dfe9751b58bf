"""The runs by what is asked of them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.tasks.protocol import BASELINE, LARGE_BATCH, Results, Run, scope
from benchmarks.tasks.training import TASKS
from benchmarks.trials import loss_of

Row = Mapping[str, Any]


class Summary(Results):
    """Losses, means of seeds, and what is made of them; None is what was not measured.

    Attributes:
        tasks: those of which something was measured.
        papers: of these, the paper's.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        super().__init__(rows)
        self.tasks = [task for task in TASKS if any(run.task == task for run in self.rows)]
        self.papers = [task for task in self.tasks if scope(task).papers]

    def seeds(self, task: str, method: str) -> list[Row]:
        """The runs of the best trial, with every seed."""
        best = self.best(task, method)
        return [row for run, row in self.rows.items() if best and run == best._replace(seed=run.seed)]

    def mean(self, task: str, method: str, measure: str = "loss") -> float | None:
        """Of the seeds; infinite if one diverged."""
        rows = self.seeds(task, method)
        return statistics.fmean(loss_of(row, measure) for row in rows) if rows else None

    def spread(self, task: str) -> float | None:
        """How far AdamW's seeds are apart; None before there are three."""
        losses = [loss_of(row) for row in self.seeds(task, BASELINE)]
        return max(losses) - min(losses) if len(losses) > 2 else None

    def curve(self, task: str, method: str) -> dict[float, float]:
        """The loss of each learning rate, without weight decay."""
        return self.by_rate(Run(task, method, 0.0))

    def plateau(self, task: str, method: str) -> float | None:
        """By which factor the rates differ that are within AdamW's spread of the method's best rate."""
        losses, spread = self.curve(task, method), self.spread(task)
        if spread is None or self.best(task, method) is None or not losses:
            return None
        good = [lr for lr, loss in losses.items() if loss <= min(losses.values()) + spread]
        return max(good) / min(good)

    def variant(self, task: str, method: str, variant: str) -> float | None:
        """The loss of a variant of the best run; of the large batch at its own best rate."""
        if variant == LARGE_BATCH:
            return min(self.large_batch(task, method).values(), default=None)
        best = self.best(task, method)
        return self.loss.get(best._replace(variant=variant)) if best else None

    def added(self, task: str, method: str, variant: str) -> float | None:
        """What a variant adds to the loss: of the same run; the large batch, to the mean of the seeds."""
        best, loss = self.best(task, method), self.variant(task, method, variant)
        plain = self.mean(task, method) if variant == LARGE_BATCH else self.loss.get(best) if best else None
        return None if loss is None or plain is None else loss - plain

    def share_of_steps(self, task: str, method: str) -> float | None:
        """After which part of the steps the held-out loss was AdamW's at its end; None: not reached.

        Both are means of the seeds, on the part of the held-out data that is evaluated during a training.
        """
        target = self.mean_curve(task, BASELINE)
        curve = self.mean_curve(task, method)
        last = max(curve, default=0)
        reached = [step for step, loss in curve.items() if target and loss <= target[max(target)]]
        return min(reached) / last if reached else None

    def mean_curve(self, task: str, method: str) -> dict[int, float]:
        """The held-out loss over the steps, on average over the seeds."""
        curves = [row["curve"] for row in self.seeds(task, method)]
        points: dict[int, list[float]] = {}
        for step, loss in itertools.chain.from_iterable(curves):
            points.setdefault(step, []).append(math.inf if loss is None else loss)
        return {
            step: statistics.fmean(losses) for step, losses in points.items() if len(losses) == len(curves)
        }

    def fastest(self, task: str, method: str) -> float | None:
        """Milliseconds of the optimizer's step: the lowest median of any run, for others disturb."""
        found = [row["step_ms"] for run, row in self.rows.items() if run[:2] == (task, method)]
        return min((ms for ms in found if ms), default=None)
