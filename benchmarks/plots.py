"""Plots, drawn from result files: PNG and SVG of each."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from numpy.typing import NDArray

from benchmarks import trials
from novoscale.tools.plotting import COLORS, save

BASELINE = "torch AdamW, fused"
GIB = 2**30
# Of the parts of a training's memory: from the darkest, which is always there, to what can be saved.
PARTS = {"weights": "#4d4d4d", "gradients": "#9a9a9a", "state": "#d98032"}
OVER = "#c0392b"
SPANS = {"weights": "#4d4d4d", "forward": "#7fb069", "backward": COLORS["NovoGrad"]}


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
    held = [sum(rank["state_bytes"] for rank in run["ranks"]) / run["parameters"] for run in runs]
    bars = memory.bar(names, held, color=[COLORS[n] for n in names], width=0.6)
    memory.bar_label(bars, [f"{value:.2f}" for value in held])
    memory.set(
        ylabel="bytes per parameter, all ranks",
        title=f"Optimizer state under ZeRO-2, {report['ranks']} ranks",
    )
    save(figure, path, report["provenance"])


def sharding(report: dict[str, Any], path: Path) -> None:
    """How far each ZeRO stage ends from one process, with the layout and without it."""
    figure, axis = plt.subplots(figsize=(9, 3.8))
    stages = [f"stage {n}" for n in (1, 2, 3)]
    cases = [(stage, ranks) for stage in stages for ranks in (2, 3, 4)]
    for k, (key, label, color) in enumerate(
        (
            ("plain", "NovoGrad that takes each flat partition for a layer", "#c0392b"),
            ("rows", "novoscale", COLORS["NovoGrad"]),
        )
    ):
        found = {(r["configuration"], r["ranks"]): r["worst"] for r in report[key]}
        places = [i + 0.4 * (k - 0.5) for i in range(len(cases))]
        worst = [found[case] for case in cases]
        bars = axis.bar(places, worst, 0.38, label=label, color=color)
        axis.bar_label(bars, [_short(w) for w in worst], size=8)
    axis.set_yscale("log")
    axis.set_ylim(1e-8, 1e3)
    ticks = [f"ZeRO-{stage[-1]}\n{ranks} ranks" for stage, ranks in cases]
    axis.set_xticks(range(len(cases)), ticks, size=8)
    axis.set(ylabel="largest relative deviation of a weight")
    axis.set_title(f"After {report['steps']} steps: distance from the same training in one process")
    axis.legend(frameon=False, loc="upper left", ncols=2)
    save(figure, path, report["provenance"])


def forms(report: dict[str, Any], path: Path) -> None:
    """How far each form of NovoGrad ends from one process under each wrapper, over what passes."""
    rows = [row for row in report["forms"] if "worst" in row]
    names = list(dict.fromkeys(row["form"] for row in rows))
    figure, axis = plt.subplots(figsize=(9, 0.6 + 0.38 * len(names)))
    for identical, marker, label in ((True, "o", "the same bits"), (False, "x", "other bits")):
        shown = [row for row in rows if (row["different"] == 0) is identical]
        axis.plot(
            [row["worst"] / row["bound"] for row in shown],
            [names.index(row["form"]) for row in shown],
            marker,
            label=label,
            alpha=0.6,
            color=COLORS["NovoGrad"] if identical else "#c0392b",
        )
    axis.axvline(1, color="black", lw=0.8)
    axis.set_xscale("log")
    axis.set_yticks(range(len(names)), names, size=8)
    axis.invert_yaxis()
    wrappers = len({row["configuration"] for row in rows})
    axis.set(xlabel="distance from one process over what passes (float32: 2e-5; rounded: another seed)")
    axis.set_title(
        f"NovoGrad under {wrappers} wrappers, 3 ranks, {report['steps']} steps", loc="right", size=11
    )
    axis.legend(frameon=False, fontsize=8)
    save(figure, path, report["provenance"])


def others(report: dict[str, Any], path: Path) -> None:
    """How far each optimizer under ZeRO-2 ends from one process."""
    rows = sorted((r for r in report["others"] if r["worst"] is not None), key=lambda r: -r["worst"])
    figure, axis = plt.subplots(figsize=(9, 3.8))
    names = [r["optimizer"] for r in rows]
    colors = [COLORS["NovoGrad"] if n in ("NovoGrad", "novoscale NovoGrad") else "#888888" for n in names]
    bars = axis.barh(names, [r["worst"] for r in rows], color=colors, height=0.65)
    axis.bar_label(bars, [f" {_short(r['worst'])}" for r in rows], size=8)
    axis.set_xscale("log")
    axis.set_xlim(1e-8, 1e3)
    axis.set(xlabel="largest relative deviation of a weight")
    title = f"ZeRO-2 on 3 ranks, {report['steps']} steps: distance from the same optimizer in one process"
    axis.set_title(title, loc="right", size=11)
    save(figure, path, report["provenance"])


def speed(run: dict[str, Any], path: Path) -> None:
    """Time of a step over that of torch's fused AdamW, for each shape, without and with clipping."""
    shapes = list(run["shapes"])
    names = list(dict.fromkeys(r["optimizer"] for shape in shapes for r in run["shapes"][shape]["rows"]))
    size = (3.5 + 1.6 * len(shapes), 2 + 0.3 * len(names))
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True)
    for axis, clip in zip(axes, (False, True), strict=True):
        _times_over_baseline(axis, [run["shapes"][shape]["rows"] for shape in shapes], names, clip)
        axis.set_xticks(range(len(shapes)), shapes, size=8, rotation=40, ha="right")
        axis.set_yticks(range(len(names)), names, size=8)
        axis.set_title("with clipping" if clip else "without clipping", size=10)
    title = f"time of a step over {BASELINE}: {run['device']}, {run['dtype']} weights and gradients"
    figure.suptitle(title, size=11)
    save(figure, path, run["provenance"])


