"""What ``novoscale memory`` and ``novoscale plan`` say: tables, and files."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from novoscale.memory.planning import Plan
from novoscale.memory.shardings import TITLES

GIB, MIB = 2**30, 2**20
NEVER = "never"
PLANNED = "Model states only: activations, buckets of collectives and gathered layers come on top."
RELEASED = (
    " Released: the most gradients that are alive at once; under FSDP2 the largest unit's shards, where each "
    "block of layers is a unit and the rest is one."
)


def write(report: dict[str, Any], folder: Path, command: str) -> dict[str, Any]:
    """Write memory.json with its provenance, and the picture of it; return what was written."""
    from novoscale.memory import plots
    from novoscale.tools.provenance import provenance

    found = {"provenance": provenance(command), **report}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.json").write_text(json.dumps(found, indent=1) + "\n")
    plots.memory(found, folder / "memory")
    return found


def measured(report: dict[str, Any]) -> Table:
    """A row for each optimizer and sharding."""
    device = next((row["device"] for row in report["rows"] if "device" in row), "cpu")
    table = Table(
        title=f"{report['model']}, {report['precision']}{_how(report)}, measured on {device}",
        caption="State: of the storages that are held. Gradients: those that wait for the step, or the most "
        "that are alive at once if they are released. Transient: what the optimizer's step allocates besides "
        "what it leaves, on the rank with most of it. Peak: of all phases, warm-up included. Update: "
        "distance from that of one process, over its length.",
    )
    table.add_column("optimizer")
    table.add_column("sharding")
    columns = ("state\nB/param", "state\nMiB/rank", "gradients\nMiB/rank", "transient\nB/param")
    for column in (*columns, "peak\nMiB/rank", "RSS\nMiB/rank", "update"):
        table.add_column(column, justify="right")
    for row in report["rows"]:
        if "why" in row:
            table.add_row(row["optimizer"], _sharding(row), *[""] * 6, row["why"], style="dim")
            continue
        table.add_row(
            row["optimizer"],
            _sharding(row),
            f"{row['state_bytes_per_parameter']:.3f}",
            f"{row['state_bytes_per_rank'] / MIB:.2f}",
            f"{row['gradient_bytes_per_rank'] / MIB:.2f}",
            "in backward" if row["release"] else f"{row['transient_bytes'] / row['parameters']:.3f}",
            f"{row['peak_bytes_per_rank'] / MIB:.1f}",
            f"{row['rss_bytes_per_rank'] / MIB:.0f}",
            _update(row),
        )
    return table


def _how(report: dict[str, Any]) -> str:
    return ", gradients released in the backward pass" if report.get("release") else ""


def _sharding(row: dict[str, Any]) -> str:
    ranks = f", {row['ranks']} ranks" if row["sharding"] != "none" else ""
    return TITLES[row["sharding"]] + ranks


def _update(row: dict[str, Any]) -> str:
    if row.get("deviation") is None:
        return ""
    if row["same_training"]:
        return f"{row['deviation']:.0e}"
    return f"[red]not the same training: {row['deviation']:.0%} off[/]"


def plan_row(optimizer: str, sharding: str, plan: Plan, smallest: int | None) -> dict[str, Any]:
    """A row of a plan, for JSON; bytes."""
    sums = {"total": plan.total, "on_device": plan.on_device}
    return {"optimizer": optimizer, "sharding": sharding, **asdict(plan), **sums, "smallest_world": smallest}


def answer(report: dict[str, Any]) -> str:
    """A plan in one sentence: on how few devices the model fits, and on how many with AdamW."""
    rows = fewest_devices(report)
    novograd = [row for row in rows if row["optimizer"].startswith("NovoGrad")]
    first = min(novograd or rows, key=_devices)
    what = f"{report['model']} ({_size(report)} parameters, {report['precision']})"
    count = _fits(first)
    devices = f"{'device' if count == '1' else 'devices'} of {report['device_memory_GiB']:g} GiB"
    if count == NEVER:
        says = f"{what} does not fit on {devices} with {_spoken(first)}, however many"
    else:
        says = f"{what} fits on {count} {devices} with {_spoken(first)} {_under(first)}"
    other = next((row for row in rows if row["optimizer"].startswith("torch AdamW")), first)
    if other is first:
        return f"{says}."
    needs = "it does not" if _fits(other) == NEVER else f"on {_fits(other)} {_under(other)}"
    return f"{says}; with {_spoken(other)} {needs}."


def brief_plan(report: dict[str, Any]) -> Table:
    """A row for each optimizer, under the sharding with which it needs the fewest devices."""
    table = Table(caption=f"{PLANNED} All optimizers and shardings, part by part: --all.")
    released, world = report["release"], report["world"]
    where = "the device" if world == 1 else f"each of {world:,}"
    for column in ("optimizer", "sharding", *(["gradients\nreleased"] if released else [])):
        table.add_column(column)
    for column in (
        f"fewest devices\nof {report['device_memory_GiB']:g} GiB",
        f"optimizer state on\n{where} (GiB)",
        f"model states on\n{where} (GiB)",
    ):
        table.add_column(column, justify="right")
    for row in fewest_devices(report):
        sizes = [f"{row[part] / GIB:.2f}" for part in ("state", "on_device")]
        table.add_row(*_names(row, released), _fits(row), *sizes)
    return table


def fewest_devices(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each optimizer the row that fits on the fewest devices; of equals, the one with the fewest bytes."""
    found: dict[str, dict[str, Any]] = {}
    for row in sorted(report["rows"], key=_devices):
        found.setdefault(row["optimizer"], row)
    return [found[name] for name in dict.fromkeys(row["optimizer"] for row in report["rows"])]


