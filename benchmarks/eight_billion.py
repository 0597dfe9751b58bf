"""8 billion parameters, every one of them trained, in 24 GiB: each gradient is used as soon as it is there.

    make eight-billion                                  # Llama 8B; needs 22 GiB of free memory
    make eight-billion ARGS="--model llama-1b"          # the same of a model that fits anywhere

Random weights in bfloat16, made without a float32 copy; int4 state; activation checkpointing; one sample that
is repeated, on which the loss has to fall with each step. Writes what the operating system says of the
memory of the process as JSON, after each step, and at the end a picture beside what others need by plan.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import plots, reports, tables
from benchmarks.resident import Recording, available
from novoscale import NovoGrad, param_groups, release_gradients
from novoscale.memory import models, optimizer_state_bytes
from novoscale.memory.models import MemoryToolError
from novoscale.memory.optimizers import CANDIDATES
from novoscale.memory.planning import BFLOAT16, plan
from novoscale.memory.report import GIB
from novoscale.memory.rules import FLOAT32
from novoscale.optimizer.release import tied
from novoscale.tools.provenance import make_command, provenance

OPTIONS: dict[str, Any] = {"preset": "adamw", "momentum_dtype": "int4"}
NOVOGRAD = "NovoGrad, adamw, int4"  # their name in the catalogue
LIBRARIES = GIB // 2
# Titles of what is compared, with the names and precisions of `novoscale plan`. Gradients are kept.
PLANNED = {
    "AdamW, float32 weights": ("torch AdamW", "bf16-mixed"),
    "AdamW, bfloat16": ("torch AdamW", "bfloat16"),
    "AdamW8bit (bitsandbytes)": ("bitsandbytes AdamW8bit", "bfloat16"),
    "AdamW8bit (torchao)": ("torchao AdamW8bit", "bfloat16"),
    "Adafactor (torch)": ("torch Adafactor", "bfloat16"),
    "NovoGrad int4": (NOVOGRAD, "bfloat16"),
}


def main(
    model: Annotated[str, typer.Option(help="As of novoscale memory; one of transformers.")] = "llama-8b",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 3,
    tokens: Annotated[int, typer.Option(min=2, help="Of the one sample.")] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-6,
    stochastic_rounding: Annotated[bool, typer.Option(help="Of the bfloat16 weights.")] = True,
    seed: Annotated[int, typer.Option(help="Of the weights and the tokens.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for eight_billion.json, eight_billion.png and eight_billion.svg.")
    ] = Path("runs"),
) -> None:
    """Train a few steps, and show what it took. Exit code 1: the loss did not fall; 2: it cannot be tried."""
    console = tables.console()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        empty = without_weights(model)
        options = OPTIONS | {"lr": lr, "stochastic_rounding": stochastic_rounding}
        report = describe(empty, model) | {"tokens": tokens, "seed": seed, "options": options}
        refuse_too_little(report, empty)
    except MemoryToolError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None
    out.mkdir(parents=True, exist_ok=True)
    with Recording() as recording, shown_progress() as show:
        for found in train(empty, recording, options, steps, tokens, seed, show):
            report |= found | {"peak_rss": recording.peak, "samples": [*recording.samples]}
            write(report, out)  # an interrupted run keeps what it has
    plots.eight_billion(report, out / "eight_billion")
    console.print(table(report))
    console.print(f"Written: eight_billion.json, eight_billion.png, eight_billion.svg in {out}")
    if not falls([*(step["loss"] for step in report["steps"]), report["after"]["loss"]]):
        console.print("[red]The loss did not fall with every step.")
        raise typer.Exit(1)


def without_weights(name: str) -> Any:
    """The model on the meta device, in bfloat16. Raises MemoryToolError."""
    model = models.build(name, "meta", torch.bfloat16)
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise MemoryToolError(f"--model {name}: not a model of transformers")
    return model


def describe(model: nn.Module, name: str) -> dict[str, Any]:
    """What is known before anything runs: the plans, and the memory that there is."""
    free, limited_by = available()
    return {
        "provenance": provenance(make_command("eight-billion")),
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "memory": {"total": psutil.virtual_memory().total, "available": free, "limited_by": limited_by},
        "planned": planned(model, NOVOGRAD, "bfloat16", release=True),
        "planned_with_gradients": {
            title: planned(model, optimizer, precision) for title, (optimizer, precision) in PLANNED.items()
        },
    }


def planned(model: nn.Module, optimizer: str, precision: str, release: bool = False) -> dict[str, int]:
    """Bytes by ``novoscale plan``, as JSON."""
    rule = CANDIDATES[optimizer].state
    assert rule is not None
    found = plan(model, rule, "none", 1, precision, release)
    return {"weights": found.parameters, "gradients": found.gradients, "state": found.state}


def refuse_too_little(report: dict[str, Any], model: Any) -> None:
    """Raise MemoryToolError if there is less free memory than the run needs, with what is missing."""
    # Logits, their softmax, and the gradients of both.
    logits = 4 * FLOAT32 * report["tokens"] * model.config.get_text_config().vocab_size
    # Of a head that is tied to the embedding autograd adds up two gradients in a third.
    sums = 2 * BFLOAT16 * sum(p.numel() for p in tied(model))
    parts = {**report["planned"], "logits": logits, "sum of tied gradients": sums, "libraries": LIBRARIES}
    parts = {name: value for name, value in parts.items() if value}
    needed, memory = sum(parts.values()), report["memory"]
    if needed > memory["available"]:
        listed = ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts.items())
        raise MemoryToolError(
            f"{report['model']} needs {needed / GIB:.1f} GiB of memory ({listed}), and "
            f"{memory['limited_by']} has {memory['available'] / GIB:.1f} GiB left: "
            f"{(needed - memory['available']) / GIB:.1f} GiB are missing. Stop what else runs here, or take "
            "a smaller model, such as --model llama-1b"
        )


def train(
    model: nn.Module,
    recording: Recording,
    options: dict[str, Any],
    steps: int,
    tokens: int,
    seed: int,
    show: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Make the weights and train; gives what has come since, after the weights, each step, and at the end."""
    show("weights")
    with recording.span() as weights:
        materialise(model, seed)
    yield {"weights": weights}
    sample = sample_of(model, tokens, seed)
    optimizer = NovoGrad(param_groups(model, preset=options["preset"]), **options)
    done: list[dict[str, Any]] = []
    with release_gradients(model, optimizer):
        for step in range(1, steps + 1):
            show(f"step {step} of {steps}: forward")
            with recording.span() as forward:
                loss = model(input_ids=sample, labels=sample).loss
            show(f"step {step} of {steps}: loss {loss:.4f}, backward with the optimizer's steps")
            with recording.span() as backward:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            done.append({"loss": loss.item(), "forward": forward, "backward": backward})
            yield {"steps": done}
    del loss
    show("loss after the last step")
    with recording.span() as forward, torch.no_grad():
        after = model(input_ids=sample, labels=sample).loss.item()
    yield {"after": {"loss": after, "forward": forward}, "state": optimizer_state_bytes(optimizer).total}


