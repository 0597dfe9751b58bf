"""Everything that only a GPU can say of NovoGrad.

    make chip
    make chip ARGS="--only passes --only steps"
    PYTHONPATH=. python3 -m benchmarks.chip --minutes 5     # where nothing can be installed

In this order: the fused kernel is compiled and launched; every form is trained and its bits compared with
the reference's; steps are captured in CUDA graphs; the memory of a step; the bandwidth of each pass; the time
of a step beside other optimizers; models that are sharded over ranks; and the kernels' own tests. chip.json
is written after each row, and chip.png and chip.svg at the end. What fails is said in the tables and by the
exit code, and does not stop the rest.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import reports
from benchmarks.on_chip import bits, graphs, kernel_tests, memory, passes, shardings, steps
from benchmarks.on_chip.gpu import Gpu
from benchmarks.on_chip.rows import Row
from novoscale.tools.provenance import make_command, provenance

Part = Callable[[Gpu], Iterator[Row]]

TITLES = {
    "load": "the fused kernel",
    "bits": "bits of a training",
    "graphs": "CUDA graphs, replayed beside eager steps",
    "memory": "memory of a step, bfloat16 weights and gradients",
    "passes": "bandwidth of each pass",
    "steps": "the whole step",
    "shardings": "the same training on ranks that share the GPU",
    "tests": "the kernels' tests",
}
HIDDEN = ("failed", "output", "details")  # no columns of the tables


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Of: {', '.join(TITLES)}; repeat.")] = None,
    minutes: Annotated[float, typer.Option(help="What has not begun by then is left out.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder for chip.json and the picture.")] = Path("runs"),
) -> None:
    """Measure and test on the GPU; exit code 1 if anything failed, 2 without a GPU."""
    unknown = set(only or ()) - set(TITLES)
    if unknown:
        raise typer.BadParameter(f"no part {', '.join(sorted(unknown))}; there are {', '.join(TITLES)}")
    if not torch.cuda.is_available():
        print(f"make chip needs a GPU, and torch {torch.__version__} sees none.", file=sys.stderr)
        raise typer.Exit(2)
    raise typer.Exit(0 if measured(Gpu(), only or list(TITLES), 60 * minutes, out) else 1)


def measured(gpu: Gpu, chosen: list[str], seconds: float, out: Path) -> bool:
    """Run some parts, write and print what they find; whether all went well."""
    file, deadline = out / "chip.json", time.monotonic() + seconds
    report: dict[str, Any] = {"provenance": provenance(make_command("chip")), "gpu": gpu.about(), "parts": {}}
    write = partial(reports.write, file, report)
    console = Console(emoji=False) if sys.stdout.isatty() else Console(emoji=False, width=150)
    console.print(", ".join(f"{key} {value}" for key, value in report["gpu"].items()), highlight=False)
    parts = {name: part for name, part in all_parts(deadline).items() if name in chosen}
    for name, part in parts.items():
        found: dict[str, Any] = {"rows": []}
        report["parts"][name] = found
        with console.status(TITLES[name]):
            run(found, part, gpu, deadline, write)
        show(console, TITLES[name], found)
    found = {"rows": []}
    run(found, lambda _: picture(report, out / "chip"), gpu, float("inf"), lambda: None)
    for failure in failures({"picture": found}):
        console.print(f"[red]{escape(failure)}")
    failed = failures({**report["parts"], "picture": found})
    console.print(f"Written: {file}; {len(failed)} failures", highlight=False)
    return not failed


def all_parts(deadline: float) -> dict[str, Part]:
    """By name, in the order in which they are run."""
    return {
        "load": bits.load,
        "bits": bits.compare,
        "graphs": graphs.replay,
        "memory": memory.measure,
        "passes": passes.measure,
        "steps": steps.measure,
        "shardings": shardings.compare,
        "tests": lambda gpu: kernel_tests.run(gpu, max(1.0, deadline - time.monotonic())),
    }


def run(found: dict[str, Any], part: Part, gpu: Gpu, deadline: float, write: Callable[[], Any]) -> None:
    """Add a part's rows, write after each; if it breaks off, say why."""
    start = time.monotonic()
    try:
        rows = iter(part(gpu))
        while True:
            if time.monotonic() > deadline:
                found["failed"] = "out of time"
                break
            row = next(rows, None)
            if row is None:
                break
            found["rows"].append({key: rounded(value) for key, value in row.items()})
            write()
    except Exception as error:  # of whatever kind: the other parts are to be run
        found["failed"] = f"{type(error).__name__}: {error}"
        found["output"] = traceback.format_exc()
    found["seconds"] = rounded(time.monotonic() - start)
    write()


def picture(report: dict[str, Any], path: Path) -> Iterator[Row]:
    """Draw the passes and the steps, if there are any."""
    from benchmarks import plots

    if any(report["parts"].get(name, {}).get("rows") for name in ("passes", "steps")):
        plots.chip(report, path)
        yield {"picture": f"{path}.png"}


def failures(parts: dict[str, Any]) -> list[str]:
    """What failed, of all parts and rows."""
    of_parts = [f"{name}: {found['failed']}" for name, found in parts.items() if "failed" in found]
    rows = [(name, row) for name, found in parts.items() for row in found["rows"]]
    return of_parts + [f"{name}: {row['failed']}" for name, row in rows if "failed" in row]


def show(console: Console, title: str, found: dict[str, Any]) -> None:
    """Print a part's table, and its failures."""
    rows = found["rows"]
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in HIDDEN]
    table = Table(title=f"{title}, {found['seconds']} s", title_justify="left")
    for column in columns:
        number = any(isinstance(row.get(column), (int, float)) for row in rows)
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        cells = ("" if row.get(column) is None else f"{row[column]}" for column in columns)
        table.add_row(*map(escape, cells), style="red" if "failed" in row else None)
    console.print(table)
    for failure in failures({title: found}):
        console.print(f"[red]failed: {escape(failure)}", highlight=False)


def rounded(value: Any) -> Any:
    """Four digits of a number with a fraction."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    typer.run(main)
