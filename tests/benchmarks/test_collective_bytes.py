"""The bytes of the all-reduce that are written down are those of the tables."""

import subprocess
import sys
from pathlib import Path

from patience import patient

from novoscale.kernels.layers import SUMS
from novoscale.memory.models import build

ROOT = Path(__file__).parent.parent.parent


def test_bytes_under_fsdp2_are_those_of_the_columns():
    command = [sys.executable, "benchmarks/collective_bytes.py", "gpt2-1m", "--world", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patient(120))
    assert done.returncode == 0, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if "factored" in line]
    shapes = [p.shape for p in build("gpt2-1m", "meta").parameters()]
    columns = sum(shape[1] for shape in shapes if len(shape) == 2)
    # All columns, three numbers of each parameter and its vote, the verdict, and the sum of all rows.
    numbers = columns + (SUMS + 1) * len(shapes) + 2
    assert f"{8 * numbers:,} (" in row
