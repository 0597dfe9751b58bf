"""What a language model learns under each optimizer and each format, in one process: loss after equal steps.

    make quality                                 # everything: an hour on two cores
    make quality ARGS="--only formats"

Every optimizer has the same number of learning rates, with one seed, and the best of them two more. Model,
text and schedule are those of the demo. Each run is written to the result file when it ends, and one that is
there is not repeated.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import plots, text  # noqa: E402
from benchmarks.train import CONTEXT, VALIDATION_WINDOWS, build_model, schedule  # noqa: E402
from novoscale import NovoGrad, param_groups  # noqa: E402
from novoscale.provenance import provenance  # noqa: E402

CLIP = 1.0
SEEDS = (0, 1, 2)
RMS = (0.001, 0.002, 0.004)  # as AdamW's: what is added to a weight is about 1 times it


@dataclass(frozen=True)
class Case:
    """An optimizer, or a format, with the learning rates that it is tried with."""

    name: str
    lrs: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "NovoGrad"
    rows: bool = False


ROW_RMS = {"normalize": "rms", "grad_averaging": True, "betas": (0.9, 0.98)}
# Both moments averaged as Adam does it, so that the first gradients do not weigh more than others.
ADAMS_AVERAGES = {**ROW_RMS, "init_zero": True, "bias_correction": True}
OPTIMIZERS = [
    Case("AdamW", RMS, {"betas": (0.9, 0.98)}, "AdamW"),
    Case("Adafactor", (0.01, 0.03, 0.1), {}, "Adafactor"),
    Case("NovoGrad: tensor, norm (the paper)", (0.001, 0.003, 0.01)),
    Case("NovoGrad: tensor, rms", RMS, ADAMS_AVERAGES),
    Case("NovoGrad: row, norm", (0.0003, 0.001, 0.003), rows=True),
    Case("NovoGrad: row, rms", RMS, ADAMS_AVERAGES, rows=True),
]
FORMATS = [
    Case(name, (0.002,), {**ROW_RMS, "momentum_dtype": name}, rows=True)
    for name in ("float32", "bfloat16", "int8", "int4")
]


@dataclass(frozen=True)
class Setting:
    """What is compared, over how many steps of how many windows."""

    cases: list[Case]
    steps: int
    batch: int


# Formats are close to each other, and few: they have the demo's steps and batch.
SETS = {"optimizers": Setting(OPTIMIZERS, 200, 8), "formats": Setting(FORMATS, 400, 16)}


def main(
    out: Annotated[Path, typer.Option(help="Folder for quality.json, and its plot.")] = Path("runs"),
    only: Annotated[str | None, typer.Option(help=f"One of {', '.join(SETS)}.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, a thread each.")] = os.cpu_count() or 1,
) -> None:
    """Train what is missing, and show the tables."""
    console = Console() if sys.stdout.isatty() else Console(width=120)
    if only is not None and only not in SETS:
        console.print(f"[red]--only {only}: it is one of {', '.join(SETS)}")
        raise typer.Exit(2)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "quality.json"
    report = json.loads(file.read_text()) if file.exists() else {"runs": []}
    report |= {"context": CONTEXT, "clip": CLIP, "provenance": provenance("make quality")}
    hidden = not sys.stdout.isatty()
    while missing := _missing(report["runs"], [only] if only else list(SETS)):
        # A process for each run: two that share one would share its threads.
        pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1)
        with pool, Progress(console=console, disable=hidden) as progress:
            shown = progress.add_task("runs", total=len(missing))
            futures = [pool.submit(train, *run) for run in missing]
            for future in as_completed(futures):
                run = future.result()
                report["runs"].append(run)
                file.write_text(json.dumps(report, indent=1) + "\n")
                progress.advance(shown)
                if hidden:
                    print(
                        f"{run['case']}, lr {run['lr']:g}, seed {run['seed']}: {run['loss']:.4f}", flush=True
                    )
    show(report, console)
    plots.quality(report, out / "quality")


def show(report: dict[str, Any], console: Console) -> None:
    """A table for each set: mean and spread over the seeds."""
    for group in dict.fromkeys(r["set"] for r in report["runs"]):
        first = next(r for r in report["runs"] if r["set"] == group)
        title = f"validation loss after {first['steps']} steps of {first['batch']} x {CONTEXT} bytes"
        table = Table(group, "lr", "mean", "lowest", "highest", "seeds", title=title)
        for case in dict.fromkeys(r["case"] for r in report["runs"] if r["set"] == group):
            rows = plots.losses(report, group, case)
            best = min(rows, key=lambda lr: statistics.mean(rows[lr]))
            for lr, found in rows.items():
                cells = [f"{x:.3f}" for x in (statistics.mean(found), min(found), max(found))]
                style = "bold" if lr == best and len(rows) > 1 else None
                table.add_row(case, f"{lr:g}", *cells, str(len(found)), style=style)
        console.print(table)


def _missing(runs: list[dict[str, Any]], sets: list[str]) -> list[tuple[str, Case, float, int]]:
    """What to run next: every learning rate with the first seed; then the best of them with the others."""
    losses = {(r["set"], r["case"], r["lr"], r["seed"]): r["loss"] for r in runs}
    cases = [(group, case) for group in sets for case in SETS[group].cases]
    first = [(group, case, lr, SEEDS[0]) for group, case in cases for lr in case.lrs]
    missing = [run for run in first if _key(*run) not in losses]
    if missing:
        return missing
    best = {
        (group, case.name): min(case.lrs, key=lambda lr: losses[group, case.name, lr, SEEDS[0]])
        for group, case in cases
    }
    others = [(group, case, best[group, case.name], seed) for seed in SEEDS[1:] for group, case in cases]
    return [run for run in others if _key(*run) not in losses]


def _key(group: str, case: Case, lr: float, seed: int) -> tuple[str, str, float, int]:
    return group, case.name, lr, seed


def train(group: str, case: Case, lr: float, seed: int) -> dict[str, Any]:
    """One run: the loss on the validation text at its end, in nats per byte."""
    steps, batch = SETS[group].steps, SETS[group].batch
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    training, validation = text.load(None)
    model = build_model()
    optimizer = _optimizer(case, model, lr, seed)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(steps))
    losses = []
    for step in range(steps):
        tokens = text.windows(training, batch, CONTEXT, seed=seed * 1_000_003 + step)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    tokens = text.windows(validation, VALIDATION_WINDOWS, CONTEXT, seed=1)
    with torch.no_grad():
        loss = sum(model(input_ids=t, labels=t).loss.item() * len(t) for t in tokens.split(16)) / len(tokens)
    case_options = {"optimizer": case.kind, "rows": case.rows, "options": case.options}
    return {
        "set": group,
        "case": case.name,
        **case_options,
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "seed": seed,
        "loss": loss,
        "curve": losses,
    }


def _optimizer(case: Case, model: torch.nn.Module, lr: float, seed: int) -> torch.optim.Optimizer:
    if case.kind != "NovoGrad":
        return getattr(torch.optim, case.kind)(model.parameters(), lr=lr, weight_decay=0.0, **case.options)
    params = param_groups(model) if case.rows else model.named_parameters()
    return NovoGrad(params, lr=lr, seed=seed, **case.options)


if __name__ == "__main__":
    typer.run(main)
