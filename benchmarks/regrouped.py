"""How likely another cut gives another float32: sums of squares in float64, added in other groups.

    python benchmarks/regrouped.py

A layer's sum of squares is that of its pieces' sums, and its second moment is rounded to float32. Prints how
often the sum of a layer in pieces of random lengths is another float64 than that of the whole, and the chance
that one of float32's roundings lies between the two: their distance over that of two float32, on average. The
chance itself is too small to be met: "seen" is how often it happened here.
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

from novoscale.kernels.reference import TILE

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
    """The chance for one gradient and one cut of it, and whether it came to pass."""
    grad = torch.randn(elements) * 10 ** torch.empty(()).uniform_(-3, 0)
    cuts = torch.randperm(elements - 1)[: pieces - 1].add(1).sort().values
    whole, regrouped = added([grad]), added(grad.tensor_split(cuts))
    spacing = math.ldexp(1.0, math.frexp(whole.item())[1] - 24)
    return abs((whole - regrouped).item()) / spacing, bool(whole.float() != regrouped.float())


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
