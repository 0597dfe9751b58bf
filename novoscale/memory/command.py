"""The commands ``novoscale memory`` and ``novoscale plan``."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import track

from novoscale.memory import models, releasing, report
from novoscale.memory.comparison import compare
from novoscale.memory.models import MemoryToolError
from novoscale.memory.optimizers import CANDIDATES, COMPARED, why_not_sharded
from novoscale.memory.planning import plan as planned
from novoscale.memory.planning import smallest_world
from novoscale.memory.rules import Rule
from novoscale.memory.shardings import PRECISIONS, SHARDINGS

# The state of AdamW is the same with foreach.
PLANNED = [n for n in COMPARED if CANDIDATES[n].state is not None and n != "torch AdamW, foreach"]
BRIEFLY = ["NovoGrad, adamw, int8", "NovoGrad, adamw, int4", "torch AdamW, fused"]
Names = Annotated[
    list[str] | None,
    typer.Option("--optimizer", help="Of the catalogue, as adamw-fused; repeat. Default: one of each kind."),
]
Precision = Annotated[str, typer.Option(help=f"One of: {', '.join(PRECISIONS)}.")]
Release = Annotated[
    bool,
    typer.Option(
        "--release",
        help="Step and free each gradient in the backward pass: NovoGrad, in one process or under FSDP2.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


def memory(
    model: Annotated[
        str,
        typer.Argument(help="builtin, a shipped config, a model type of transformers, or a config.json."),
    ] = "gpt2-1m",
    optimizer: Names = None,
    sharding: Annotated[
        list[str] | None,
        typer.Option(
            "--sharding", "--cut", help=f"One of: {', '.join(SHARDINGS)}; repeat. Default: none, zero2."
        ),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to start on this machine.")] = 2,
    precision: Precision = "float32",
    release: Release = False,
    out: Annotated[Path, typer.Option(help="Folder for memory.json, memory.png, memory.svg.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Measure what optimizers take: two steps of MODEL with each, under each sharding, on this machine.

    Exit code 0: each cell was measured or says why not. 2: MODEL or a name is not known.
    """
    console = Console(stderr=True, emoji=False)
    try:
        optimizers = _optimizers(optimizer) or list(COMPARED)
        shardings = [
            (_known("sharding", name, SHARDINGS), 1 if name == "none" else ranks)
            for name in sharding or ("none", "zero2")
        ]
        _known("precision", precision, PRECISIONS)
        _can_draw()
        models.build(model, "meta")
    except MemoryToolError as error:
        _refuse(console, error)
    _warn(console, ranks)
    cells = compare(model, optimizers, shardings, precision, release=release)
    total = len(optimizers) * len(shardings)
    shown = console.is_terminal
    rows = list(track(cells, "measuring", total, console=console, disable=not shown, transient=True))
    found = report.write(
        {"model": model, "precision": precision, "release": release, "rows": rows},
        out,
        _command("memory", sys.argv),
    )
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _output().print(report.measured(found))
        console.print(f"Written: memory.json, memory.png, memory.svg in {out}", highlight=False)


