"""The memory table of the README: GPT-2 124M under each optimizer, in one process, ZeRO-2, ZeRO-3 and FSDP2.

    make memory

Bytes of state from the storages that are held, and what a step takes besides, on 1, 2 and 4 ranks: two steps
of one sample of 32 tokens, which is enough for both. Each row is written to memory.json when it is measured,
and one that is there is not measured again. Writes the picture and the tables of docs/memory.md besides. On
two CPU cores it takes about an hour, and 12 GiB.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import reports, tables
from novoscale.memory import plots
from novoscale.memory.comparison import Row, compare
from novoscale.memory.optimizers import COMPARED
from novoscale.memory.shardings import TITLES
from novoscale.tools.provenance import make_command, provenance

SHARDINGS = [("none", 1), ("zero2", 2), ("zero3", 2), ("fsdp2", 2), ("zero2", 4), ("zero3", 4), ("fsdp2", 4)]
# What people ask first: how much less than AdamW, than 8-bit Adam, than Adafactor.
ASKED = (
    "torch AdamW, fused",
    "bitsandbytes AdamW8bit",
    "torchao AdamW8bit",
    "torch Adafactor",
    "NovoGrad, adamw, int8",
    "NovoGrad, adamw, int4",
)
OURS = "NovoGrad, adamw, int8"
OTHERS = tuple(name for name in reversed(COMPARED) if name not in ASKED)  # NovoGrad's other forms last
ORDER = (*ASKED, *OTHERS)
# A run that is stopped has what is asked first, and then the others on few ranks.
PASSES = ((ASKED, SHARDINGS), (OTHERS, SHARDINGS[:2]), (OTHERS, SHARDINGS[:4]), (OTHERS, SHARDINGS))
PICTURED = [("none", 1), ("zero2", 4), ("zero3", 4), ("fsdp2", 4)]


def main(
    model: Annotated[str, typer.Option(help="As of novoscale memory.")] = "gpt2-124m",
    out: Annotated[Path, typer.Option(help="Folder for memory.json, picture and tables.")] = Path("runs"),
    timeout: Annotated[float, typer.Option(help="Seconds for each row.")] = 1200,
) -> None:
    """Measure what is missing, write data, tables and picture."""
    file = out / "memory.json"
    report = reports.read(file, {"model": model, "rows": []})
    if report["model"] != model:
        raise typer.BadParameter(f"{file} is of {report['model']}: take another --out, or delete it")
    measure(report, file, make_command("memory"), timeout)
    plots.memory({**report, "rows": [row for row in report["rows"] if pictured(row)]}, out / "memory")
    tables.publish(markdown(report["rows"]), out / "memory.md", "memory.json, memory.png, memory.svg")


def measure(report: dict[str, Any], file: Path, command: str, timeout: float) -> None:
    """Add the rows that a report lacks, those that say why not included; write it after each."""
    missing = list(jobs(report["rows"]))
    cells = itertools.chain.from_iterable(
        compare(report["model"], [name], shardings, "float32", timeout) for name, shardings in missing
    )
    # torch runs on one rank what it compiled on another, whose shard has a row more (torchao under FSDP2).
    os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    source = provenance(command)  # of the code that is loaded, whatever becomes of its files meanwhile
    total = sum(len(shardings) for _, shardings in missing)
    for row in track(cells, "measuring", total, disable=not sys.stderr.isatty()):
        others = [other for other in report["rows"] if key(other) != key(row)]
        report["rows"] = sorted([*others, _short(row, source)], key=_place)
        report.update(provenance=source, precision="float32")
        reports.write(file, report)


def jobs(rows: list[Row]) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """What a report lacks, in the order in which it is measured; what says why not is tried again last."""
    known = {key(row) for row in rows}
    for names, shardings in PASSES:
        for name in names:
            yield name, [sharding for sharding in shardings if (name, *sharding) not in known]
            known.update((name, *sharding) for sharding in shardings)
    for name in ORDER:
        yield name, [key(row)[1:] for row in rows if row["optimizer"] == name and "why" in row]


def key(row: Row) -> tuple[str, str, int]:
    """What tells one row from another."""
    return row["optimizer"], row["sharding"], row["ranks"]


def pictured(row: Row) -> bool:
    """Whether the README shows it."""
    return row["optimizer"] in ASKED and key(row)[1:] in PICTURED


def _place(row: Row) -> tuple[int, int]:
    name, *sharding = key(row)
    return ORDER.index(name), SHARDINGS.index(tuple(sharding))


def _short(row: Row, source: dict[str, Any]) -> Row:
    """A row with the state of the rank that holds most of it, and when and from which code it was made."""
    ranks = row.get("ranks_measured", [])
    held = max((rank["bytes"]["state"] for rank in ranks), key=lambda state: state["total"], default={})
    kept = {name: value for name, value in row.items() if name != "ranks_measured"}
    made = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": source["commit"]}
    return {**kept, **({"state_by_key": held["by_key"]} if held else {}), **made}


def markdown(rows: list[Row]) -> str:
    """The tables of docs/memory.md: what is asked first; every optimizer; why some rows are none."""
    table = {key(row): row for row in rows}
    asked = [[name, *(_times(table, name, sharding) for sharding in PICTURED)] for name in ASKED]
    there = [name for name in ORDER if any(row["optimizer"] == name for row in rows)]
    every = [
        [
            name,
            *(_state(table.get((name, *sharding))) for sharding in SHARDINGS),
            _transient(table.get((name, *SHARDINGS[0]))),
        ]
        for name in there
    ]
    absent = [name for name in ORDER if name not in there]
    notes = [*_reasons(rows), *([f"- Not measured: {'; '.join(absent)}."] if absent else [])]
    parts = (
        tables.markdown([f"times {OURS} (bytes)", *map(_title, PICTURED)], asked),
        tables.markdown(["optimizer", *map(_title, SHARDINGS), "transient"], every),
        "\n".join(notes) + "\n",
    )
    return "\n".join(parts)


def _reasons(rows: list[Row]) -> Iterator[str]:
    where: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "why" in row:
            where.setdefault((row["optimizer"], row["why"]), []).append(_title(key(row)[1:]))
    for (name, why), titles in where.items():
        yield f"- {name} under {' and '.join(titles)}: `{why}`"


def _title(sharding: tuple[str, int]) -> str:
    name, ranks = sharding
    return TITLES[name] + (f", {ranks} ranks" if ranks > 1 else "")


def _times(table: dict[tuple[str, str, int], Row], name: str, sharding: tuple[str, int]) -> str:
    row, ours = table.get((name, *sharding)), table.get((OURS, *sharding))
    if row is None or ours is None or "why" in row or "why" in ours:
        return _state(row)
    times = row["state_bytes_per_parameter"] / ours["state_bytes_per_parameter"]
    return f"{_number(times)} ({_state(row)})"


def _number(value: float) -> str:
    return f"{value:.1f}" if value >= 0.1 else f"{value:.2f}"


def _state(row: Row | None) -> str:
    if row is None:
        return "not measured"
    if "why" in row:
        return "stops"
    held = f"{row['state_bytes_per_parameter']:.2f}"
    return held + ("" if row.get("same_training") is not False else f", {row['deviation']:.0%} off")


def _transient(row: Row | None) -> str:
    return "" if row is None or "why" in row else f"{row['transient_bytes'] / row['parameters']:.2f}"


if __name__ == "__main__":
    typer.run(main)
