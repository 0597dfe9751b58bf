"""The command ``novoscale doctor``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from novoscale.doctor import ConfigError, Diagnosis, diagnose
from novoscale.doctor.memory import Memory
from novoscale.doctor.rewriting import rewrite
from novoscale.memory.models import MemoryToolError
from novoscale.memory.report import GIB
from novoscale.memory.shardings import TITLES

COLOURS = {"wrong": "red", "warning": "yellow", "note": "cyan"}


def doctor(
    config: Annotated[Path, typer.Argument(help="DeepSpeed JSON or Accelerate YAML.")],
    script: Annotated[
        Path | None, typer.Argument(help="The training script: its text is read, it is not run.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Show the memory of each rank for this model, as of novoscale plan.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks. Default: those of the YAML.")] = None,
    write: Annotated[
        Path | None, typer.Option(help="File to be made: CONFIG for NovoGrad, the rest of it kept.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Say what CONFIG will really do: which optimizer runs, what is refused, what is ignored. Trains nothing.

    Exit code 0: nothing is wrong. 1: something is. 2: a file cannot be read or written.
    """
    console = Console(stderr=True, emoji=False)
    try:
        found = diagnose(config, script, ranks=ranks, model=model)
        made = rewrite(found.config, write) if write is not None else None
        for path, text in made.files.items() if made else ():
            path.write_text(text, encoding="utf-8")
    except (ConfigError, MemoryToolError, OSError) as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    if as_json:
        print(found.to_json())
    else:
        _show(found)
    for path in made.files if made else ():
        console.print(f"Written: {path}", highlight=False, soft_wrap=True)
    for sentence in made.said if made else ():
        console.print(f"  {sentence}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(0 if found.passed else 1)


def _show(found: Diagnosis) -> None:
    console = (
        Console(emoji=False, highlight=False, soft_wrap=True)
        if sys.stdout.isatty()
        else Console(emoji=False, highlight=False, soft_wrap=True, width=110)
    )
    runs = found.runs
    if runs.optimizer is None:
        console.print(f"No optimizer is sure to run: {runs.because}.", markup=False)
    else:
        console.print(f"{runs.optimizer} will run: {runs.because}.", markup=False)
    for finding in found.findings:
        console.print(f"[{COLOURS[finding.severity]}]{finding.severity}[/]: ", end="")
        console.print(str(finding), markup=False)
    if found.section is not None and not found.case.names_novograd:
        console.print("NovoGrad instead, in the DeepSpeed JSON (--write FILE makes it):")
        console.print(f'  "optimizer": {json.dumps(found.section)}', markup=False)
    if found.memory is not None:
        console.print(_memory(found.memory), markup=False)
    elif found.no_memory is not None:
        console.print(f"Memory is not planned: {found.no_memory}.", markup=False)


def _memory(m: Memory) -> str:
    """Two lines."""
    before, after = m.before_plan, m.novograd_plan
    name = m.before.rpartition(".")[2]
    where = f"{m.model}, {TITLES[m.sharding]}, {m.ranks} ranks, {m.precision}"
    host = f", of which {before.on_host / GIB:.2f} and {after.on_host / GIB:.2f} in the host's memory"
    total = (before.total + before.transient) / GIB, (after.total + after.transient) / GIB
    return (
        f"Memory of each rank ({where}): {total[0]:.2f} GiB with {name}, {total[1]:.2f} GiB with NovoGrad"
        f"{host if before.on_host else ''}; without activations.\n"
        f"  Of it state of the optimizer: {before.state / GIB:.2f} GiB and {after.state / GIB:.2f} GiB."
    )
