"""The time of a step: NovoGrad beside the optimizers of torch and others, in one run.

    make speed
    python benchmarks/speed.py --shape gpt2-124m --shape flat-64m --dtype bfloat16

The optimizers take turns with the same weights and gradients, round after round, so that what disturbs the
machine disturbs all. Each is also timed with clipping: ``max_grad_norm`` in NovoGrad's step,
``torch.nn.utils.clip_grad_norm_`` before the others'. The copy bandwidth is measured in the same rounds. A
run, of one dtype, is appended to speed.json, and drawn.

Without options, all shapes of the device in both dtypes: on two quiet cores of a CPU 16 minutes. There,
what takes longer than SLOW a step has one turn, of FEW steps; and a shape that is LARGE one round without
clipping, of fused optimizers.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import plots, reports, tables
from benchmarks.shapes import CATALOGUE, DEFAULT, Shapes
from novoscale.memory.optimizers import CANDIDATES, Candidate
from novoscale.memory.planning import full_tensor
from novoscale.tools.provenance import make_command, provenance

# Larger than any norm here: the gradients stay what they are, and the work is the same.
CLIP = 1e6
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COPY = 1 << 28  # bytes copied to measure the bandwidth: larger than caches
LARGE = 1 << 28  # elements, on a CPU: beyond, a step takes seconds
SLOW, FEW = 0.25, 3  # seconds of a step on a CPU, from which on so many are enough

Row = dict[str, Any]


def main(
    shape: Annotated[list[str] | None, typer.Option(help=f"Of: {', '.join(CATALOGUE)}.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Of weights and gradients; default: both.")] = None,
    optimizer: Annotated[list[str] | None, typer.Option(help="Those whose name contains this.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: cuda if there is one.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each optimizer.")] = 2,
    steps: Annotated[int, typer.Option(help="Timed steps of a turn, after two that are not.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for speed.json and the plot.")] = Path("runs"),
) -> None:
    """Measure, print a table, append to speed.json, draw."""
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = [n for n in CANDIDATES if not optimizer or any(part.lower() in n.lower() for part in optimizer)]
    names = [n for n in names if where in CANDIDATES[n].timed_on]
    shapes = shape or DEFAULT[where]
    unknown = [name for name in shapes if name not in CATALOGUE]
    if unknown:
        raise typer.BadParameter(f"no shape {unknown}; there are {', '.join(CATALOGUE)}")
    dtypes = dtype or list(DTYPES)
    unknown = [name for name in dtypes if name not in DTYPES]
    if unknown:
        raise typer.BadParameter(f"no dtype {unknown}; there are {', '.join(DTYPES)}")
    for name in dtypes:
        run_of(shapes, names, where, name, rounds, steps, out)


def run_of(
    shapes: Sequence[str], names: list[str], where: str, dtype: str, rounds: int, steps: int, out: Path
) -> None:
    """Measure all shapes in one dtype; kept after each: an interrupted run has what it has measured."""
    file, plot = out / "speed.json", out / f"speed_{where}_{dtype}"
    before = reports.read(file, [])
    run: dict[str, Any] = {
        "provenance": provenance(make_command("speed")),
        "device": torch.cuda.get_device_name() if where == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "rounds": rounds,
        "steps": steps,
        "shapes": {},
    }
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        for name in shapes:
            task = progress.add_task(name, total=None)
            tensors = CATALOGUE[name]()
            large = where == "cpu" and sum(map(math.prod, tensors)) > LARGE
            measured = measure(
                tensors,
                [n for n in names if not (large and CANDIDATES[n].unfused)],
                where,
                DTYPES[dtype],
                1 if large else rounds,
                steps,
                lambda task=task: progress.advance(task),
                (False,) if large else (False, True),
            )
            progress.remove_task(task)
            run["shapes"][name] = measured
            show(name, measured)
            reports.write(file, [*before, run])
            plots.speed(run, plot)
    print(f"Appended to {file}; drawn: {plot}.png, .svg")


def measure(
    shapes: Shapes,
    names: list[str],
    device: str,
    dtype: torch.dtype,
    rounds: int,
    steps: int,
    advance: Callable[[], Any] = lambda: None,
    clips: Sequence[bool] = (False, True),
) -> dict[str, Any]:
    """Time every optimizer, with and without clipping or one of both, in turns."""
    elements = sum(math.prod(shape) for shape in shapes)
    rows: dict[tuple[str, bool], Row] = {
        (name, clip): {"optimizer": name, "clip": clip, "ms": [], "host_ms": []}
        for name in names
        for clip in clips
    }
    params = [nn.Parameter(random(s, device, dtype)) for s in shapes]
    for p in params:
        p.grad = random(p.shape, device, dtype)
    copies: list[float] = []
    for _ in range(rounds):
        copies.append(copy_bandwidth(device))
        for (name, clip), row in rows.items():
            if "why" not in row and not (device == "cpu" and row["ms"] and min(row["ms"]) > 1e3 * SLOW):
                try:
                    turn(row, CANDIDATES[name], params, device, CLIP if clip else None, steps)
                except ImportError:
                    row["why"] = f"not installed: {CANDIDATES[name].package}"
                except (
                    RuntimeError,
                    AssertionError,
                    ValueError,
                ) as error:  # RuntimeError: also out of memory
                    row["why"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            gc.collect()
            advance()
    copy = max(copies)
    size = dtype.itemsize
    return {
        "tensors": len(shapes),
        "elements": elements,
        "rounds": rounds,
        "copy_GBps": round(copy / 1e9, 1),
        "rows": [
            summary(row, CANDIDATES[name].bytes_moved(elements, size, clip), copy)
            for (name, clip), row in rows.items()
        ],
    }


def turn(
    row: Row,
    candidate: Candidate,
    params: list[nn.Parameter],
    device: str,
    clip: float | None,
    steps: int,
) -> None:
    """One turn of one optimizer; times are added to its row."""
    if (why := short_of_memory(candidate, params)) is not None:
        row["why"] = why
        return
    optimizer = candidate.make(params, clip)
    outside = clip is not None and candidate.clips is None

    def step() -> None:
        if outside:
            nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()

    for _ in range(2):
        start = time.perf_counter()
        step()
        took = time.perf_counter() - start
    if device == "cuda":
        on_gpu(row, step, steps)
        return
    for _ in range(min(steps, FEW) if took > SLOW else steps):
        start = time.perf_counter()
        step()
        row["ms"].append(1e3 * (time.perf_counter() - start))


def random(shape: Sequence[int], device: str, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of -1 to 1; the same ones again from the millionth on, for they take longer than a step."""
    made = torch.empty(math.prod(shape), device=device, dtype=dtype)
    first = made[:1_000_000].uniform_(-1, 1)
    for rest in made[len(first) :].split(len(first)):
        rest.copy_(first[: len(rest)])
    return made.view(*shape)


