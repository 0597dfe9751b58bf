"""What the runs say, as tables: on a terminal, and in docs/tasks.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import table as rich_table
from rich.console import Console

from benchmarks.tasks.protocol import (
    BASELINE,
    LARGE_BATCH,
    METHODS,
    PLAIN,
    ROBUSTNESS,
    SCOPES,
    Results,
    Run,
    finished,
)  # fmt: skip
from benchmarks.tasks.training import TASKS

Row = Mapping[str, Any]
NONE = "not measured"
BEGIN, END = "<!-- tables: made by make tasks -->", "<!-- end of the tables -->"


class Table(NamedTuple):
    """Cells under a title."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """As Markdown has it."""
        lines = [f"### {self.title}", "", " | ".join(["", *self.columns, ""]).strip()]
        lines += ["|---|" + "---:|" * (len(self.columns) - 1)]
        lines += [" | ".join(["", *row, ""]).strip() for row in self.rows]
        return "\n".join(lines)


class Summary:
    """The runs by what was asked of them."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = {Run(*(row[name] for name in Run._fields)): row for row in rows}
        self.results = Results(rows)

    def best(self, task: str, method: str) -> Run | None:
        """The best trial of a search that is finished, if it was run."""
        best = self.results.best(task, method)
        done = best is not None and finished(self.results, task, method)
        return best if done and best in self.rows else None

    def seeds(self, task: str, method: str) -> list[Row]:
        """The runs of the best trial, with every seed."""
        best = self.best(task, method)
        return [row for run, row in self.rows.items() if best and run == best._replace(seed=run.seed)]

    def mean(self, task: str, method: str, measure: str = "loss") -> float | None:
        """Of the seeds; infinite if one diverged."""
        rows = self.seeds(task, method)
        return statistics.fmean(_loss(row, measure) for row in rows) if rows else None

    def spread(self, task: str) -> float | None:
        """How far AdamW's seeds are apart; None before there are three."""
        losses = [_loss(row) for row in self.seeds(task, BASELINE)]
        return max(losses) - min(losses) if len(losses) > 2 else None

    def curve(self, task: str, method: str) -> dict[float, float]:
        """The loss of each learning rate, without weight decay."""
        plain = Run(task, method, 0.0)
        found = {run.lr: _loss(row) for run, row in self.rows.items() if run == plain._replace(lr=run.lr)}
        return dict(sorted(found.items()))

    def plateau(self, task: str, method: str) -> float | None:
        """By which factor the rates differ that are within AdamW's spread of the method's best rate."""
        losses, spread = self.curve(task, method), self.spread(task)
        if spread is None or self.best(task, method) is None or not losses:
            return None
        good = [lr for lr, loss in losses.items() if loss <= min(losses.values()) + spread]
        return max(good) / min(good)

    def variant(self, task: str, method: str, variant: str) -> float | None:
        """What a variant adds to the loss of the same run, both with seed 0."""
        best = self.best(task, method)
        if best is None or best._replace(variant=variant) not in self.rows:
            return None
        return _loss(self.rows[best._replace(variant=variant)]) - _loss(self.rows[best])

    def large_batch(self, task: str, method: str) -> float | None:
        """The loss of the large batch at its own best rate."""
        return min(self.results.large_batch(task, method).values(), default=None)

    def share_of_steps(self, task: str, method: str) -> float | None:
        """After which part of the steps the held-out loss was AdamW's at its end, on average over the seeds.

        Both from the part of the held-out data that is evaluated during a training. None: not reached.
        """
        ends = [row["curve"][-1][1] for row in self.seeds(task, BASELINE)]
        rows = self.seeds(task, method)
        if not ends or not rows or None in ends:
            return None
        target = statistics.fmean(ends)
        shares = [
            next((step / row["steps"] for step, loss in row["curve"] if loss and loss <= target), None)
            for row in rows
        ]
        return None if None in shares else statistics.fmean(shares)  # type: ignore[type-var]

    def fastest(self, task: str, method: str) -> float | None:
        """Milliseconds of the optimizer's step: the lowest median of any run, for others disturb."""
        found = [row["step_ms"] for run, row in self.rows.items() if run[:2] == (task, method)]
        return min((ms for ms in found if ms), default=None)


