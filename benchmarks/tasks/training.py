"""One training of the protocol."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from benchmarks.language_models import schedule
from benchmarks.tasks.finetuning import FineTuning, LoRA
from benchmarks.tasks.images import Images
from benchmarks.tasks.language import Bytes, Long, Words
from benchmarks.tasks.protocol import METHODS, VARIANTS, Run
from benchmarks.tasks.speech import Speech
from benchmarks.tasks.task import Task
from benchmarks.tasks.translation import Translation
from novoscale import NovoGrad
from novoscale.memory import optimizer_state_bytes

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Images, Speech, Translation, Bytes, Words, Long, FineTuning, LoRA)
}
POINTS = (
    10  # of the curve: the loss on a part of the held-out data, before the first step and after each tenth
)
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
    optimizer = make_optimizer(run, model)
    steps = max((steps or task.steps) // variant.batch, 1)
    factor = schedule(steps, None if variant.warmup else 0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses, times = [], []
    curve = [[0, evaluate(task, model, full=False)["loss"]]]
    began = time.perf_counter()
    for step in range(steps):
        loss = task.loss(model, task.batch * variant.batch, step, run.seed)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        if task.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
        scheduler.step()
        optimizer.zero_grad()
        if (step + 1) * POINTS // steps > step * POINTS // steps:
            curve.append([step + 1, evaluate(task, model, full=False)["loss"]])
    measured = evaluate(task, model, full=True) if math.isfinite(losses[-1]) else {"loss": None}
    return {
        **run._asdict(),
        **{name: finite(value) for name, value in measured.items()},
        "steps": steps,
        "curve": [[step, finite(value)] for step, value in curve],
        "training": [finite(value) for value in means(losses)],
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


def make_optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a run, with weight decay on matrices only."""
    how = METHODS[run.method]
    options = {"lr": run.lr, **how.options}
    if how.kind == "AdamMini":
        import pytorch_optimizer

        return pytorch_optimizer.AdamMini(model, weight_decay=run.weight_decay, **options)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": run.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return class_of(how.kind)([group for group in groups if group["params"]], **options)


def class_of(kind: str) -> Callable[..., torch.optim.Optimizer]:
    """A class of optimizers by its name."""
    if kind == "NovoGrad":
        return NovoGrad
    if kind == "Lion":
        import pytorch_optimizer

        return pytorch_optimizer.Lion
    if kind == "AdamW8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit
    return getattr(torch.optim, kind)


def means(losses: list[float]) -> list[float]:
    """At most ``PARTS`` means of as many stretches."""
    width = max(len(losses) // PARTS, 1)
    return [statistics.fmean(losses[i : i + width]) for i in range(0, len(losses), width)]


def finite(value: float | None) -> float | None:
    """None for what JSON has not; five digits."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
