"""How likely another sharding gives another float32 number: float64 sums of squares, added in other groups.

    python benchmarks/regrouped.py

A layer's sum of squares is the sum over its shards, and its second moment is rounded to float32. Prints how
often the sum of a layer in pieces of random lengths is another float64 number than that of the unsharded
layer, and the chance that a rounding border of float32 lies between the two: their distance over that of two
float32 numbers, on average. This chance is too small to be met: "seen" is how often it happened here.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from novoscale.kernels.reference.elements import TILE

ELEMENTS = (1_000, 100_000, 1_000_000, 8_000_000)
PIECES = (2, 8, 64)


def main(budget: Annotated[int, typer.Option(help="Elements of all trials of a size.")] = 1 << 27) -> None:
    """Print the table."""
    torch.manual_seed(0)
    table = Table("elements", "pieces", "trials", "sums differ", "chance that float32 does", "seen")
    for elements in ELEMENTS:
        for pieces in PIECES:
            trials = min(1000, max(10, budget // elements))
            found = [trial(elements, pieces) for _ in range(trials)]
            differ = sum(chance > 0 for chance, _ in found) / trials
            mean, seen = sum(chance for chance, _ in found) / trials, sum(seen for _, seen in found)
            table.add_row(
                f"{elements:,}", str(pieces), str(trials), f"{differ:.0%}", f"{mean:.1e}", str(seen)
            )
    Console().print(table)


def trial(elements: int, pieces: int) -> tuple[float, bool]:
    """The chance for one gradient in pieces of random lengths, and whether it came to pass."""
    grad = torch.randn(elements) * 10 ** torch.empty(()).uniform_(-3, 0)
    borders = torch.randperm(elements - 1)[: pieces - 1].add(1).sort().values
    unsharded, regrouped = added([grad]), added(grad.tensor_split(borders))
    spacing = math.ldexp(1.0, math.frexp(unsharded.item())[1] - 24)
    return abs((unsharded - regrouped).item()) / spacing, bool(unsharded.float() != regrouped.float())


def added(pieces: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Sums of squares as the reference makes them: tile by tile, and piece by piece."""
    total = torch.zeros((), dtype=torch.float64)
    for piece in pieces:
        own = torch.zeros((), dtype=torch.float64)
        for tile in piece.split(TILE):
            own += tile.double().square().sum()
        total += own
    return total


if __name__ == "__main__":
    typer.run(main)