def _loss(row: Row, measure: str = "loss") -> float:
    return math.inf if row.get(measure) is None else row[measure]  # type: ignore[no-any-return]


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """Every table of which something is measured."""
    summary = Summary(rows)
    present = [task for task in TASKS if any(row["task"] == task for row in rows)]
    for task in present:
        yield results(summary, task)
    four = [task for task in present if task not in SCOPES]
    searched = [m for m in METHODS if METHODS[m].like is None]
    robust = [m for m in searched if METHODS[m].robust]

    def across(title: str, methods: Sequence[str], cell: Callable[[str, str], str]) -> Table:
        return Table(title, ["", *four], [[m, *(cell(task, m) for task in four)] for m in methods])

    def plateau(task: str, method: str) -> str:
        found = summary.plateau(task, method)
        return NONE if found is None else f"x {found:g}"

    def difference(variant: str) -> Callable[[str, str], str]:
        return lambda task, method: _signed(summary.variant(task, method, variant))

    def large(task: str, method: str) -> str:
        found, mean = summary.large_batch(task, method), summary.mean(task, method)
        return NONE if found is None or mean is None else f"{_number(found)} ({_signed(found - mean)})"

    if four:
        yield across("Learning rates within AdamW's spread of the best: their range", searched, plateau)
        for variant in ROBUSTNESS:
            yield across(f"{variant}: what it adds to the loss", robust, difference(variant))
        yield across("Eight times the batch: loss, and what it adds", robust, large)


def results(summary: Summary, task: str) -> Table:
    """A task: every optimizer at its best rate."""
    about = TASKS[task]
    methods = SCOPES[task].methods if task in SCOPES else tuple(METHODS)
    others = [measure for measure in about.measures if measure != "loss"]
    columns = ["", "lr", "decay", "trials", f"loss, {about.measures['loss']}", "of seeds", "from AdamW's"]
    columns += [f"{name}, {about.measures[name]}" for name in others]
    columns += ["steps to AdamW's loss", "state, bytes per parameter", "step, ms"]
    lines = []
    for method in methods:
        best, seeds = summary.best(task, method), summary.seeds(task, method)
        if best is None or not seeds:
            lines.append([method, *[NONE] * (len(columns) - 1)])
            continue
        losses = [_loss(row) for row in seeds]
        mean, base = statistics.fmean(losses), summary.mean(task, BASELINE)
        share, step = summary.share_of_steps(task, method), summary.fastest(task, method)
        row = summary.rows[best]
        trials = len(summary.results.search(task, method)) if METHODS[method].like is None else 0
        lines.append([
            method, f"{best.lr:g}", f"{best.weight_decay:g}", str(trials or "-"), _number(mean),
            f"{_number(min(losses))} to {_number(max(losses))} ({len(losses)})",
            "" if base is None else _signed(mean - base),
            *(_number(summary.mean(task, method, measure)) for measure in others),
            "not reached" if share is None else f"{100 * share:.0f} %",
            f"{row['state_bytes'] / row['parameters']:.2f}", "" if step is None else f"{step:.2f}",
        ])  # fmt: skip
    spread = summary.spread(task)
    apart = "" if spread is None else f"; AdamW's seeds are {spread:.2g} apart"
    return Table(f"{task}: {about.steps:,} steps of {about.batch}{apart}", columns, lines)


def _number(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.4g}" if math.isfinite(value) else "diverged"


def _signed(value: float | None) -> str:
    if value is None or math.isnan(value):
        return NONE
    return f"{value:+.2g}" if math.isfinite(value) else "diverged"


def show(rows: Sequence[Row], console: Console) -> None:
    """On a terminal."""
    for table in tables(rows):
        shown = rich_table.Table(title=table.title, title_justify="left")
        for k, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if k else "left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)


def write(rows: Sequence[Row], page: Path) -> None:
    """Into a page that has a place for them.

    Raises:
        ValueError: it has none.
    """
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} has no lines {BEGIN!r} and {END!r}")
    made = "\n\n".join(table.markdown() for table in tables(rows))
    page.write_text(f"{text.split(BEGIN)[0]}{BEGIN}\n\n{made}\n\n{END}{text.split(END)[1]}")


__all__ = ["LARGE_BATCH", "PLAIN", "Summary", "Table", "show", "tables", "write"]