def plan(
    model: Annotated[str, typer.Argument(help="As of novoscale memory; of any size.")],
    world: Annotated[int, typer.Option(min=1, help="Ranks.")] = 8,
    device_memory: Annotated[float, typer.Option(min=0, help="GiB of each device.")] = 80,
    optimizer: Names = None,
    sharding: Annotated[
        list[str] | None,
        typer.Option(
            "--sharding",
            "--cut",
            help=f"One of: {', '.join(SHARDINGS)}; repeat. Default: zero2, zero3, fsdp2.",
        ),
    ] = None,
    precision: Precision = "bf16-mixed",
    release: Release = False,
    show_all: Annotated[
        bool, typer.Option("--all", help="Every optimizer and sharding, part by part.")
    ] = False,
    as_json: Json = False,
) -> None:
    """On how few devices a MODEL fits that does not fit here: model states, without activations.

    One row for NovoGrad, in two formats, and one for AdamW, under the sharding that is best for each.

    Exit code 0: planned. 2: MODEL or a name is not known, or there is no rule for an optimizer's state.
    """
    console = Console(stderr=True, emoji=False)
    try:
        names = _optimizers(optimizer) or (PLANNED if show_all or as_json else BRIEFLY)
        shardings = [_known("sharding", name, SHARDINGS) for name in sharding or ("zero2", "zero3", "fsdp2")]
        _known("precision", precision, PRECISIONS)
        rules = {name: CANDIDATES[name].state for name in names}
        for name in (name for name, rule in rules.items() if rule is None):
            raise MemoryToolError(f"{name}: no rule gives its state before it runs: use novoscale memory")
        for why in (why_not_sharded(name, over) for over in shardings for name in names):
            if why is not None:
                raise MemoryToolError(why)
        built = models.build(model, "meta")
    except MemoryToolError as error:
        _refuse(console, error)

    def row(name: str, rule: Rule, over: str) -> dict[str, Any]:
        why_not = releasing.why_not(name, over) if release else None
        released = release and why_not is None
        how = (released, CANDIDATES[name].orthogonal)
        smallest = smallest_world(built, rule, over, precision, device_memory * report.GIB, *how)
        found = report.plan_row(name, over, planned(built, rule, over, world, precision, *how), smallest)
        return {**found, "released": released, "why_not_released": why_not} if release else found

    rows = [row(name, rule, over) for over in shardings for name, rule in rules.items() if rule is not None]
    found = {
        "model": model,
        "parameters": sum(p.numel() for p in built.parameters()),
        "world": world,
        "precision": precision,
        "device_memory_GiB": device_memory,
        "release": release,
        "rows": rows,
    }
    if as_json:
        print(json.dumps(found, indent=1))
    elif show_all:
        _output().print(report.plan(found))
    else:
        _output().print(report.answer(found), highlight=False, markup=False, soft_wrap=True)
        _output().print(report.brief_plan(found))


def _optimizers(names: Sequence[str] | None) -> list[str]:
    """Names of the catalogue; "adamw-fused" and "torch AdamW, fused" are the same."""
    short = {_slug(name).removeprefix("torch-"): name for name in CANDIDATES}
    return [short[_known("optimizer", _slug(n).removeprefix("torch-"), short, shown=n)] for n in names or ()]


def _slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def _known(kind: str, name: str, known: Iterable[str], shown: str | None = None) -> str:
    if name not in known:
        raise MemoryToolError(f"no {kind} {shown or name!r}; there are: {', '.join(known)}")
    return name


def _can_draw() -> None:
    for package in ("matplotlib", "psutil"):
        if importlib.util.find_spec(package) is None:
            raise MemoryToolError(f"novoscale memory needs {package}: pip install 'novoscale[memory]'")


def _warn(console: Console, ranks: int) -> None:
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    say: Callable[[str], None] = lambda text: console.print(text, style="yellow", highlight=False)  # noqa: E731
    if gpus < ranks:
        have = "there is no GPU" if gpus == 0 else f"there are fewer GPUs ({gpus}) than ranks ({ranks})"
        say(f"{have}: measured on CPU ranks, in the memory of the machine (RSS)")
        if ranks > cores:
            say(f"{ranks} ranks on {cores} cores: bytes are not changed by that, but it takes long")


def _refuse(console: Console, error: Exception) -> NoReturn:
    console.print(str(error), style="red", markup=False, highlight=False)
    raise typer.Exit(2) from None


def _output() -> Console:
    return Console(emoji=False) if sys.stdout.isatty() else Console(emoji=False, width=140)


def _command(name: str, argv: Sequence[str]) -> str:
    return " ".join(["novoscale", *(argv[1:] if len(argv) > 1 and argv[1] == name else [name])])
