"""The demonstration: one small transformer, real text, two ranks, ZeRO-2; AdamW, Adafactor and NovoGrad.

    make demo                                  # sets itself up first
    make demo ARGS="--text my_corpus --steps 200"

For each optimizer it starts ``accelerate launch`` with the files of ``configs/``, prints a table of what
was measured, and writes the same as JSON with its provenance, and as a plot.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import plots, reports, tables, text
from benchmarks.language_models import gpt2
from novoscale import NovoGrad
from novoscale.memory import optimizer_state_bytes
from novoscale.tools import deepspeed_operation
from novoscale.tools.local_ranks import RankError, remove_shared_memory
from novoscale.tools.provenance import make_command, provenance

ROOT = Path(__file__).parent.parent
PORT = 29577
OPTIMIZERS = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor, "novograd": NovoGrad}


def main(
    text_path: Annotated[
        Path | None,
        typer.Option("--text", help="File or folder of UTF-8 text; default: Python's own sources."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each run.")] = 400,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Default: the number of GPUs, or 2 on a CPU.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for demo.json, demo.png and demo.svg.")] = Path("runs"),
    seed: Annotated[int, typer.Option(help="Of the weights and the batches.")] = 0,
) -> None:
    """Train the same model with each optimizer, and show what it took."""
    console = tables.console()
    try:
        text.load(text_path)
    except (FileNotFoundError, ValueError) as error:
        console.print(f"[red]{error}")
        raise typer.Exit(2) from None
    gpus = torch.cuda.device_count()
    ranks = ranks or gpus or 2
    if gpus and ranks > gpus:
        console.print(f"[red]--ranks {ranks}: NCCL needs a GPU for each rank, and there are {gpus}")
        raise typer.Exit(2)
    if not gpus and ranks > (os.cpu_count() or 1):
        console.print(
            f"[yellow]{ranks} ranks on {os.cpu_count()} cores: the times will be those of a busy machine"
        )
    if not gpus:
        try:
            deepspeed_operation.build()
        except RankError as error:
            console.print(error.brief(), style="red", markup=False)
            raise typer.Exit(1) from None
    results = {name: launch(console, name, ranks, steps, seed, text_path) for name in OPTIMIZERS}
    for name, result in results.items():
        result["state_bytes_unsharded"] = unsharded_state_bytes(name, result["config"]["optimizer"]["params"])
    report = {"provenance": provenance(make_command("demo")), "ranks": ranks, "runs": results}
    reports.write(out / "demo.json", report)
    plots.demo(report, out / "demo")
    console.print(table(report))
    console.print(f"Written: {out / 'demo.json'}, {out / 'demo.png'}, {out / 'demo.svg'}")


def launch(
    console: Console, name: str, ranks: int, steps: int, seed: int, text_path: Path | None
) -> dict[str, Any]:
    """One training run under ``accelerate launch``."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = ["accelerate", "launch", "--config_file", f"configs/accelerate_zero2_{name}.yaml"]
        command += ["--num_processes", str(ranks), "--main_process_port", str(PORT), "benchmarks/train.py"]
        command += ["--out", str(out), "--steps", str(steps), "--seed", str(seed)]
        if text_path is not None:
            command += ["--text", str(text_path.resolve())]
        console.print(f"[bold]{name}[/]: {' '.join(command[:4])} ...", highlight=False)
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
            "TRANSFORMERS_VERBOSITY": "error",
            # DeepSpeed probes the machine's NUMA nodes on CPU ranks unless it is told how many there are.
            "LOCAL_SIZE": str(ranks),
        }
        if not torch.cuda.is_available():
            environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // ranks, 1)))
        done = subprocess.run(command, cwd=ROOT, env=environment)
        remove_shared_memory(PORT)
        if done.returncode:
            console.print(
                f"[red]{name}: the training run ended with code {done.returncode}; its output is above"
            )
            raise typer.Exit(1)
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def unsharded_state_bytes(name: str, params: dict[str, Any]) -> int:
    """Bytes of state of the same optimizer and model, unsharded, in one process; after one step."""
    model = gpt2()
    options = {key: value for key, value in params.items() if key != "torch_adam"}
    optimizer = OPTIMIZERS[name](model.parameters(), **options)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    return optimizer_state_bytes(optimizer).total


def table(report: dict[str, Any]) -> Table:
    """What was measured, a row for each optimizer."""
    run = next(iter(report["runs"].values()))
    result = Table(
        title=f"{run['parameters'] / 1e6:.2f}M parameters, {run['steps']} steps, "
        f"ZeRO-2 on {report['ranks']} {run['device']} ranks",
        caption="State: bytes of the storages that the optimizer holds, of all ranks. Under ZeRO each rank "
        "has flat pieces of the model, on which Adafactor cannot factorise.",
    )
    result.add_column("optimizer")
    columns = (
        "lr",
        "state\nB/param",
        "state per\nrank, MiB",
        "unsharded\nB/param",
        "peak RSS\nMiB",
    )
    for column in (*columns, "train\nloss", "validation\nloss", "ms per\nstep"):
        result.add_column(column, justify="right")
    for r in report["runs"].values():
        per_rank = [rank["state_bytes"] for rank in r["ranks"]]
        tail = r["train_loss"][-max(r["steps"] // 20, 1) :]
        result.add_row(
            r["optimizer"],
            f"{r['config']['optimizer']['params']['lr']:g}",
            f"{sum(per_rank) / r['parameters']:.3f}",
            f"{max(per_rank) / 2**20:.2f}",
            f"{r['state_bytes_unsharded'] / r['parameters']:.3f}",
            f"{max(rank['peak_rss_bytes'] for rank in r['ranks']) / 2**20:.0f}",
            f"{sum(tail) / len(tail):.3f}",
            f"{r['validation_loss'][-1][1]:.3f}",
            f"{r['median_step_s'] * 1e3:.0f}",
        )
    return result


if __name__ == "__main__":
    typer.run(main)
