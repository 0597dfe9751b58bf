"""The pictures of docs/tasks.md, drawn from the result files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm

from benchmarks import trials
from benchmarks.plots import numbers
from benchmarks.tasks.protocol import BASELINE, LARGE_BATCH, METHODS, ROBUSTNESS, scope
from benchmarks.tasks.summary import Summary
from novoscale.tools.plotting import save

FARTHEST = 32  # spreads of AdamW's seeds that a colour tells apart
STYLES = {
    "SGD": ("#7fb069", "s"),
    "AdamW": ("#4d4d4d", "o"),
    "NAdamW": ("#9a9a9a", "^"),
    "Adafactor": ("#d98032", "D"),
    "NovoGrad, paper": ("#9ecae1", "v"),
    "NovoGrad, adamw": ("#1f6fb4", "o"),
    "NovoGrad, adamw, int8": ("#1f6fb4", "P"),
    "NovoGrad, adamw, int4": ("#1f6fb4", "X"),
    "NovoGrad, adamw, scaled": ("#17becf", "*"),
    "NovoGrad, muon": ("#6a3d9a", "o"),
    "NovoGrad, muon, int8": ("#6a3d9a", "P"),
    "NovoGrad, muon, int4": ("#6a3d9a", "X"),
    "AdamW8bit": ("#4d4d4d", "P"),
    "Adam-mini": ("#b07aa1", "<"),
    "Lion": ("#c0392b", ">"),
}


def draw(rows: Sequence[Mapping[str, Any]], source: Mapping[str, Any], out: Path) -> None:
    """Every picture of which something is measured."""
    summary = Summary(rows)
    if summary.papers:
        results(summary, source, out / "tasks_results")
        rates(summary, source, out / "tasks_rates")
    if any(run.variant for run in summary.rows):
        robustness(summary, source, out / "tasks_robustness")
    if "long" in summary.tasks:
        long(summary, source, out / "tasks_long")


def results(summary: Summary, source: Mapping[str, Any], path: Path) -> None:
    """How far each optimizer's mean is from AdamW's, in spreads of AdamW's seeds."""
    figure, axis = plt.subplots(figsize=(9, 4.2))
    names = [name for name in METHODS if name != BASELINE]
    for k, task in enumerate(summary.papers):
        base, spread = summary.mean(task, BASELINE), summary.spread(task)
        if base is None or not spread:
            continue
        for n, name in enumerate(names):
            mean = summary.mean(task, name)
            if mean is not None and math.isfinite(mean):
                axis.plot((mean - base) / spread, n, marker=f"${k + 1}$", color=_color(name), ms=8)
    axis.axvspan(-0.5, 0.5, color="#eeeeee", zorder=0)
    axis.axvline(0, color="black", lw=0.8)
    _in_spreads(axis, (-4, -2, -1, 0, 1, 2, 4, 8, 16))
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(
        xlabel=f"loss less AdamW's, over the spread of AdamW's seeds (left is better)\n{_key(summary)}",
        title="Each at its own best learning rate and decay; mean of the seeds",
    )
    save(figure, path, source)


def rates(summary: Summary, source: Mapping[str, Any], path: Path) -> None:
    """Loss over the learning rate, as a factor of each optimizer's best."""
    figure, axes = plt.subplots(1, len(summary.papers), figsize=(3 * len(summary.papers), 3.6), squeeze=False)
    for axis, task in zip(axes[0], summary.papers, strict=True):
        for name in METHODS:
            losses = {lr: v for lr, v in summary.curve(task, name).items() if math.isfinite(v)}
            if METHODS[name].like is None and losses:
                best = trials.best(losses)
                color, marker = STYLES[name]
                axis.plot(
                    [lr / best for lr in losses], list(losses.values()), marker=marker, ms=4, color=color,
                    label=name,
                )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set(title=task, xlabel="learning rate / best")
        _limit_top(axis)
    axes[0][0].set_ylabel("held-out loss")
    known = {line.get_label(): line for axis in axes[0] for line in axis.lines}
    figure.legend(known.values(), known.keys(), frameon=False, fontsize=8, ncols=len(known), loc="lower left")
    save(figure, path, source, bottom=0.07)


def robustness(summary: Summary, source: Mapping[str, Any], path: Path) -> None:
    """What each change adds to the loss, a cell for each optimizer and task; colours are in spreads."""
    changes = (*ROBUSTNESS, LARGE_BATCH)
    names = [name for name in METHODS if METHODS[name].like is None and METHODS[name].robust]
    figure, axes = plt.subplots(1, len(changes), figsize=(3.3 * len(changes), 3.4), sharey=True)
    for axis, change in zip(axes, changes, strict=True):
        added = np.array([[summary.added(t, name, change) for t in summary.papers] for name in names], float)
        spreads = np.array(
            [summary.spread(task) for task in summary.papers], float
        )  # NaN where there is none
        scale = SymLogNorm(linthresh=1, vmin=-FARTHEST, vmax=FARTHEST)
        numbers(axis, added, added / spreads, scale, lambda x: f"{x:+.2g}")
        axis.set_title(change, size=10)
        axis.set_yticks(range(len(names)), names)
        axis.set_xticks(range(len(summary.papers)), summary.papers, rotation=30, ha="right", size=8)
        axis.tick_params(length=0)
    figure.suptitle(
        "Added to the loss, one seed. Red: higher than before, blue: lower; in spreads of AdamW's seeds",
        size=10,
    )
    save(figure, path, source)


def long(summary: Summary, source: Mapping[str, Any], path: Path) -> None:
    """The loss of the long run, and how far each is from AdamW's."""
    figure, axis = plt.subplots(figsize=(9, 3.6))
    for name in scope("long").methods:
        for row in summary.seeds("long", name):
            points = [(step, loss) for step, loss in row["curve"] if step and loss is not None]
            color, marker = STYLES[name]
            axis.plot(*zip(*points, strict=True), color=color, marker=marker, label=name, alpha=0.8)
    axis.set(xlabel="step", ylabel="held-out loss, nats per token", title="20,000 steps")
    axis.legend(frameon=False)
    save(figure, path, source)


def _key(summary: Summary) -> str:
    return ", ".join(f"{k + 1} {task}" for k, task in enumerate(summary.papers))


def _in_spreads(axis: Axes, ticks: Sequence[float]) -> None:
    """A scale of spreads of AdamW's seeds: even around 0, logarithmic beyond 2."""
    axis.set_xscale("symlog", linthresh=2, linscale=1)
    axis.set_xticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
    axis.minorticks_off()


def _color(name: str) -> str:
    return STYLES[name][0]


def _limit_top(axis: Axes) -> None:
    """Leave out of sight what is far from the best: it would press the rest together."""
    values = [float(v) for line in axis.lines for v in line.get_ydata()]
    low, high = min(values), max(values)
    axis.set_ylim(low - 0.03 * low, min(high, low * 1.6))