def _times_over_baseline(axis: Axes, shapes: list[list[Any]], names: list[str], clip: bool) -> None:
    """A field of numbers: blue for less than the baseline, red for more; empty where none was measured."""
    field = np.full((len(names), len(shapes)), np.nan)
    for column, rows in enumerate(shapes):
        times = {r["optimizer"]: r["ms"] for r in rows if r["clip"] == clip and "ms" in r}
        for name in times if BASELINE in times else ():
            field[names.index(name), column] = times[name] / times[BASELINE]
    numbers(axis, field, np.log2(field), Normalize(-2, 2), lambda x: f"{x:.2f}" if x < 10 else f"{x:.0f}")


def numbers(
    axis: Axes, field: NDArray[Any], shade: NDArray[Any], norm: Normalize, text: Callable[[float], str]
) -> None:
    """A field of numbers: blue where ``shade`` is low in ``norm``, red where it is high; empty where NaN."""
    axis.imshow(shade, cmap="RdBu_r", norm=norm, aspect="auto")
    for (row, column), value in np.ndenumerate(field):
        if not np.isnan(value):
            color = "white" if abs(norm(shade[row, column]) - 0.5) > 0.3 else "black"
            axis.text(column, row, text(value), ha="center", va="center", size=7, color=color)


def chip(report: dict[str, Any], path: Path) -> None:
    """Bandwidth of each pass over that of a copy, and time of a step over that of torch's fused AdamW."""
    figure, (of_passes, of_steps) = plt.subplots(1, 2, figsize=(13, 7))
    rows = [r for r in report["parts"].get("passes", {}).get("rows", []) if "update, of a copy" in r]
    for k, (name, color) in enumerate((("update", COLORS["NovoGrad"]), ("statistic", "#9ec5e5"))):
        shares = [r[f"{name}, of a copy"] for r in rows]
        places = [i + 0.4 * (k - 0.5) for i in range(len(rows))]
        bars = of_passes.barh(places, shares, 0.38, label=name, color=color)
        of_passes.bar_label(bars, [f" {share:.2f}" for share in shares], size=7)
    of_passes.axvline(1, color="#777777", lw=0.8)
    of_passes.set_yticks(range(len(rows)), [f"{r['weights']}, {r['form']}" for r in rows], size=8)
    of_passes.invert_yaxis()
    of_passes.margins(x=0.1)
    of_passes.set(xlabel="GB/s over those of a copy", title="Passes: weights, first moment")
    rows = [r for r in report["parts"].get("steps", {}).get("rows", []) if "of AdamW fused" in r]
    cases = list(dict.fromkeys((r["shape"], r["weights"]) for r in rows))
    names = {case: [r for r in rows if (r["shape"], r["weights"]) == case] for case in cases}
    _bars(of_steps, [{r["optimizer"]: r["of AdamW fused"] for r in names[case]} for case in cases])
    of_steps.set_yticks(range(len(cases)), [f"{shape},\n{weights}" for shape, weights in cases], size=8)
    of_steps.invert_yaxis()
    of_steps.set(xlabel=f"time of a step over {BASELINE}", title="The whole step")
    for axis in (of_passes, of_steps):
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.08)}
        axis.legend(frameon=False, fontsize=8, ncols=4, **below)
    figure.suptitle(report["gpu"]["name"], size=11)
    save(figure, path, report["provenance"])


