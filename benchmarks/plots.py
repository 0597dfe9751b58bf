"""Plots, drawn from result files: PNG and SVG of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"AdamW": "#888888", "Adafactor": "#d98032", "NovoGrad": "#1f6fb4"}


def demo(report: dict[str, Any], path: Path) -> None:
    """Loss over steps, and bytes of optimizer state per parameter."""
    runs = list(report["runs"].values())
    figure, (loss, memory) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(3, 2))
    for run in runs:
        color = COLORS[run["optimizer"]]
        lr = run["config"]["optimizer"]["params"]["lr"]
        loss.plot(_smooth(run["train_loss"]), color=color, alpha=0.35, lw=1)
        loss.plot(
            *zip(*run["validation_loss"], strict=True),
            color=color,
            marker="o",
            ms=4,
            label=f"{run['optimizer']}, lr {lr:g}",
        )
    loss.set(xlabel="step", ylabel="loss, nats per byte", title="Validation loss (faint: training)")
    top = [run["train_loss"][min(len(run["train_loss"]) - 1, 10)] for run in runs]
    loss.set_ylim(top=max(top))
    loss.legend(frameon=False)
    names = [run["optimizer"] for run in runs]
    cut = [sum(rank["state_bytes"] for rank in run["ranks"]) / run["parameters"] for run in runs]
    bars = memory.bar(names, cut, color=[COLORS[n] for n in names], width=0.6)
    memory.bar_label(bars, [f"{value:.2f}" for value in cut])
    memory.set(
        ylabel="bytes per parameter, all ranks",
        title=f"Optimizer state under ZeRO-2, {report['ranks']} ranks",
    )
    _save(figure, path, report["provenance"])


def cuts(report: dict[str, Any], path: Path) -> None:
    """How far each cut ends from one process, with the layout and without it."""
    names = {"plain": "NovoGrad that takes each flat partition for a layer", "novoscale": "novoscale"}
    colors = {"plain": "#c0392b", "novoscale": COLORS["NovoGrad"]}
    figure, axis = plt.subplots(figsize=(8, 3.8))
    cases = list(dict.fromkeys((r["stage"], r["ranks"]) for r in report["rows"]))
    for k, (name, label) in enumerate(names.items()):
        worst = [
            next(
                r["worst"]
                for r in report["rows"]
                if (r["optimizer"], r["stage"], r["ranks"]) == (name, *case)
            )
            for case in cases
        ]
        bars = axis.bar(
            [i + 0.4 * (k - 0.5) for i in range(len(cases))], worst, 0.38, label=label, color=colors[name]
        )
        axis.bar_label(bars, [_percent(w) if w > 1e-3 else f"{w:.0e}" for w in worst], size=8)
    axis.set_yscale("log")
    axis.set_ylim(1e-8, 100)
    axis.set_xticks(range(len(cases)), [f"ZeRO-{stage}\n{ranks} ranks" for stage, ranks in cases])
    axis.set(
        ylabel="largest relative deviation of a weight",
        title=f"After {report['steps']} steps: distance from the same training in one process",
    )
    axis.legend(frameon=False, loc="upper left", ncols=2)
    _save(figure, path, report["provenance"])


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _smooth(values: list[float], width: int = 10) -> list[float]:
    return [
        sum(values[max(i - width, 0) : i + 1]) / len(values[max(i - width, 0) : i + 1])
        for i in range(len(values))
    ]


def _save(figure: Any, path: Path, provenance: dict[str, Any]) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    versions = ", ".join(f"{k} {v}" for k, v in provenance["versions"].items() if k in ("torch", "deepspeed"))
    figure.text(
        0.995, 0.005, f"{provenance['command']}; {versions}", ha="right", va="bottom", size=6, color="#777777"
    )
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150)
    plt.close(figure)
