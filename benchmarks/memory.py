"""The memory table of the README: GPT-2 124M under each optimizer, in one process and under ZeRO-2.

    make memory

Bytes of state from the storages that are held, and what a step takes besides, on 1, 2 and 4 ranks. Writes the
data, the plot and the table of docs/memory.md. On two CPU cores it takes about half an hour, and 12 GiB.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parent.parent))

from novoscale.memory import report
from novoscale.memory.comparison import compare
from novoscale.memory.cuts import TITLES
from novoscale.memory.optimizers import COMPARED

CUTS = [("none", 1), ("zero2", 2), ("zero2", 4)]


def main(
    model: Annotated[str, typer.Option(help="As of novoscale memory.")] = "gpt2-124m",
    out: Annotated[Path, typer.Option(help="Folder for memory.json, the plot and the table.")] = Path("runs"),
) -> None:
    """Measure everything, write data, table and plot."""
    command = f'make memory ARGS="{shlex.join(sys.argv[1:])}"' if sys.argv[1:] else "make memory"
    cells = compare(model, COMPARED, CUTS, "float32", timeout=1200)
    total = len(COMPARED) * len(CUTS)
    rows = []
    for row in track(cells, "measuring", total, disable=not sys.stderr.isatty()):
        rows.append(row)
        # After each row: an interrupted run keeps what it has measured.
        found = report.write({"model": model, "precision": "float32", "rows": rows}, out, command)
    table = markdown(found)
    (out / "memory.md").write_text(table)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table, markup=False, highlight=False)
    console.print(f"Written: memory.json, memory.md, memory.png, memory.svg in {out}")


def markdown(found: dict[str, Any]) -> str:
    """The table of docs/memory.md: state, and what a step takes besides, for each cut."""
    cuts = list(dict.fromkeys((row["cut"], row["ranks"]) for row in found["rows"]))
    titles = [f"{TITLES[cut]}{'' if cut == 'none' else f', {ranks} ranks'}" for cut, ranks in cuts]
    lines = [f"| optimizer | {' | '.join(titles)} | transient |", "|---|" + "---:|" * (len(cuts) + 1)]
    for name in dict.fromkeys(row["optimizer"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["optimizer"] == name]
        first = rows[0]
        transient = "" if "why" in first else f"{first['transient_bytes'] / first['parameters']:.2f}"
        lines.append(f"| {name} | {' | '.join(map(_cell, rows))} | {transient} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    if "why" in row:
        return str(row["why"])
    held = f"{row['state_bytes_per_parameter']:.2f}"
    if row.get("same_training") is False:
        held += f" (not the same training: {row['deviation']:.0%} off)"
    return held


if __name__ == "__main__":
    typer.run(main)