def quality(results: dict[str, dict[str, Any]], steps: int, source: dict[str, Any], path: Path) -> None:
    """Validation loss of each optimizer: over its learning rates, and of all seeds at the best of them.

    Args:
        results: for each model and optimizer, "rates": the loss by learning rate; "seeds": the losses.
        steps: of a run.
        source: the provenance.
        path: without suffix.
    """
    figure, axes = plt.subplots(2, len(results), figsize=(12, 8.6), squeeze=False, height_ratios=(3, 2))
    for (model, cases), (over_rates, over_seeds) in zip(results.items(), axes.T, strict=True):
        swept = {name: found for name, found in cases.items() if len(found["rates"]) > 1}
        for k, (name, found) in enumerate(swept.items()):
            color = COLORS.get(name, plt.get_cmap("tab20")(k))
            # Rates as multiples of the best one: those of Lion or Adafactor mean something else.
            best = trials.best(found["rates"])
            rows = [(lr / best, loss) for lr, loss in sorted(found["rates"].items()) if loss < 10]
            over_rates.plot(*zip(*rows, strict=True), marker="o", ms=3, lw=1.2, color=color, label=name)
        over_rates.set_xscale("log", base=2)
        over_rates.set(title=model, xlabel="learning rate over the best of it", ylabel="loss, nats per byte")
        lowest = min(min(found["rates"].values()) for found in swept.values())
        over_rates.set_ylim(lowest - 0.03, lowest + 1.1)
        over_rates.legend(frameon=False, fontsize=6, ncols=2, loc="upper right")
        names = list(cases)[::-1]
        for place, name in enumerate(names):
            losses = cases[name]["seeds"]
            over_seeds.plot(losses, [place] * len(losses), "o", ms=4, alpha=0.6, color="#4477aa")
            over_seeds.plot([statistics.mean(losses)] * 2, [place - 0.3, place + 0.3], color="#333333")
        over_seeds.set_yticks(range(len(names)), names, size=7)
        over_seeds.set(xlabel=f"loss after {steps} steps: seeds at the best rate, and their mean")
    save(figure, path, source)


CHANGEOVER_COLORS = {
    "AdamW": COLORS["AdamW"],
    "NovoGrad, float32": COLORS["NovoGrad"],
    "NovoGrad, int8": "#7fb2dd",
    "AdamW, then NovoGrad, float32": "#c0392b",
    "AdamW, then NovoGrad, int8": "#e59a8f",
    "AdamW, then NovoGrad anew": COLORS["Adafactor"],
}


def gpt2(runs: dict[str, list[dict[str, Any]]], source: dict[str, Any], path: Path) -> None:
    """Loss over the learning rate, and over steps at the best rate; of each case the runs, by rate."""
    figure, (rates, curves) = plt.subplots(1, 2, figsize=(11, 4.2))
    shown = []
    for (name, rows), color in zip(runs.items(), plt.get_cmap("tab10").colors, strict=False):
        known = [r for r in rows if r["seed"] == 0 and r["loss"] is not None]
        if not known:
            continue
        best = min(known, key=lambda r: r["loss"])
        shown.append(best["loss"])
        rates.plot([r["lr"] for r in known], [r["loss"] for r in known], "o-", ms=4, color=color, label=name)
        curve = [(step, loss) for step, loss in best["curve"] if loss is not None]
        curves.plot(*zip(*curve, strict=True), color=color, lw=1.4, label=f"{name}, {best['lr']:g}")
    rates.set(xscale="log", xlabel="learning rate", ylabel="nats per held-out token")
    curves.set(xlabel="step", ylim=(min(shown) - 0.1, max(shown) + 1.5))
    rates.set_title("at the end, one seed", size=10)
    curves.set_title("in the training, at the best rate", size=10)
    curves.legend(frameon=False, fontsize=8)
    save(figure, path, source)


