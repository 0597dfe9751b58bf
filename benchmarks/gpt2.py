"""GPT-2 124M on one GPU, from the first step to the end of a schedule: AdamW and the forms of NovoGrad.

    make gpt2 ARGS="tokens FOLDER"      # once, on any machine: the text below a folder as BPE tokens
    make gpt2 ARGS="train"              # on a GPU; goes on where it was stopped

The rule for AdamW and for NovoGrad is the same: learning rates that differ by factors of two, until one that
is worse has been tried on either side of the best; then a second seed at the best. NovoGrad's formats have
the rate of float32. Batch, tokens, clipping and schedule are the same for all.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import plots, reports, tables, text, trials
from benchmarks.language_models import gpt2
from benchmarks.loop import Loop
from benchmarks.trials import BETAS, finite, loss_of
from novoscale.memory import optimizer_state_bytes
from novoscale.tools.provenance import make_command, provenance

CLIP, DECAY = 1.0, 0.1
RATES = (0.0006, 0.0012, 0.0024)
MOST_RATES = 6
LOOKS = 10  # at the held-out text, in a training


@dataclass(frozen=True)
class Shape:
    """A model, and how long it is trained."""

    vocabulary: int = 50_304  # GPT-2's, to the next multiple of 64
    context: int = 1024
    width: int = 768
    layers: int = 12
    heads: int = 12
    batch: int = 32
    steps: int = 400
    held_out: int = 64  # windows


@dataclass(frozen=True)
class Case:
    """An optimizer: its class, its options, its first rates; and the case that it has the rate of."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = RATES
    decay: float = DECAY
    seeds: int = 1
    rate_of: str | None = None


def _preset(momentum_dtype: str) -> Case:
    options = {"preset": "adamw", "momentum_dtype": momentum_dtype}
    return Case("NovoGrad", options, rate_of="NovoGrad, adamw")


# What is asked for first comes first.
CASES = {
    "AdamW": Case("AdamW", {"betas": BETAS, "fused": True}, seeds=2),
    "NovoGrad, adamw": Case("NovoGrad", {"preset": "adamw"}, seeds=2),
    "NovoGrad, adamw, int8": _preset("int8"),
    "NovoGrad, adamw, int4": _preset("int4"),
    "NovoGrad, paper": Case("NovoGrad", {"preset": "paper"}, (0.005, 0.01, 0.02), 0.001),
}


class Run(NamedTuple):
    """One training."""

    case: str
    lr: float
    seed: int = 0


