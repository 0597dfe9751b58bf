"""What the runs say, as tables: on a terminal, and in docs/tasks.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from benchmarks.tables import markdown, on_terminal, put
from benchmarks.tasks.protocol import BASELINE, LARGE_BATCH, METHODS, ROBUSTNESS, scope
from benchmarks.tasks.summary import Row, Summary
from benchmarks.tasks.training import TASKS
from benchmarks.trials import loss_of

NONE = "not measured"
BEGIN, END = "<!-- tables: made by make tasks -->", "<!-- end of the tables -->"


class Table(NamedTuple):
    """Cells under a title."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """As Markdown has it."""
        table = markdown(self.columns, self.rows).rstrip() if self.rows else ""
        return "\n\n".join(part for part in (f"### {self.title}", table, self.note) if part)


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """Every table of which something is measured."""
    summary = Summary(rows)
    for task in summary.tasks:
        yield results(summary, task)
    searched = [m for m in METHODS if METHODS[m].like is None]
    if not summary.papers:
        return

    def across(title: str, cell: Callable[[str, str], str]) -> Table:
        lines = [[method, *(cell(task, method) for task in summary.papers)] for method in searched]
        return measured(title, ["", *summary.papers], lines)

    def plateau(task: str, method: str) -> str:
        found = summary.plateau(task, method)
        return NONE if found is None else f"x {found:g}"

    yield across("Learning rates within AdamW's spread of the best: their range", plateau)
    for variant in ROBUSTNESS:
        yield across(
            f"{variant}: what it adds to the loss",
            lambda task, method: _signed(summary.added(task, method, variant)),  # noqa: B023  called in this round
        )

    def large(task: str, method: str) -> str:
        found, added = (of(task, method, LARGE_BATCH) for of in (summary.variant, summary.added))
        return NONE if added is None else f"{_number(found)} ({_signed(added)})"

    yield across("Eight times the batch: loss, and what it adds", large)


def results(summary: Summary, task: str) -> Table:
    """A task: every optimizer at its best rate."""
    about = TASKS[task]
    others = [measure for measure in about.measures if measure != "loss"]
    columns = ["", "lr", "decay", "trials", f"loss, {about.measures['loss']}", "lowest to highest (seeds)"]
    columns += ["from AdamW's", *(f"{name}, {about.measures[name]}" for name in others)]
    columns += ["steps to AdamW's loss", "state, bytes per parameter", "step, ms"]
    lines = [
        [method, *_result(summary, task, method, others, len(columns))] for method in scope(task).methods
    ]
    spread = summary.spread(task)
    apart = "" if spread is None else f"; AdamW's seeds are {spread:.2g} apart"
    return measured(f"{task}: {about.steps:,} steps of {about.batch}{apart}", columns, lines)


def _result(summary: Summary, task: str, method: str, others: Sequence[str], columns: int) -> list[str]:
    best, seeds = summary.best(task, method), summary.seeds(task, method)
    if best is None or not seeds:
        return [NONE] * (columns - 1)
    losses = [loss_of(row) for row in seeds]
    mean, base = statistics.fmean(losses), summary.mean(task, BASELINE)
    share, step = summary.share_of_steps(task, method), summary.fastest(task, method)
    trials = str(len(summary.search(task, method))) if METHODS[method].like is None else "-"
    row = summary.rows[best]
    return [
        f"{best.lr:g}", f"{best.weight_decay:g}", trials, _number(mean),
        f"{_number(min(losses))} to {_number(max(losses))} ({len(losses)})",
        NONE if base is None else _signed(mean - base),
        *(_number(summary.mean(task, method, measure)) for measure in others),
        "not reached" if share is None else f"{100 * share:.0f} %",
        f"{row['state_bytes'] / row['parameters']:.2f}", NONE if step is None else f"{step:.2f}",
    ]  # fmt: skip


def measured(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """A table of the lines in which something is measured; the others are named below it."""
    absent = [line[0] for line in lines if set(line[1:]) == {NONE}]
    shown = [line for line in lines if line[0] not in absent]
    return Table(title, columns, shown, f"Not measured: {'; '.join(absent)}." if absent else "")


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
        shown = on_terminal(table.title, table.columns, table.rows)
        console.print(shown if table.rows else table.title, table.note, sep="\n")


def write(rows: Sequence[Row], page: Path) -> None:
    """Into a page that has a place for them.

    Raises:
        ValueError: it has none.
    """
    put(page, BEGIN, END, "\n\n".join(table.markdown() for table in tables(rows)))
