"""What a language model learns under each optimizer: validation loss after equal steps, in one process.

    make quality                                  # everything: some 150 runs of about 90 seconds on one core
    make quality ARGS="--only Lion --only NAdamW"

The same rule for every optimizer: four learning rates that differ by factors of two, and more until the best
of them has a worse one on either side, all with one seed; then weight decay and further seeds at the best
rate. The formats of the first moment have the rate of float32. Each run is written to the result file when
it ends, and one that is there is not repeated.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import plots, reports, tables, text, trials
from benchmarks.language_models import CONTEXT, MODELS, validation_loss
from benchmarks.loop import Loop
from benchmarks.trials import BETAS, NADAMW, finite
from novoscale import NovoGrad, param_groups
from novoscale.tools.provenance import provenance

BATCH, STEPS, LONG = 16, 400, 1600
CLIP, DECAY = 1.0, 0.1
RATES = (0.0005, 0.001, 0.002, 0.004)
MOST_RATES = 10
OF_CURVE = 10  # steps in a point of the stored curve


@dataclass(frozen=True)
class Case:
    """An optimizer on one model.

    Attributes:
        model: one of language_models.MODELS.
        name: for tables.
        kind: its class: see trials.make_optimizer.
        options: keyword arguments, beside lr and weight_decay.
        rates: the first learning rates.
        by_row: param groups of novoscale.param_groups.
        seeds: at the best rate.
        long: whether it is also trained for ``LONG`` steps.
        rate_of: the case whose best rate it has, instead of rates of its own.
    """

    model: str
    name: str
    kind: str = "NovoGrad"
    options: dict[str, Any] = field(default_factory=lambda: {"betas": BETAS})
    rates: tuple[float, ...] = RATES
    by_row: bool = False
    seeds: int = 3
    long: bool = False
    rate_of: str | None = None


class Run(NamedTuple):
    """One training."""

    model: str
    case: str
    lr: float
    seed: int = 0
    weight_decay: float = 0.0
    steps: int = STEPS


# Both moments averaged as Adam does it, so that the first gradients do not weigh more than others.
AVERAGES = {"normalize": "rms", "grad_averaging": True, "init_zero": True, "bias_correction": True}
ROW = {"preset": "paper", "betas": BETAS, **AVERAGES}
FACTORED = {**ROW, "granularity": "factored"}
NESTEROV = {**FACTORED, "nesterov": True}
LION_RATES = tuple(lr / 8 for lr in RATES)
# Relative to the root mean square of the weights.
RELATIVE_RATES = (0.01, 0.02, 0.04, 0.08)

WINNER = "NovoGrad: factored, Nesterov"
MUON = "NovoGrad: muon"
FORMATS = ("bfloat16", "int8", "int4")
CASES = [
    Case("llama", "AdamW", "AdamW", seeds=5, long=True),
    Case("llama", "AdamW8bit", "AdamW8bit", rate_of="AdamW"),
    Case("llama", "NAdamW", "NAdam", NADAMW, long=True),
    Case("llama", "Adafactor", "Adafactor", {}, RELATIVE_RATES),
    Case("llama", "Lion", "Lion", {"betas": (0.9, 0.99)}, LION_RATES),
    Case("llama", "Adam-mini", "AdamMini", {"betas": BETAS}),
    Case("llama", "NovoGrad: the paper's", options={"preset": "paper"}, rates=(0.001, 0.002, 0.004, 0.008)),
    Case("llama", "NovoGrad: row", options=ROW, by_row=True),
    Case("llama", "NovoGrad: factored", options=FACTORED),
    Case("llama", WINNER, options=NESTEROV, long=True),
    Case("llama", f"{WINNER}, clipped", options={**NESTEROV, "clip_threshold": 1.0}),
    Case("llama", f"{WINNER}, scaled", options={**NESTEROV, "scale_parameter": True}, rates=RELATIVE_RATES),
    Case("gpt2", "AdamW", "AdamW", seeds=5),
    Case("gpt2", "NAdamW", "NAdam", NADAMW),
    Case("gpt2", "NovoGrad: row", options=ROW, by_row=True),
    Case("gpt2", "NovoGrad: factored", options=FACTORED),
    Case("gpt2", WINNER, options=NESTEROV),
    *(
        Case("llama", f"{WINNER}, {name}", options={**NESTEROV, "momentum_dtype": name}, rate_of=WINNER)
        for name in FORMATS
    ),
    *(
        case
        for model in MODELS
        for case in (
            Case(model, "Muon with AdamW", "Muon", {"betas": BETAS, "ratio": 4}, long=True),
            Case(model, "Muon with AdamW, half", "Muon", {"betas": BETAS, "ratio": 2}),
            Case(model, MUON, options={"preset": "muon"}, long=True),
            Case(model, f"{MUON}, half", options={"preset": "muon", "ratio": 2}, seeds=1),
            Case(model, f"{MUON}, all else adamw", options={"preset": "muon", "others": "adamw"}),
        )
    ),
    *(
        Case(
            "llama",
            f"{MUON}, {name}",
            options={"preset": "muon", "momentum_dtype": name},
            rate_of=MUON,
            long=True,
        )
        for name in ("int8", "int4")
    ),
]


def main(
    out: Annotated[Path, typer.Option(help="Folder for quality.json, and its plot.")] = Path("runs"),
    only: Annotated[list[str] | None, typer.Option(help="A case by its name; may be repeated.")] = None,
    model: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(MODELS)}.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, a thread each.")] = os.cpu_count() or 1,
) -> None:
    """Train what is missing, and show the tables."""
    console = tables.console()
    chosen = [c for c in CASES if c.name in (only or [c.name]) and c.model in (model or MODELS)]
    unknown = {*(only or ())} - {c.name for c in CASES} | {*(model or ())} - {*MODELS}
    if unknown:
        console.print(f"[red]no case or model of the name {', '.join(unknown)}; cases: ", end="")
        console.print(", ".join(dict.fromkeys(c.name for c in CASES)), highlight=False)
        raise typer.Exit(2)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "quality.json"
    report = reports.read(file, {"runs": []})
    report |= {"context": CONTEXT, "batch": BATCH, "clip": CLIP}
    source = provenance("make quality")
    hidden = not sys.stdout.isatty()
    while runs := list(missing(report["runs"], chosen)):
        # A process for each run: two that share one would share its threads.
        pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1)
        with pool, Progress(console=console, disable=hidden) as progress:
            shown = progress.add_task("runs", total=len(runs))
            for future in as_completed([pool.submit(train, run) for run in runs]):
                result = future.result()
                report["runs"].append({**result, "commit": source["commit"]})
                report["provenance"] = source
                reports.write(file, report)
                progress.advance(shown)
                if hidden:
                    print({k: v for k, v in result.items() if k != "curve"}, flush=True)
    show(report, console)
    plots.quality(summary(report["runs"]), STEPS, report["provenance"], out / "quality")


def missing(results: Sequence[dict[str, Any]], cases: Sequence[Case]) -> Iterator[Run]:
    """What can be run next, of the learning rates first."""
    losses = by_run(results)
    wanted: list[Run] = []
    for case in cases:
        if case.rate_of is None:
            wanted += [Run(case.model, case.name, lr) for lr in rates(case, losses)]
    if not all(run in losses for run in wanted):
        yield from (run for run in wanted if run not in losses)
        return
    for seed in range(max((c.seeds for c in cases), default=0)):
        for case in cases:
            lr = best_rate(case, losses)
            if lr is not None and seed < case.seeds:
                wanted.append(Run(case.model, case.name, lr, seed))
                if seed == 0 and case.rate_of is None:
                    wanted.append(Run(case.model, case.name, lr, weight_decay=DECAY))
                if seed == 0 and case.long:
                    wanted.append(Run(case.model, case.name, lr, steps=LONG))
    yield from (run for run in dict.fromkeys(wanted) if run not in losses)


def by_run(results: Sequence[dict[str, Any]]) -> dict[Run, float]:
    """The losses; infinite where the training diverged."""
    return trials.losses(Run, results)


def rates(case: Case, losses: dict[Run, float]) -> list[float]:
    """The learning rates to try: the first ones, and further ones while the best is at an end."""
    return trials.rates(case.rates, lambda lr: losses.get(Run(case.model, case.name, lr)), 1, MOST_RATES)


def best_rate(case: Case, losses: dict[Run, float]) -> float | None:
    """The learning rate with the lowest loss; None as long as it is not known."""
    name = case.rate_of or case.name
    tried = {run.lr: loss for run, loss in losses.items() if run == Run(case.model, name, run.lr)}
    return trials.best(tried)


def train(run: Run) -> dict[str, Any]:
    """One run: the loss on the validation text at its end, in nats per byte."""
    (case,) = (c for c in CASES if (c.model, c.name) == (run.model, run.case))
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    training, validation = text.load(None)
    model = MODELS[run.model]()
    optimizer = make_optimizer(case, model, run)
    loop = Loop(model, optimizer, run.steps, CLIP)
    losses = []
    for step in range(run.steps):
        tokens = text.batch(training, BATCH, CONTEXT, run.seed, step)
        loss = model(input_ids=tokens, labels=tokens).loss
        loop.step(loss)
        losses.append(loss.item())
    points = [losses[i : i + OF_CURVE] for i in range(0, len(losses), OF_CURVE)]
    return {
        **run._asdict(),
        "optimizer": case.kind,
        "options": case.options,
        "loss": finite(validation_loss(model, validation)),
        "curve": [round(statistics.mean(p), 4) if all(map(math.isfinite, p)) else None for p in points],
    }


def make_optimizer(case: Case, model: nn.Module, run: Run) -> torch.optim.Optimizer:
    """The optimizer of a run, with weight decay on matrices only."""
    options = {"lr": run.lr, "seed": run.seed, **case.options}
    if case.by_row:
        return NovoGrad(param_groups(model, weight_decay=run.weight_decay), **{"preset": "paper", **options})
    return trials.make_optimizer(case.kind, model, run.weight_decay, **options)


def summary(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What ``plots.quality`` shows."""
    losses = by_run(results)
    found: dict[str, dict[str, Any]] = {}
    for case in CASES:
        lr = best_rate(case, losses)
        run = Run(case.model, case.name, lr or 0)
        seeds = [loss for r, loss in losses.items() if r == run._replace(seed=r.seed)]
        if seeds:
            tried = {r.lr: loss for r, loss in losses.items() if r == run._replace(lr=r.lr)}
            found.setdefault(case.model, {})[case.name] = {"rates": tried, "seeds": seeds}
    return found