app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def tokens(
    folder: Annotated[Path, typer.Argument(help="Every UTF-8 file below it is read.")],
    out: Annotated[Path, typer.Option(help="The tokens, compressed.")] = Path("runs/tokens.npz"),
    most: Annotated[int, typer.Option(help="Tokens to keep for training.")] = 24_000_000,
) -> None:
    """Train a byte-level BPE on a folder's text, and write the text as its tokens."""
    from tokenizers import ByteLevelBPETokenizer

    training, held_out = (bytes(t.numpy()).decode("utf-8", "replace") for t in text.load(folder))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(training.split("\n\n"), vocab_size=Shape.vocabulary, show_progress=False)
    found = {}
    for name, part in (("training", training), ("held_out", held_out)):
        paragraphs = tokenizer.encode_batch([p + "\n\n" for p in part.split("\n\n")])
        found[name] = numpy.concatenate([numpy.array(p.ids, numpy.uint16) for p in paragraphs])[:most]
        print(f"{name}: {len(part)} characters, {len(found[name])} tokens kept", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    numpy.savez_compressed(out, **found)


@app.command()
def train(
    data: Annotated[Path, typer.Option("--tokens", help="Of the command tokens.")] = Path("runs/tokens.npz"),
    text_name: Annotated[str, typer.Option("--text", help="What the text is, for the result.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for gpt2.json, and its plot.")] = Path("runs"),
    minutes: Annotated[float, typer.Option(help="Nothing begins that would end later.")] = 60,
    steps: Annotated[int, typer.Option(min=1, help="Of a training.")] = Shape.steps,
) -> None:
    """Train what is missing."""
    if not torch.cuda.is_available():
        print(f"make gpt2 needs a GPU, and torch {torch.__version__} sees none.", file=sys.stderr)
        raise typer.Exit(2)
    torch.set_float32_matmul_precision("high")
    out.mkdir(parents=True, exist_ok=True)
    file, shape = out / "gpt2.json", Shape(steps=steps)
    report = reports.read(file, {"runs": []})
    if report.get("shape", vars(shape)) != vars(shape) or report.get("text", text_name) != text_name:
        raise typer.BadParameter(f"{file}: its runs have other steps or another --text; use another --out")
    report |= {
        "text": text_name,
        "shape": vars(shape),
        "clip": CLIP,
        "provenance": provenance(make_command("gpt2")),
    }
    trainer, slowest, end = Trainer(shape, data, torch.device("cuda")), 0.0, time.monotonic() + 60 * minutes
    console = tables.console(140)
    with Progress(console=console, disable=not sys.stdout.isatty()) as progress:
        bar = progress.add_task("trainings", total=None)
        while (run := next(missing(report["runs"]), None)) and time.monotonic() + slowest < end:
            start = time.monotonic()
            report["runs"].append(trainer.train(run))
            slowest = max(slowest, time.monotonic() - start)
            reports.write(file, report)
            progress.advance(bar)
            print({k: v for k, v in report["runs"][-1].items() if k != "curve"}, flush=True)
    show(report, console)
    plots.gpt2(by_case(report["runs"]), report["provenance"], out / "gpt2")


def missing(results: Sequence[dict[str, Any]]) -> Iterator[Run]:
    """What is to be run and can be told from what is known: all rates before further seeds."""
    losses = trials.losses(Run, results)
    best: dict[str, float] = {}
    for name, case in CASES.items():
        if case.rate_of is None:
            known = {run.lr: loss for run, loss in losses.items() if run == Run(name, run.lr)}
            tried = trials.rates(case.rates, known.get, 1, MOST_RATES)
            yield from (Run(name, lr) for lr in tried if lr not in known)
            best[name] = trials.best(known) or tried[0]
    for seed in range(max(case.seeds for case in CASES.values())):
        for name, case in CASES.items():
            run = Run(name, best[case.rate_of or name], seed)
            if seed < case.seeds and run not in losses:
                yield run


class Trainer:
    """One model, compiled once, that is trained from its first weights again and again.

    Args:
        shape: of the model and of a training.
        data: tokens, of the command ``tokens``.
        device: of the model.
    """

    def __init__(self, shape: Shape, data: Path, device: torch.device) -> None:
        self.shape, self.device = shape, device
        with numpy.load(data) as content:
            self.training, held_out = (
                torch.from_numpy(content[k].astype(numpy.int32)) for k in ("training", "held_out")
            )
        self.held_out = text.windows(held_out, shape.held_out, shape.context, seed=1).to(device)
        self.model = self._made(0).to(device)
        self._loss = torch.compile(self._loss_of, disable=device.type == "cpu")

    def _made(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        s = self.shape
        return gpt2(s.vocabulary, s.context, s.width, s.layers, s.heads)

    def _loss_of(self, batch: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(input_ids=batch).logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits.float(), batch[:, 1:].flatten())

    def train(self, run: Run) -> dict[str, Any]:
        """One training: the loss on the held-out text at its end, in nats per token, and what it took."""
        case, shape = CASES[run.case], self.shape
        self.model.load_state_dict(self._made(run.seed).state_dict())
        optimizer = trials.make_optimizer(
            case.kind, self.model, case.decay, run.seed, lr=run.lr, **case.options
        )
        loop = Loop(self.model, optimizer, shape.steps, CLIP, clock=partial(mark, self.device))
        moments: list[tuple[Any, ...]] = []
        curve: list[tuple[int, float]] = []
        for step in range(shape.steps):
            batch = text.batch(self.training, shape.batch, shape.context, run.seed, step)
            start = mark(self.device)
            moments.append((start, *loop.step(self._loss(batch.to(self.device)))))
            if (step + 1) % max(shape.steps // LOOKS, 1) == 0 or step + 1 == shape.steps:
                curve.append((step + 1, self.evaluate()))
                if not math.isfinite(curve[-1][1]):
                    break
        return {
            **run._asdict(),
            "loss": finite(curve[-1][1]),
            "curve": [(step, finite(loss)) for step, loss in curve],
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "state_bytes": optimizer_state_bytes(optimizer).total,
            "optimizer_ms": milliseconds(moments[len(moments) // 10 :], 1, 2),
            "step_ms": milliseconds(moments[len(moments) // 10 :], 0, 2),
        }

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the held-out windows."""
        parts = self.held_out.split(self.shape.batch)
        return sum(self._loss(part).item() for part in parts) / len(parts)


def mark(device: torch.device) -> Any:
    """This moment, on the device's clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(moments: Sequence[tuple[Any, ...]], first: int, last: int) -> float:
    """The median time between two of the moments of each step."""
    between = [(step[first], step[last]) for step in moments]
    return statistics.median(
        1e3 * (b - a) if isinstance(a, float) else float(a.elapsed_time(b)) for a, b in between
    )


def show(report: dict[str, Any], console: Console) -> None:
    """A row for each case, at its best rate."""
    columns = ["optimizer", "rates", "best rate", "loss", "seeds", "state, bytes a parameter"]
    columns += ["optimizer, ms", "step, ms"]
    cells = []
    for name, rows in by_case(report["runs"]).items():
        best = min((row for row in rows if row["seed"] == 0), key=loss_of)
        seeds = [f"{loss_of(row):.4f}" for row in rows if row["lr"] == best["lr"]]
        rates = " ".join(f"{r['lr']:g}: {loss_of(r):.4f}" for r in rows if r["seed"] == 0)
        times = (f"{min(row[key] for row in rows):.2f}" for key in ("optimizer_ms", "step_ms"))
        state = f"{best['state_bytes'] / best['parameters']:.2f}"
        cells.append([name, rates, f"{best['lr']:g}", " ".join(seeds), str(len(seeds)), state, *times])
    title = f"GPT-2 124M, {report['shape']['steps']} steps: nats per held-out token"
    console.print(tables.on_terminal(title, columns, cells))


def by_case(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs of each case, by rate."""
    found = {name: sorted((r for r in results if r["case"] == name), key=lambda r: r["lr"]) for name in CASES}
    return {name: rows for name, rows in found.items() if rows}


if __name__ == "__main__":
    app()
