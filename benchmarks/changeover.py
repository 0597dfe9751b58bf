"""A training that changes from AdamW to NovoGrad at half its steps, beside one of each throughout.

    make changeover        # three seeds: some 15 minutes on two cores; runs that are there are kept

The model, text, schedule, clipping and decay of ``quality.py``, at AdamW's best learning rate there. The
change is what a user does: a new NovoGrad, and ``load_state_dict`` of AdamW's state; the scheduler goes on.
For comparison the same without the state: NovoGrad anew at half the steps, with its moments at zero.
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import plots, reports, tables, text
from benchmarks.language_models import CONTEXT, MODELS, VALIDATION_WINDOWS, validation_loss
from benchmarks.loop import Loop
from benchmarks.trials import BETAS, make_optimizer
from novoscale.tools.provenance import provenance

BATCH, STEPS, CLIP, DECAY = 16, 400, 1.0, 0.1
LR = 0.001  # AdamW's best in docs/quality.md
EVERY, CLOSELY = 20, 5  # steps from validation to validation; in the first ones after the change
FORMATS = ("float32", "int8")
ANEW = "AdamW, then NovoGrad anew"
NAMES = {"AdamW": "AdamW", **{name: f"NovoGrad, {name}" for name in FORMATS}}  # of each job's own curve


class Training:
    """A model with its optimizer and scheduler, and what its validation loss was."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int) -> None:
        self.model, self.optimizer, self.seed, self.steps = model, optimizer, seed, steps
        self.loop = Loop(model, optimizer, steps, CLIP)
        self.curve: list[tuple[int, float]] = []
        self.train_text, self.validation_text = text.load(None)

    def run(self, first: int, last: int) -> None:
        """The steps first..last."""
        for step in range(first, last):
            tokens = text.batch(self.train_text, BATCH, CONTEXT, self.seed, step)
            self.loop.step(self.model(input_ids=tokens, labels=tokens).loss)
            done = step + 1
            after = done - self.steps // 2
            if done % EVERY == 0 or (0 < after < 2 * EVERY and after % CLOSELY == 0):
                loss = validation_loss(self.model, self.validation_text, VALIDATION_WINDOWS)
                self.curve.append((done, round(loss, 5)))

    def changed(self, momentum_dtype: str, with_state: bool) -> Training:
        """A copy that goes on under NovoGrad."""
        model = copy.deepcopy(self.model)
        optimizer = make_novograd(model, momentum_dtype, self.seed)
        other = Training(model, optimizer, self.seed, self.steps)
        if with_state:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                optimizer.load_state_dict(self.optimizer.state_dict())
        other.loop.scheduler.load_state_dict(self.loop.scheduler.state_dict())
        if not with_state:
            for group, lr in zip(optimizer.param_groups, self.loop.scheduler.get_last_lr(), strict=True):
                group["lr"] = lr
        other.curve = self.curve[-1:]
        return other


def make_novograd(model: nn.Module, momentum_dtype: str, seed: int) -> torch.optim.Optimizer:
    """With the preset whose learning rates are AdamW's."""
    options = {"preset": "adamw", "momentum_dtype": momentum_dtype, "allow_lossy_load": True}
    return make_optimizer("NovoGrad", model, DECAY, seed, lr=LR, **options)


def train(model: str, seed: int, kind: str, steps: int) -> dict[str, list[tuple[int, float]]]:
    """The validation curves of a job: NovoGrad throughout in one format, or AdamW and all that leaves it."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    module = MODELS[model]()
    half = steps // 2
    if kind in FORMATS:
        training = Training(module, make_novograd(module, kind, seed), seed, steps)
        training.run(0, steps)
        return {NAMES[kind]: training.curve}
    training = Training(module, make_optimizer("AdamW", module, DECAY, lr=LR, betas=BETAS), seed, steps)
    training.run(0, half)
    found = {}
    for momentum_dtype in FORMATS:
        other = training.changed(momentum_dtype, with_state=True)
        other.run(half, steps)
        found[f"AdamW, then NovoGrad, {momentum_dtype}"] = other.curve
    other = training.changed("float32", with_state=False)
    other.run(half, steps)
    found[ANEW] = other.curve
    training.run(half, steps)
    return {"AdamW": training.curve, **found}


def main(
    out: Annotated[Path, typer.Option(help="Folder for changeover.json, and its plot.")] = Path("runs"),
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int, typer.Option(min=2 * EVERY)] = STEPS,
    model: Annotated[str, typer.Option(help=f"Of {', '.join(MODELS)}.")] = "llama",
    jobs: Annotated[int, typer.Option(min=1, help="Jobs at a time, a thread each.")] = os.cpu_count() or 1,
) -> None:
    """Train, and show the table."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "changeover.json"
    settings = {
        "model": model,
        "steps": steps,
        "batch": BATCH,
        "context": CONTEXT,
        "lr": LR,
        "betas": [*BETAS],
    }
    settings |= {"weight_decay": DECAY, "clip": CLIP}
    report = reports.read(file, {**settings, "runs": []})
    if any(report[key] != value for key, value in settings.items()):
        raise typer.BadParameter(f"{file} is of other settings: give another --out")
    report["provenance"] = provenance("make changeover")
    done = {(run["seed"], run["name"]) for run in report["runs"]}
    wanted = [(s, k) for s in range(seeds) for k in NAMES if (s, NAMES[k]) not in done]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {pool.submit(train, model, seed, kind, steps): seed for seed, kind in wanted}
        for future in as_completed(futures):
            for name, curve in future.result().items():
                report["runs"].append({"name": name, "seed": futures[future], "validation_loss": curve})
                print(name, futures[future], curve[-1], flush=True)
            reports.write(file, report)
    report["runs"].sort(key=lambda run: (run["name"], run["seed"]))
    reports.write(file, report)
    show(report)
    plots.changeover(report, out / "changeover")


def losses(report: dict[str, Any], name: str, step: int) -> list[float]:
    """The validation losses of all seeds after a step."""
    curves = [dict(map(tuple, r["validation_loss"])) for r in report["runs"] if r["name"] == name]
    return [curve[step] for curve in curves if step in curve]


def show(report: dict[str, Any]) -> None:
    """The mean over the seeds, with the lowest and the highest, soon after the change and at the end."""
    half, steps = report["steps"] // 2, report["steps"]
    points = (half, half + CLOSELY, half + EVERY, steps)
    table = Table("", *(f"after {step} steps" for step in points), title="validation loss, nats per byte")
    for name in dict.fromkeys(run["name"] for run in report["runs"]):
        cells = []
        for step in points:
            found = losses(report, name, step)
            spread = f" ({min(found):.4f} to {max(found):.4f})" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.4f}{spread}" if found else "")
        table.add_row(name, *cells)
    tables.console(140).print(table)


if __name__ == "__main__":
    typer.run(main)