def changeover(report: dict[str, Any], path: Path) -> None:
    """Validation loss over steps, the mean of all seeds: of the whole training, and around the change."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    half, steps = report["steps"] // 2, report["steps"]
    for name, color in CHANGEOVER_COLORS.items():
        curves = [dict(map(tuple, r["validation_loss"])) for r in report["runs"] if r["name"] == name]
        known = sorted(set.intersection(*map(set, curves))) if curves else []
        mean = [statistics.mean(curve[step] for curve in curves) for step in known]
        dashed = (0, (3, 1.5)) if name.startswith("NovoGrad") else "-"
        for axis in axes:
            axis.plot(known, mean, color=color, ls=dashed, lw=1.4, label=name)
    for axis in axes:
        axis.axvline(half, color="#bbbbbb", lw=0.8, zorder=0)
        axis.set(xlabel="step", ylabel="loss, nats per byte")
    shown = [
        loss
        for run in report["runs"]
        for step, loss in run["validation_loss"]
        if half - 40 <= step <= half + 60 and run["name"] != "AdamW, then NovoGrad anew"
    ]
    seeds = len({run["seed"] for run in report["runs"]})
    title = f"{report['model']}: validation loss, {'one seed' if seeds == 1 else f'mean of {seeds} seeds'}"
    axes[0].set_title(title, size=10)
    axes[1].set_title(f"around the change after {half} of {steps} steps", size=10)
    axes[1].set(xlim=(half - 40, half + 60), ylim=(min(shown) - 0.02, max(shown) + 0.1))
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, path, report["provenance"])


def step_memory(report: dict[str, Any], path: Path) -> None:
    """Bytes over the time of one training step: a column for each model, a line for each optimizer."""
    rows = [row for row in report["rows"] if "why" not in row]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(6 * len(models), 6.2), squeeze=False)
    for model, axis in zip(models, axes[0], strict=True):
        of_model = [row for row in rows if row["model"] == model]
        for row in sorted(of_model, key=lambda row: -row["peak_bytes"]):
            dashed = row["optimizer"].startswith("NovoGrad") and not row["release"]
            axis.plot(
                *zip(*_levels(row), strict=True),
                color=STEP_COLORS[row["optimizer"]],
                ls=(0, (3, 1.5)) if dashed else "-",
                lw=1.5,
                label=f"{step_title(row)}: peak {row['peak_bytes'] / 2**30:.2f} GiB",
            )
        first = of_model[0]
        _phases(axis, [phase["name"] for phase in first["phases"]])
        how = ", activation checkpointing" if first["checkpointing"] else ""
        tokens = f"{first['tokens']} tokens{how}"
        axis.set_title(f"{model}, {first['parameters'] / 1e6:,.0f}M parameters, {tokens}", size=10)
        axis.set(ylabel="GiB", xlabel="phases of one step, drawn equally wide", ylim=(0, None))
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.suptitle("Weights, gradients, state and activations in one training step, bfloat16", size=11)
    save(figure, path, report["provenance"], bottom=0.03)


SLICES = "most_in_each_slice_of_time"
STEP_COLORS = {
    "torch AdamW, fused": COLORS["AdamW"],
    "torchao AdamW8bit": COLORS["Adafactor"],
    "NovoGrad, int8": "#6fb3e0",
    "NovoGrad, int4": COLORS["NovoGrad"],
}


def step_title(row: dict[str, Any]) -> str:
    """The optimizer of a cell of ``make step-memory``, and whether gradients are released."""
    return str(row["optimizer"]) + (", gradients released" if row["release"] else "")


def _levels(row: dict[str, Any]) -> list[tuple[float, float]]:
    """Times, in phases, and GiB."""
    return [
        (number + (k + 0.5) / len(phase[SLICES]), level / 2**30)
        for number, phase in enumerate(row["phases"])
        for k, level in enumerate(phase[SLICES])
    ]


def _phases(axis: Any, names: list[str]) -> None:
    """Shade every other phase, and name each."""
    for number in range(1, len(names), 2):
        axis.axvspan(number, number + 1, color="#f0f0f0", lw=0, zorder=0)
    axis.set_xticks([number + 0.5 for number in range(len(names))], names)
    axis.tick_params(axis="x", length=0)
    axis.set_xlim(0, len(names))


def eight_billion(report: dict[str, Any], path: Path) -> None:
    """Memory of the process over the time of the run, and at most, beside what others need by plan."""
    figure, (over_time, needed) = plt.subplots(1, 2, figsize=(13, 4.6), width_ratios=(3, 2.4))
    _memory_over_time(over_time, report)
    _memory_needed(needed, report)
    figure.suptitle(
        f"{report['model']}: {report['parameters']:,} parameters, every one trained, "
        f"on {report['provenance']['machine']['cores']} CPU cores",
        size=11,
    )
    save(figure, path, report["provenance"])


def _memory_over_time(axis: Any, report: dict[str, Any]) -> None:
    seconds, rss = zip(*report["samples"], strict=True)
    axis.plot(seconds, [value / GIB for value in rss], color="black", lw=1)
    marked = [("weights", report["weights"])]
    marked += [(name, step[name]) for step in report["steps"] for name in ("forward", "backward")]
    marked += [("forward", report["after"]["forward"])]
    for name, span in marked:
        axis.axvspan(span["start_s"], span["stop_s"], color=SPANS[name], alpha=0.25, lw=0)
    total = report["memory"]["total"] / GIB
    axis.axhline(total, color=OVER, lw=1, ls="--")
    axis.text(0, total, f" the machine's memory, {total:.1f} GiB", color=OVER, va="bottom", size=8)
    peak = report["peak_rss"] / GIB
    axis.axhline(peak, color="#777777", lw=0.6, ls=":")
    axis.text(seconds[-1], peak, f"peak {peak:.2f} GiB", ha="right", va="bottom", size=8)
    for step in (*report["steps"], report["after"]):
        middle = (step["forward"]["start_s"] + step["forward"]["stop_s"]) / 2
        axis.text(middle, 0.3, f"loss {step['loss']:.3f}", rotation=90, ha="center", va="bottom", size=7)
    axis.set_ylim(0, 1.15 * max(report["memory"]["total"], *rss) / GIB)
    axis.margins(x=0.01)
    axis.set(
        xlabel="seconds", ylabel="GiB in memory (RSS)", title="NovoGrad, int4, gradients released: measured"
    )
    patches = [plt.Rectangle((0, 0), 1, 1, color=color, alpha=0.25) for color in SPANS.values()]
    labels = ("weights made", "forward", "backward, with the steps")
    axis.legend(patches, labels, frameon=False, fontsize=8, ncols=3, loc="upper left")


def _memory_needed(axis: Any, report: dict[str, Any]) -> None:
    """Bars of the plans, and of what was measured."""
    plans = report["planned_with_gradients"]
    names = [f"{name}, planned" for name in plans] + [
        "NovoGrad int4, released: planned",
        "the same, measured",
    ]
    rows = [*plans.values(), report["planned"]]
    left = [0.0] * len(rows)
    for part, color in PARTS.items():
        widths = [row[part] / GIB for row in rows]
        axis.barh(names[:-1], widths, 0.65, left=left, color=color, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.barh(
        names[-1], report["peak_rss"] / GIB, 0.65, color=COLORS["NovoGrad"], label="peak of the process"
    )
    span = max(left)
    axis.axvline(report["memory"]["total"] / GIB, color=OVER, lw=1, ls="--")
    for place, value in enumerate([*left, report["peak_rss"] / GIB]):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axis.text(value + 0.01 * span, place, f"{value:.3g}", va="center", size=8, bbox=box)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.tick_params(axis="y", labelsize=8)
    axis.set(xlabel="GiB; dashed: the machine's memory", title="Planned without activations and libraries")
    axis.legend(frameon=False, fontsize=8, loc="lower right")


def _bars(axis: Any, values: list[dict[str, float]]) -> None:
    """Horizontal bars of every optimizer, one group for each entry of ``values``, on a logarithmic scale."""
    names = [n for n in dict.fromkeys(n for v in values for n in v) if n != "NovoGrad, reference"]
    height = 0.8 / max(len(names), 1)
    for k, name in enumerate(names):
        known = [(i + height * (k + 0.5) - 0.4, v[name]) for i, v in enumerate(values) if name in v]
        color = COLORS["NovoGrad"] if name == "NovoGrad" else plt.get_cmap("Set2")(k - 1)
        bars = axis.barh([y for y, _ in known], [v for _, v in known], height, color=color, label=name)
        axis.bar_label(bars, [f" {v:.2f}" for _, v in known], size=6)
    axis.axvline(1, color="#777777", lw=0.8)
    axis.set_xscale("log", base=2)
    axis.margins(x=0.15)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _short(value: float) -> str:
    return f"{value:.0%}" if value > 1e-3 else f"{value:.0e}"


def _smooth(values: list[float], width: int = 10) -> list[float]:
    return [
        sum(values[max(i - width, 0) : i + 1]) / len(values[max(i - width, 0) : i + 1])
        for i in range(len(values))
    ]
