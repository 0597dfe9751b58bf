"""Run what the protocol asks for and is not there yet, and show it.

make tasks-data                            # once: the data, with apt-get and npm
make tasks                                 # everything: some hours on two cores; may be stopped
make tasks ARGS="--only images --jobs 2"
make tasks ARGS="--quick"                  # one task, three optimizers: ten minutes
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks import reports, tables
from benchmarks.tasks import plots, protocol, report
from benchmarks.tasks.data import MissingDataError
from benchmarks.tasks.protocol import METHODS, Results, Run
from benchmarks.tasks.training import TASKS, load, train
from novoscale.tools.provenance import make_command, provenance

FOLDER = Path("runs/tasks")
CORES = os.cpu_count() or 1
QUICK = ("language-bytes",), ("AdamW", "NovoGrad, paper", "NovoGrad, adamw")


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"A task, or tasks: {', '.join(TASKS)}.")] = None,
    optimizer: Annotated[list[str] | None, typer.Option(help=f"Of: {'; '.join(METHODS)}.")] = None,
    quick: Annotated[
        bool, typer.Option(help="One task whose data is everywhere, three optimizers, points 1 to 3.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=0, help="Trainings at a time, of a thread; 0: show only.")] = CORES,
    steps: Annotated[int | None, typer.Option(min=1, help="Of a training; the task's own if absent.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for a JSON of each task, and the plots.")] = FOLDER,
    page: Annotated[Path | None, typer.Option(help="A page whose tables are made anew.")] = None,
) -> None:
    """Train what is missing, and show the tables."""
    console = tables.console(140)
    tasks = QUICK[0] if quick else chosen(only, TASKS, "task")
    methods = QUICK[1] if quick else chosen(optimizer, METHODS, "optimizer")
    out.mkdir(parents=True, exist_ok=True)
    store = Store(out, steps)
    if jobs:
        there = [task for task in tasks if has_data(task, console)]
        run_all(store, there, methods, jobs, console, robustness=not quick)
    report.show(store.rows, console)
    plots.draw(store.rows, store.source, out)
    if page is not None:
        report.write(store.rows, page)


def has_data(task: str, console: Console) -> bool:
    """Whether a task can be run; says why not."""
    try:
        load(task)
    except MissingDataError as error:
        console.print(f"[yellow]{task} is skipped: {error}")
        return False
    return True


def chosen(names: list[str] | None, known: Any, what: str) -> list[str]:
    """The names that begin with one of those that were given; all if none was."""
    for name in names or []:
        if not any(k.startswith(name) for k in known):
            raise typer.BadParameter(f"no {what} {name!r}; there are: {', '.join(known)}")
    return [k for k in known if not names or any(k.startswith(name) for name in names)]


class Store:
    """The results: a file for each task, written when a run ends.

    Args:
        folder: of the files.
        steps: of every training; None: as each task has it.

    Raises:
        typer.BadParameter: what is in the folder was trained for another number of steps.
    """

    def __init__(self, folder: Path, steps: int | None = None) -> None:
        self.folder, self.steps = folder, steps
        self.source = provenance(make_command("tasks"))
        files = sorted(folder.glob("*.json"))
        self.by_task = {file.stem: json.loads(file.read_text()) for file in files}
        for name, stored in self.by_task.items():
            if stored["steps"] != (steps or TASKS[name].steps):
                raise typer.BadParameter(
                    f"{folder}: {name} was trained for {stored['steps']} steps; use another --out"
                )

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Every run of every task."""
        return [row for stored in self.by_task.values() for row in stored["runs"]]

    def add(self, row: dict[str, Any]) -> None:
        """Keep a result."""
        task = TASKS[row["task"]]
        stored = self.by_task.setdefault(task.name, {"runs": []})
        about = {
            "steps": self.steps or task.steps,
            "data": task.data,
            "measures": task.measures,
            "batch": task.batch,
            "clip": task.clip,
        }
        stored.update(provenance=self.source, **about)
        stored["runs"].append({**row, "commit": self.source["commit"]})
        lines = ",\n".join(f"  {json.dumps(run)}" for run in stored["runs"])
        head = json.dumps({k: v for k, v in stored.items() if k != "runs"}, indent=1)
        file = self.folder / f"{task.name}.json"
        reports.replace(file, f'{head[:-2]},\n "runs": [\n{lines}\n ]\n}}\n')


def run_all(
    store: Store, tasks: Any, methods: Any, jobs: int, console: Console, robustness: bool = True
) -> None:
    """Keep ``jobs`` trainings going until nothing is missing."""
    shown = sys.stdout.isatty()
    running: dict[Future[dict[str, Any]], Run] = {}
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    with pool, Progress(console=console, disable=not shown) as progress:
        bar = progress.add_task("trainings", total=None)
        while True:
            left = list(protocol.missing(Results(store.rows), tasks, methods, robustness))
            progress.update(bar, completed=len(store.rows), total=len(store.rows) + len(left))
            waiting = [run for run in left if run not in running.values()]
            for run in waiting[: jobs - len(running)]:
                running[pool.submit(train, run, store.steps)] = run
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                row = future.result()
                store.add(row)
                if not shown:
                    told = {k: v for k, v in row.items() if k not in ("curve", "training")}
                    print(f"{len(left)} known to be left; {told}", flush=True)


if __name__ == "__main__":
    typer.run(main)
