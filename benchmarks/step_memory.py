"""Memory over the time of one training step, with the gradients released in the backward pass and without.

    make step-memory

Weights, gradients, state and activations together, of GPT-2 124M and of Llama 3.2 1B's shape, in bfloat16 and
in one process, by every allocation that torch makes. Each cell is written to the result file when it ends,
and one that is there is not repeated. On two CPU cores it takes seven minutes, and 12 GiB.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import plots, reports, tables
from novoscale.memory import measuring
from novoscale.memory.measuring import Job, Measured
from novoscale.memory.models import MemoryToolError
from novoscale.tools.local_ranks import RankError
from novoscale.tools.provenance import make_command, provenance

# name: of the model; how it is trained
MODELS: dict[str, dict[str, Any]] = {
    "gpt2-124m": {"tokens": 256},
    "llama-1b": {"tokens": 256, "checkpointing": True},
}
# Of the catalogue, and whether gradients are released. Of the 8-bit AdamWs the one whose step takes less
# besides on a CPU.
OPTIMIZERS = (
    ("torch AdamW, fused", False),
    ("torchao AdamW8bit", False),
    ("NovoGrad, int8", False),
    ("NovoGrad, int4", False),
    ("NovoGrad, int8", True),
    ("NovoGrad, int4", True),
)
STEP = ("forward", "backward", "step")
MIB = 2**20


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(MODELS)}; repeat.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for step_memory.json, plot and table.")] = Path("runs"),
    timeout: Annotated[float, typer.Option(help="Seconds for each cell.")] = 1800,
) -> None:
    """Measure what is missing, write data, plot and table."""
    file = out / "step_memory.json"
    report = reports.read(file, {"rows": []})
    measured = [key(row) for row in report["rows"] if "why" not in row]
    missing = [job for job in jobs(model or list(MODELS)) if key(asdict(job)) not in measured]
    for job in track(missing, "measuring", disable=not sys.stderr.isatty()):
        others = [row for row in report["rows"] if key(row) != key(asdict(job))]
        report["rows"] = [*others, cell(job, timeout)]
        report["provenance"] = provenance(make_command("step-memory"))
        reports.write(file, report)
    plots.step_memory(report, out / "step_memory")
    files = "step_memory.json, step_memory.png, step_memory.svg"
    tables.publish(markdown(report), out / "step_memory.md", files)


def jobs(models: list[str]) -> list[Job]:
    """All cells of some models."""
    return [
        Job(model, optimizer, "none", 1, "bfloat16", release=release, **MODELS[model])
        for model in models
        for optimizer, release in OPTIMIZERS
    ]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one cell from another."""
    return tuple(row[field.name] for field in fields(Job))


def cell(job: Job, timeout: float) -> dict[str, Any]:
    """One cell, or why it is none."""
    try:
        return row_of(measuring.measure(job, timeout))
    except MemoryToolError as error:
        return {**asdict(job), "why": str(error)}
    except RankError as error:
        return {**asdict(job), "why": error.brief()[-300:]}


def row_of(found: Measured) -> dict[str, Any]:
    """What is written of a cell: of the second step; bytes."""
    device = found.to_dict()["device"]
    phases = [
        {"name": phase.name, **asdict(phase.allocated[device]), "most_in_each_slice_of_time": line[device]}
        for phase, line in zip(found.phases[0], found.timelines[0], strict=True)
        if phase.name in STEP
    ]
    held = found.accounts[0]
    return {
        **asdict(found.job),
        "device": device,
        "parameters": found.parameters,
        "weight_bytes": held.parameters,
        "state_bytes": held.state.total,
        "gradient_bytes": held.gradients if found.alive[0] is None else found.alive[0],
        "peak_bytes": max(phase["peak"] for phase in phases),
        "phases": phases,
    }


def markdown(report: dict[str, Any]) -> str:
    """The table of docs/memory.md."""
    models = list(dict.fromkeys(row["model"] for row in report["rows"]))
    columns = ["optimizer", *(part for m in models for part in (f"{m}: state", "gradients", "peak"))]
    lines = []
    for title in dict.fromkeys(map(plots.step_title, report["rows"])):
        rows = {row["model"]: row for row in report["rows"] if plots.step_title(row) == title}
        lines.append([title, *(cell for model in models for cell in _cells(rows.get(model)))])
    return tables.markdown(columns, lines)


def _cells(row: dict[str, Any] | None) -> list[str]:
    if row is None or "why" in row:
        return [row["why"] if row else "not measured", "", ""]
    return [f"{row[part] / MIB:,.0f}" for part in ("state_bytes", "gradient_bytes", "peak_bytes")]


if __name__ == "__main__":
    typer.run(main)
