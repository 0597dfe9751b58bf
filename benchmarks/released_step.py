"""The time of an optimizer's step in the backward pass, over that of an ordinary one, in real training steps.

    python benchmarks/released_step.py

GPT-2 124M on the CPU, a short sample. With and without ``release_gradients`` in turns, so that what disturbs
the machine disturbs both. Writes released_step.json.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import reports, tables
from novoscale import NovoGrad, release_gradients
from novoscale.memory import models
from novoscale.tools.provenance import provenance
from novoscale.verify import runs

FORMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32, the paper's form": (torch.float32, {"preset": "paper"}),
    "float32, preset adamw": (torch.float32, {"preset": "adamw"}),
    "bfloat16, int8": (torch.bfloat16, {"preset": "paper", "momentum_dtype": "int8"}),
    "bfloat16, int8, preset adamw": (torch.bfloat16, {"momentum_dtype": "int8", "preset": "adamw"}),
    "bfloat16, int4, preset adamw": (torch.bfloat16, {"momentum_dtype": "int4", "preset": "adamw"}),
}


class Timed(NovoGrad):
    """Adds up the time that it takes to step."""

    seconds = 0.0

    def step_some(self, tensors: Any) -> None:
        """As NovoGrad's."""
        start = time.perf_counter()
        super().step_some(tensors)
        self.seconds += time.perf_counter() - start


def main(
    model: Annotated[str, typer.Option(help="As of novoscale memory.")] = "gpt2-124m",
    rounds: Annotated[int, typer.Option(help="Training steps of each kind, after two more.")] = 15,
    out: Annotated[Path, typer.Option(help="Folder for released_step.json.")] = Path("runs"),
) -> None:
    """Measure, print and write."""
    rows: list[dict[str, Any]] = []
    for name, (dtype, options) in track(FORMS.items(), "measuring", disable=not sys.stderr.isatty()):
        rows.append({"form": name, **measure(model, dtype, options, rounds)})
        found = {"provenance": provenance(), "model": model, "threads": torch.get_num_threads(), "rows": rows}
        reports.write(out / "released_step.json", found)
    table = Table("form", "step, ms", "in the backward pass, ms", "ratio", "whole training step: ratio")
    for row in rows:
        cells = (f"{row[key]:.4g}" for key in ("step_ms", "released_ms", "ratio", "training_step_ratio"))
        table.add_row(row["form"], *cells)
    tables.console().print(table)


def measure(name: str, dtype: torch.dtype, options: dict[str, Any], rounds: int) -> dict[str, float]:
    """Medians over training steps, in turns: of the optimizer alone, and of the whole training step."""
    model = models.build(name).to(dtype).train()
    batch = models.batch(name, model, "cpu")
    optimizer = Timed(model.parameters(), lr=1e-4, **options)
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _ in range(2 + rounds):
        for released in times:
            handle = release_gradients(model, optimizer) if released else None
            for _ in range(2):  # tables of the one are not those of the other
                last = training_step(model, batch, optimizer)
            times[released].append(last)
            if handle is not None:
                handle.remove()
    plain, released = (median(times[kind][2:]) for kind in (False, True))
    return {
        "step_ms": 1e3 * plain[0],
        "released_ms": 1e3 * released[0],
        "ratio": released[0] / plain[0],
        "training_step_ratio": released[1] / plain[1],
    }


def training_step(model: Any, batch: dict[str, Tensor], optimizer: Timed) -> tuple[float, float]:
    """Seconds of the optimizer, and of the whole step."""
    optimizer.seconds = 0.0
    start = time.perf_counter()
    runs.loss_of(model, batch, torch.float32).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer.seconds, time.perf_counter() - start


def median(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of each of the two."""
    return statistics.median(t for t, _ in times), statistics.median(t for _, t in times)


if __name__ == "__main__":
    typer.run(main)
