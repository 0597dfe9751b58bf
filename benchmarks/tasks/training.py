"""One training of the protocol."""

from __future__ import annotations

import math
import statistics
import time
from functools import cache
from typing import Any

import torch
from torch import nn

from benchmarks.tasks.finetuning import FineTuning, LoRA
from benchmarks.tasks.images import Images
from benchmarks.tasks.language import Bytes, Long, Words
from benchmarks.tasks.protocol import METHODS, VARIANTS, Run
from benchmarks.tasks.speech import Speech
from benchmarks.tasks.task import Task, learn
from benchmarks.tasks.translation import Translation
from benchmarks.trials import finite, make_optimizer
from novoscale.memory import optimizer_state_bytes

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Images, Speech, Translation, Bytes, Words, Long, FineTuning, LoRA)
}
# Of the curve, beside the one before the first step: the loss on a part of the held-out data.
POINTS = 10
PARTS = 50  # of the training loss


@cache
def load(name: str) -> Task:
    """A task with its data, once in a process."""
    return TASKS[name]()


def train(run: Run, steps: int | None = None) -> dict[str, Any]:
    """One run: what it measured at its end, as JSON has it.

    Args:
        run: what to train.
        steps: instead of the task's own.
    """
    torch.set_num_threads(1)
    task, variant = load(run.task), VARIANTS[run.variant]
    torch.manual_seed(run.seed)
    model = task.model()
    scale_matrices(model, variant.init)
    how = METHODS[run.method]
    optimizer = make_optimizer(how.kind, model, run.weight_decay, lr=run.lr, **how.options)
    steps = max((steps or task.steps) // variant.batch, 1)
    count, warmup = task.batch * variant.batch, None if variant.warmup else 0
    curve = [[0, evaluate(task, model, full=False)["loss"]]]
    began = time.perf_counter()
    losses, times = [], []
    for step in learn(task, model, optimizer, steps, seed=run.seed, count=count, warmup=warmup):
        losses.append(step.loss)
        if not math.isfinite(step.loss):
            break
        times.append(step.seconds)
        if len(times) * POINTS // steps > (len(times) - 1) * POINTS // steps:
            curve.append([len(times), evaluate(task, model, full=False)["loss"]])
    measured = evaluate(task, model, full=True) if math.isfinite(losses[-1]) else {"loss": None}
    return {
        **run._asdict(),
        **{name: digits(value) for name, value in measured.items()},
        "steps": steps,
        "curve": [[step, digits(value)] for step, value in curve],
        "training": [digits(value) for value in means(losses)],
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "state_bytes": optimizer_state_bytes(optimizer).total,
        "step_ms": 1e3 * statistics.median(times) if times else None,
        "seconds": round(time.perf_counter() - began, 1),
    }


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, full: bool) -> dict[str, float]:
    """The task's measures, with the model in evaluation mode meanwhile."""
    model.eval()
    measured = task.evaluate(model, full)
    model.train()
    return measured


@torch.no_grad()
def scale_matrices(model: nn.Module, factor: float) -> None:
    """Multiply the initial values of all parameters that have rows and columns."""
    for p in model.parameters():
        if p.ndim > 1:
            p.mul_(factor)


def means(losses: list[float]) -> list[float]:
    """At most ``PARTS`` means of as many stretches."""
    width = max(len(losses) // PARTS, 1)
    return [statistics.fmean(losses[i : i + width]) for i in range(0, len(losses), width)]


def digits(value: float | None) -> float | None:
    """Five digits of a number; None for what is not finite."""
    return None if (value := finite(value)) is None else float(f"{value:.5g}")
