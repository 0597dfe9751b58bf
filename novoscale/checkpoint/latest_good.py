"""``novoscale latest-good``: the last complete checkpoint of a folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from novoscale.checkpoint.integrity import LATEST, Checkpoint, check, checkpoints


def latest_good(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder that a training saves its checkpoints into.")
    ],
    every: Annotated[bool, typer.Option("--all", help="Check older checkpoints too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Print the name of the last complete checkpoint in DIR; say of others what is missing or broken.

    For DeepSpeed's checkpoints, torch.distributed.checkpoint's folders and files of torch.save. Every byte is
    read and compared with its checksum, nothing is loaded. Begins with the checkpoint that was written last.

    Exit code 0: there is one. 1: there is none. 2: DIR is no folder.
    """
    console = Console(stderr=True, emoji=False, soft_wrap=True)
    if not folder.is_dir():
        console.print(f"{folder}: there is no such folder", style="red", markup=False)
        raise typer.Exit(2)
    checked: list[Checkpoint] = []
    for path in checkpoints(folder):
        with console.status(f"reading {path.name} ..."):
            checked.append(check(path))
        if checked[-1].complete and not every:
            break
    good = next((c.name for c in checked if c.complete), None)
    if as_json:
        found = {c.name: list(c.problems) for c in checked}
        print(json.dumps({"latest_good": good, "problems": found}, indent=1))
    else:
        _show(console, folder, checked, good)
    raise typer.Exit(0 if good is not None else 1)


def _show(console: Console, folder: Path, checked: list[Checkpoint], good: str | None) -> None:
    for checkpoint in checked:
        for problem in checkpoint.problems:
            console.print(f"{checkpoint.name}: {problem}", style="red", markup=False, highlight=False)
    if good is None:
        why = "no checkpoint is complete" if checked else "there is no checkpoint"
        console.print(f"{folder}: {why}", style="red", markup=False, highlight=False)
        return
    latest = folder / LATEST
    named = latest.read_text().strip() if latest.is_file() else good
    if named != good:
        advice = f"{latest} names {named}. Load {good} by its name: load_checkpoint(..., tag={good!r})"
        console.print(advice, markup=False, highlight=False)
    sys.stdout.write(f"{good}\n")
