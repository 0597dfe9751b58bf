"""Ranks killed at random moments, many times: what each training ends in, and what is lost.

    make faults                      # 25 kills of each kind
    make faults ARGS="--kills 100"

A training on two CPU ranks saves every other step. One rank, drawn at random, gets SIGKILL at a random
moment of a random step or of a random save. Then the folder is looked at as a user would: ``novoscale
latest-good`` names a checkpoint, and a new training goes on from it to the end. Counted: whether the run
ended in an error within a minute, whether every checkpoint that had been saved before is still complete,
whether the training that went on ends with the bits of one that was never killed, and how often DeepSpeed's
``latest`` (or the newest folder) named an incomplete checkpoint. Writes the data and the table of
docs/reliability.md.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "integrations"))
os.environ["DS_ACCELERATOR"] = "cpu"  # also where there is a GPU
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:3], os.environ.get("PYTHONPATH", "")])

import fault_ranks
import torch
from zero_ranks import config

from benchmarks import reports, tables
from novoscale.checkpoint.integrity import check, checkpoints
from novoscale.tools import deepspeed_operation as operation
from novoscale.tools.local_ranks import RankError, run_ranks
from novoscale.tools.provenance import provenance

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
TABLE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- counts: made by make faults -->", "<!-- end of counts -->"
RANKS = 2
FORMATS = ("float32", "int8", "int4")


def zero(stage: int, momentum_dtype: str, **section: Any) -> dict[str, Any]:
    """A DeepSpeed config."""
    made = config(stage, RANKS, **section)
    made["optimizer"]["params"] = {"lr": 0.05, "weight_decay": 0.1, "momentum_dtype": momentum_dtype}
    return made


TRAININGS = {
    "ZeRO stage 1": lambda form: zero(1, form),
    "ZeRO stage 2, offload": lambda form: zero(2, form, offload_optimizer={"device": "cpu"}),
    "ZeRO stage 3": lambda form: zero(3, form),
    "FSDP2, torch.distributed.checkpoint": lambda form: {
        "fsdp2": {"lr": 0.05, "weight_decay": 0.1, "momentum_dtype": form}
    },
}
PHASES = {"step": "in a step", "save": "while it saves"}


def main(
    kills: Annotated[int, typer.Option(help="Of each kind.")] = 25,
    seed: Annotated[int, typer.Option(help="Of ranks, steps and moments.")] = 0,
    write: Annotated[bool, typer.Option(help="Write the data and the table.")] = True,
) -> None:
    """Kill, count, write."""
    os.environ.setdefault(operation.FOLDER, str(operation.own_folder()))
    operation.build()
    console = Console(stderr=True)
    cases = [(name, phase) for name in TRAININGS for phase in PHASES]
    found: dict[str, list[dict[str, Any]]] = {f"{name}, {PHASES[phase]}": [] for name, phase in cases}
    full_states: dict[tuple[str, str], Any] = {}
    for nth in track(range(kills * len(cases)), "killing", console=console):
        name, phase = cases[nth % len(cases)]
        form = FORMATS[(nth // len(cases)) % len(FORMATS)]
        if (name, form) not in full_states:
            full_states[name, form] = uninterrupted(TRAININGS[name](form))
        draw = random.Random(f"{seed} {nth}")
        result = killed(TRAININGS[name](form), phase, draw, *full_states[name, form])
        found[f"{name}, {PHASES[phase]}"].append({"momentum_dtype": form, **result})
    data = {"provenance": provenance(f'make faults ARGS="--kills {kills} --seed {seed}"'), "kills": found}
    if write:
        reports.write(RESULTS, data)
        tables.put(TABLE, BEGIN, END, table(found))
    print(table(found))
    if any(bad(row) for rows in found.values() for row in rows):
        raise typer.Exit(1)


def uninterrupted(case: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    """What each rank holds at the end, and the longest step and save."""
    with tempfile.TemporaryDirectory() as folder:
        results = run_ranks(fault_ranks.training, RANKS, case, folder, quiet=True)
    took = results[0][1]
    return [pieces for pieces, _ in results], {phase: max(seconds[1:]) for phase, seconds in took.items()}


def killed(
    case: dict[str, Any], phase: str, draw: random.Random, expected: Any, longest: dict[str, float]
) -> dict[str, Any]:
    """One kill, and the training that goes on after it."""
    numbers = range(fault_ranks.STEPS)
    number = draw.choice(
        numbers if phase == "step" else [n + 1 for n in numbers if (n + 1) % fault_ranks.EVERY == 0]
    )
    rank, delay = draw.randrange(RANKS), draw.uniform(0, longest[phase])
    with tempfile.TemporaryDirectory() as name:
        folder, start = Path(name), time.monotonic()
        try:
            run_ranks(
                fault_ranks.training,
                RANKS,
                case,
                name,
                None,
                (rank, phase, number, delay),
                timeout=60,
                quiet=True,
            )
            error = "none"
        except RankError as failure:
            error = failure.brief().splitlines()[0]
        seconds = time.monotonic() - start
        present = {c.name: c for c in map(check, checkpoints(folder))}
        good = next((c.name for c in present.values() if c.complete), None)
        latest = folder / "latest"
        named = latest.read_text().strip() if latest.is_file() else None
        if "fsdp2" in case:  # no file names one
            named = next(iter(present), None)
        saved = _saved(folder)
        resumed = run_ranks(fault_ranks.training, RANKS, case, name, good, quiet=True)
    return {
        "rank": rank,
        "at": f"{phase} {number}",
        "delay": round(delay, 4),
        "error": error,
        "error_after_s": round(seconds, 2),
        "saved_before": sorted(saved),
        "lost": sorted(n for n in saved if n not in present or not present[n].complete),
        "broken": {c.name: list(c.problems) for c in present.values() if not c.complete},
        "latest_good": good,
        "named_is_whole": named is None or (named in present and present[named].complete),
        "same_bits": _same([pieces for pieces, _ in resumed], expected),
    }


def _saved(folder: Path) -> set[str]:
    """The checkpoints that saving had returned from, on both ranks."""
    done = []
    for rank in range(RANKS):
        log = folder / f"log{rank}"
        lines = log.read_text().splitlines() if log.is_file() else []
        done.append(
            {f"step{line.split()[1]}" for line in lines if line.startswith("save ") and "done" in line}
        )
    return set.intersection(*done)


def _same(ranks: Any, others: Any) -> bool:
    pairs = ((a, b) for x, y in zip(ranks, others, strict=True) for a, b in zip(x, y, strict=True))
    return all(a[:2] == b[:2] and torch.equal(a[2], b[2]) and torch.equal(a[3], b[3]) for a, b in pairs)


def bad(row: dict[str, Any]) -> bool:
    """Whether a kill ended otherwise than it should."""
    return bool(row["error"] == "none" or row["error_after_s"] > 60 or row["lost"] or not row["same_bits"])


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """In Markdown."""
    columns = (
        "A rank is killed",
        "kills",
        "one error within a minute",
        "slowest, from start to error",
        "a saved checkpoint lost",
        "a broken checkpoint left",
        "`latest` or the newest names it",
        "ends with the same bits",
    )
    lines = []
    for name, rows in found.items():
        if rows:
            ended = sum(row["error"] != "none" and row["error_after_s"] <= 60 for row in rows)
            counts = (
                len(rows),
                ended,
                f"{max(row['error_after_s'] for row in rows):.1f} s",
                sum(bool(row["lost"]) for row in rows),
                sum(bool(row["broken"]) for row in rows),
                sum(not row["named_is_whole"] for row in rows),
                sum(row["same_bits"] for row in rows),
            )
            lines.append([name, *map(str, counts)])
    return tables.markdown(columns, lines)


if __name__ == "__main__":
    typer.run(main)