def materialise(model: nn.Module, seed: int) -> None:
    """Give a model of the meta device its memory and random weights, and make it ready to train.

    Weights are filled where they are, in their own dtype, by transformers' rules: normal matrices, norms of
    one, biases of zero; buffers such as the frequencies of rotary positions are computed anew.
    """
    model.to_empty(device="cpu")
    made: Any = model
    made.tie_weights()
    torch.manual_seed(seed)
    made.initialize_weights()
    made.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its new name is not in transformers 4
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()


def sample_of(model: Any, tokens: int, seed: int) -> Tensor:
    """One sample of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.get_text_config().vocab_size, (1, tokens), generator=generator)


def falls(losses: list[float]) -> bool:
    """Whether each loss is lower than the one before."""
    return all(later < earlier for earlier, later in itertools.pairwise(losses))


@contextmanager
def shown_progress() -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done; only on a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=None)
        yield lambda what: progress.update(task, description=what)


def write(report: dict[str, Any], out: Path) -> None:
    """Write the JSON; a line for each sample."""
    text = json.dumps(report, indent=1)
    text = re.sub(r"\[\s+([\d.]+),\s+(\d+)\s+\]", r"[\1, \2]", text)
    reports.replace(out / "eight_billion.json", text + "\n")


def table(report: dict[str, Any]) -> Table:
    """What was measured, a row for each step."""
    peak, total = report["peak_rss"] / GIB, report["memory"]["total"] / GIB
    result = Table(
        title=f"{report['model']}: {report['parameters']:,} parameters, all trained; "
        f"peak {peak:.2f} GiB of the machine's {total:.1f}",
        caption="GiB of the process (RSS), all included. The optimizer's steps are in the backward pass.",
    )
    columns = ("", "loss before", "forward, s", "backward, s", "peak forward", "peak backward", "after")
    for column in columns:
        result.add_column(column, justify="right" if column else "left")
    result.add_row("weights", *[""] * 5, f"{report['weights']['rss'] / GIB:.2f}")
    for number, step in enumerate(report["steps"], 1):
        spans = step["forward"], step["backward"]
        result.add_row(
            f"step {number}",
            f"{step['loss']:.4f}",
            *(f"{span['stop_s'] - span['start_s']:.1f}" for span in spans),
            *(f"{span['peak_rss'] / GIB:.2f}" for span in spans),
            f"{step['backward']['rss'] / GIB:.2f}",
        )
    result.add_row("afterwards", f"{report['after']['loss']:.4f}")
    return result


if __name__ == "__main__":
    typer.run(main)