def short_of_memory(candidate: Candidate, params: Sequence[nn.Parameter]) -> str | None:
    """Why the state does not fit in a CPU's memory, where the process would be killed."""
    if params[0].device.type != "cpu" or candidate.state is None:
        return None
    from benchmarks.resident import available  # needs psutil, which a machine with a chip may not have

    needed = candidate.state([full_tensor(tuple(p.shape)) for p in params], params[0].itemsize)
    free, _ = available()
    return None if needed < free else f"its state takes {needed / 2**30:.1f} GiB of {free / 2**30:.1f}"


def on_gpu(row: Row, step: Callable[[], None], steps: int) -> None:
    """Time by events, host time to the return of the call, transient memory, launches and what they took."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(steps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        called = time.perf_counter()
        step()
        row["host_ms"].append(1e3 * (time.perf_counter() - called))
        end.record()
        torch.cuda.synchronize()
        row["ms"].append(start.elapsed_time(end))
    row["transient_MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    if "launches" not in row:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        ran = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        row["launches"], row["busy_ms"] = len(ran), sum(e.device_time for e in ran) / 1e3


def copy_bandwidth(device: str) -> float:
    """Bytes per second that a copy reads and writes, the best of five."""
    source = torch.ones(COPY // 4, device=device)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(6):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * COPY / best


def summary(row: Row, moved: float | None, copy: float) -> Row:
    """The row as it is written: medians and quartiles instead of every time."""
    if "why" in row or not row["ms"]:
        return {k: row[k] for k in ("optimizer", "clip", "why") if k in row}
    ms = statistics.median(row["ms"])
    low, _, high = statistics.quantiles(row["ms"], n=4) if len(row["ms"]) > 1 else (ms, ms, ms)
    return {
        "optimizer": row["optimizer"],
        "clip": row["clip"],
        "ms": _digits(ms),
        "quartiles_ms": [_digits(low), _digits(high)],
        "best_ms": _digits(min(row["ms"])),
        "bytes_moved": moved,
        "GBps": _digits(None if moved is None else moved / ms / 1e6),
        "of_copy_bandwidth": _digits(None if moved is None else moved / ms * 1e3 / copy),
        # Not measured on a CPU, where the call returns when the work is done.
        "host_ms": _digits(statistics.median(row["host_ms"]) if row["host_ms"] else None),
        "launches": row.get("launches"),
        "busy_ms": _digits(row.get("busy_ms")),  # of the device, which may wait for the host between launches
        "transient_MiB": _digits(row.get("transient_MiB")),
    }


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def show(name: str, measured: dict[str, Any]) -> None:
    """Print the table of one shape."""
    title = f"{name}: {measured['elements'] / 1e6:.4g}M elements in {measured['tensors']} tensors"
    table = Table(title=f"{title}; copy {measured['copy_GBps']} GB/s", title_justify="left")
    table.add_column("optimizer", no_wrap=True)
    for column in ("clip", "ms", "quartiles", "of AdamW fused", "GB/s", "of copy", "host ms", "launches"):
        table.add_column(column, justify="right", no_wrap=True)
    base = {r["clip"]: r.get("ms") for r in measured["rows"] if r["optimizer"] == plots.BASELINE}
    for row in measured["rows"]:
        clip = "yes" if row["clip"] else ""
        if "why" in row:
            table.add_row(row["optimizer"], clip, row["why"][:60])
            continue
        relative = f"{row['ms'] / base[row['clip']]:.2f}" if base.get(row["clip"]) else ""
        cells = [f"{row['ms']:.4g}", "{:.4g} to {:.4g}".format(*row["quartiles_ms"]), relative]
        cells += ["" if row[k] is None else f"{row[k]:.3g}" for k in ("GBps", "of_copy_bandwidth", "host_ms")]
        table.add_row(row["optimizer"], clip, *cells, str(row["launches"] or ""))
    tables.console(140).print(table)


if __name__ == "__main__":
    typer.run(main)