def plan(report: dict[str, Any]) -> Table:
    """All rows of a plan, GiB on the rank that holds most."""
    table = Table(
        title=f"{report['model']}: {_size(report)} parameters on {report['world']} "
        f"ranks, {report['precision']}; on the rank that holds most",
        caption=f"{PLANNED} Transient: gradients that DeepSpeed holds for a moment besides. State by rules "
        "that are tested against measurement; novoscale memory measures, and shows which optimizers a "
        "sharding changes." + (RELEASED if report["release"] else ""),
    )
    for column in ("optimizer", "sharding", *(["gradients\nreleased"] if report["release"] else [])):
        table.add_column(column)
    parts = ("parameters", "gradients", "master_weights", "state", "transient", "on_host", "on_device")
    for part in parts:
        table.add_column(f"{part}_(GiB)".replace("_", "\n"), justify="right")
    table.add_column(f"fits {report['device_memory_GiB']:g} GiB\nfrom ranks", justify="right")
    for row in report["rows"]:
        sizes = [f"{row[part] / GIB:.2f}" for part in parts]
        table.add_row(*_names(row, report["release"]), *sizes, _fits(row))
    return table


def _devices(row: dict[str, Any]) -> tuple[float, int]:
    smallest = row["smallest_world"]
    return math.inf if smallest is None else smallest, row["on_device"]


def _size(report: dict[str, Any]) -> str:
    count = report["parameters"]
    return f"{count / 1e9:.4g} billion" if count >= 1e9 else f"{count / 1e6:.4g} million"


def _spoken(row: dict[str, Any]) -> str:
    name, *options = row["optimizer"].split(", ")
    return f"{name} ({', '.join(options)})" if options else name


def _under(row: dict[str, Any]) -> str:
    return "in one process" if row["sharding"] == "none" else f"under {TITLES[row['sharding']]}"


def _names(row: dict[str, Any], release: bool) -> list[str]:
    return [row["optimizer"], TITLES[row["sharding"]], *([_released(row)] if release else [])]


def _fits(row: dict[str, Any]) -> str:
    return NEVER if row["smallest_world"] is None else f"{row['smallest_world']:,}"


def _released(row: dict[str, Any]) -> str:
    return "yes" if row["released"] else f"no: {row['why_not_released']}"
