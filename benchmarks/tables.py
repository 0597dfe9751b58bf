"""Tables of results: in Markdown, in a page of the documentation, and on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

RULES = {"l": "---", "r": "---:"}


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], align: str | None = None) -> str:
    """A table in Markdown, with a line break at its end.

    Args:
        columns: titles.
        rows: cells.
        align: "l" or "r" for each column; None: the first column to the left, numbers to the right.
    """
    align = align or "l" + "r" * (len(columns) - 1)
    lines = [_line(columns), f"|{'|'.join(RULES[side] for side in align)}|", *map(_line, rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def put(page: Path, begin: str, end: str, text: str) -> None:
    """Put a text between two marks of a page.

    Raises:
        ValueError: the page does not have them.
    """
    content = page.read_text()
    if begin not in content or end not in content:
        raise ValueError(f"{page} has no lines {begin!r} and {end!r}")
    before, rest = content.split(begin)[0], content.split(end)[1]
    page.write_text(f"{before}{begin}\n\n{text.rstrip()}\n\n{end}{rest}")


def console(width: int = 120) -> Console:
    """Standard output; ``width`` columns where it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=width)


def publish(text: str, file: Path, others: str) -> None:
    """Write tables in Markdown and print them; say which files are there now, ``others`` beside this one."""
    file.write_text(text)
    output = console()
    output.print(text, markup=False, highlight=False)
    output.print(f"Written: {others}, {file.name} in {file.parent}")


def on_terminal(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table for a console: the first column to the left, numbers to the right."""
    table = Table(title=title, title_justify="left")
    for k, column in enumerate(columns):
        table.add_column(column, justify="right" if k else "left")
    for row in rows:
        table.add_row(*row)
    return table