def show(report: dict[str, Any], console: Console) -> None:
    """A table for each model: every learning rate, then what was run at the best of them."""
    losses = by_run(report["runs"])
    for model in MODELS:
        tokens = f"{BATCH} x {CONTEXT} bytes"
        columns = ["optimizer", "rates", "best rate", "mean", "lowest", "highest", "seeds"]
        columns += [f"decay {DECAY:g}", f"{LONG} steps"]
        best = [(case, best_rate(case, losses)) for case in CASES if case.model == model]
        rows = [[case.name, *_cells(case, lr, losses)] for case, lr in best if lr is not None]
        title = f"{model}: validation loss after {STEPS} steps of {tokens}"
        console.print(tables.on_terminal(title, columns, rows))


def _cells(case: Case, lr: float, losses: dict[Run, float]) -> list[str]:
    run = Run(case.model, case.name, lr)
    tried = sorted((r.lr, loss) for r, loss in losses.items() if r == run._replace(lr=r.lr))
    seeds = [loss for r, loss in losses.items() if r == run._replace(seed=r.seed)]
    rates = " ".join(f"{rate:g}: {loss:.3f}" for rate, loss in tried) if case.rate_of is None else "-"
    of_seeds = [f"{f(seeds):.3f}" for f in (statistics.mean, min, max)] if seeds else ["-"] * 3
    others = (run._replace(weight_decay=DECAY), run._replace(steps=LONG))
    return [
        rates,
        f"{lr:g}",
        *of_seeds,
        str(len(seeds)),
        *(f"{losses[r]:.3f}" if r in losses else "-" for r in others),
    ]


if __name__ == "__main__":
    typer.run(main)
