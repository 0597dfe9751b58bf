"""The picture of ``novoscale memory``: what an optimizer keeps, and what a step takes besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from novoscale.memory.comparison import Row
from novoscale.memory.shardings import TITLES
from novoscale.tools.plotting import COLORS, save

BASELINE = 8.0  # bytes per parameter: AdamW's, float32
WRONG = "#c0392b"


def memory(report: dict[str, Any], path: Path) -> None:
    """Bars of the state and of the step's transient memory, or of released gradients.

    The optimizer with the most state, under whichever sharding, is on top. A cell that could not be measured
    says so; an optimizer that could not be measured under any sharding is left out.

    Args:
        report: what ``novoscale memory`` writes as JSON.
        path: of the files, without suffix.
    """
    rows = [row for row in report["rows"] if "why" not in row]
    shardings = list(dict.fromkeys((row["sharding"], row["ranks"]) for row in report["rows"]))
    most: dict[str, float] = {}
    for row in rows:
        most[row["optimizer"]] = max(most.get(row["optimizer"], 0.0), _state(row))
    names = sorted(most, key=lambda name: most[name])
    height = 1.6 + len(names) * (0.1 + 0.17 * len(shardings))
    figure, axes = plt.subplots(1, 2, figsize=(11, height), sharey=True, width_ratios=(3, 2))
    for k, sharding in enumerate(shardings):
        found = {
            row["optimizer"]: row for row in report["rows"] if (row["sharding"], row["ranks"]) == sharding
        }
        _bars(
            axes,
            names,
            found,
            place=0.4 - 0.8 * (k + 0.5) / len(shardings),
            height=0.74 / len(shardings),
            shade=k,
        )
    state, transient = axes
    released = report.get("release", False)
    on = "a GPU" if any(row["device"] == "cuda" for row in rows) else "a CPU"
    state.set_yticks(range(len(names)), names, size=9)
    state.set(
        xlabel="bytes per parameter, of all ranks", title="Optimizer state, and what it saves of AdamW's"
    )
    transient.set(
        xlabel="bytes per parameter, on one rank",
        title="Gradients, the most at once" if released else f"What a step takes besides, on {on}",
    )
    state.margins(x=0.42, y=0.01)
    transient.margins(x=0.25)
    model = f"{report['model']}, {rows[0]['parameters'] / 1e6:.4g}M parameters" if rows else report["model"]
    figure.suptitle(f"{model}, {report['precision']}, measured", size=11)
    _legend(figure, shardings, any(row.get("same_training") is False for row in rows))
    save(figure, path, report["provenance"], bottom=0.45 / height)


def _bars(
    axes: Any, names: list[str], found: dict[str, Row], *, place: float, height: float, shade: int
) -> None:
    for y, row in ((y, found[name]) for y, name in enumerate(names) if name in found):
        if "why" in row:
            axes[0].text(0, y + place, " stops with an error", size=7, va="center", color=WRONG)
            continue
        wrong = row.get("same_training") is False
        for axis, value in zip(axes, (_state(row), _besides(row)), strict=True):
            bar = axis.barh(
                y + place,
                value,
                height,
                color=_color(row["optimizer"]),
                alpha=1 / (1 + 0.7 * shade),
                hatch="////" if wrong else None,
                edgecolor=WRONG if wrong else None,
                lw=0,
            )
            label = _saving(value) if axis is axes[0] else f" {value:.2f}"
            axis.bar_label(bar, [label + ("  not the same training" if wrong and axis is axes[0] else "")],
                           size=7, color=WRONG if wrong else "black")  # fmt: skip


def _color(name: str) -> str:
    return next((color for kind, color in COLORS.items() if kind in name), COLORS["AdamW"])


def _state(row: Row) -> float:
    return float(row["state_bytes_per_parameter"])


def _besides(row: Row) -> float:
    held = row["gradient_bytes_per_rank"] if row.get("release") else row["transient_bytes"]
    return float(held / row["parameters"])


def _saving(held: float) -> str:
    """The bytes, and what part of AdamW's they save."""
    saved = 1 - held / BASELINE
    return f" {held:.2f}" + (f", saves {saved:.0%}" if saved >= 0.005 else "")


def _legend(figure: Any, shardings: list[tuple[str, int]], wrong: bool) -> None:
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=COLORS["AdamW"], alpha=1 / (1 + 0.7 * shade))
        for shade in range(len(shardings))
    ]
    labels = [
        TITLES[sharding] + (f", {ranks} ranks" if sharding != "none" else "") for sharding, ranks in shardings
    ]
    if wrong:
        handles.append(plt.Rectangle((0, 0), 1, 1, fc="#cccccc", hatch="////", ec=WRONG, lw=0))
        labels.append("the sharding changes the training")
    figure.legend(
        handles, labels, frameon=False, fontsize=8, ncols=6, loc="lower left", bbox_to_anchor=(0, 0.02)
    )
