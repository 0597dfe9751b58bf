"""Where the Triton kernels' arithmetic would take longer than their memory: compiled and counted, not run.

    make instructions

Compiles the kernels as NovoGrad launches them, for each architecture; counts the instructions of their main
loops (see sass.py); and divides the time at the busiest pipe by the time that the bytes take at the memory's
bandwidth. Below 1 the memory is the limit. Prints the table, and writes it to instructions.json.

An estimate: it knows nothing of latencies, of other loops than the main one, or of launches.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "kernels" / "triton"))
sys.path.insert(0, str(Path(__file__).parent.parent))

import triton_compile

from benchmarks import reports, tables
from novoscale.tools.provenance import provenance


class Pass(NamedTuple):
    """What is counted: the name of a kernel in triton_compile.py, and the bytes it moves for each element."""

    kernel: str
    bytes: float


PASSES = {
    "sums, float32": Pass("chunk sum fp32", 4),
    "sums, bfloat16": Pass("chunk sum bf16", 2),
    "sums of rows and columns, float32": Pass("strips of 256 fp32", 4),
    "sums of rows and columns, bfloat16": Pass("strips of 256 bf16", 2),
    "update float32": Pass("update fp32 fp32 float32", 20),
    "update float32, gradients bfloat16, int8": Pass("update fp32 bf16 int8", 12),
    "update bfloat16, moment bfloat16": Pass("update bf16 bf16 bfloat16 rounded", 10),
    "update bfloat16, int8": Pass("update bf16 bf16 int8 rounded", 8),
    "update bfloat16, int4": Pass("update bf16 bf16 int4 rounded", 7),
    "update bfloat16, int8, rows": Pass("update bf16 bf16 int8 rounded, layers in turn", 8),
    # As preset="adamw": factored, and matrices' rows shorter than a chunk.
    **{
        f'preset="adamw", {weights}{form}': Pass(
            f"update {types} {moment}, layers in turn, factored, term, nesterov", moved
        )
        for weights, types, form, moment, moved in (
            ("float32", "fp32 fp32", "", "float32", 20),
            ("bfloat16", "bf16 bf16", ", moment float32", "float32 rounded", 14),
            ("bfloat16", "bf16 bf16", ", int8", "int8 rounded", 8),
            ("bfloat16", "bf16 bf16", ", int4", "int4 rounded", 7),
        )
    },
}

# How many lanes of a multiprocessor's pipes finish in a clock; some pipes share theirs. From "Throughput of
# Native Arithmetic Instructions" in the CUDA C++ programming guide: 64 for integers, comparisons and
# selections, 16 for conversions and reciprocals, 32 for shuffles, loads and stores. sm_103 as sm_100, but for
# float64: the data sheet of a B300 says 1.3 TFLOPS. What shares a pipe with what is not in the guide: that
# conversions of float64 go where the others do, or where there is little float64 to it, is an assumption.
COMMON = {"issue": 128, "ALU": 64, "IMAD": 64, "LSU": 32}
FAST_FLOAT64 = COMMON | {"XU + F64 conversion": 16}
SLOW_FLOAT64 = COMMON | {"XU": 16, "FP64 + F64 conversion": 2, "FP32 + IMAD": 128}
LANES = {
    "sm_80": FAST_FLOAT64 | {"FP64": 32, "FP32 + IMAD": 64},
    "sm_86": SLOW_FLOAT64,
    "sm_89": SLOW_FLOAT64,
    "sm_90": FAST_FLOAT64 | {"FP64": 64, "FP32 + IMAD": 128},
    "sm_100": FAST_FLOAT64 | {"FP64": 64, "FP32 + IMAD": 128},
    "sm_103": SLOW_FLOAT64,
}


class Chip(NamedTuple):
    """Of NVIDIA's data sheets: multiprocessors, boost clock in GHz, memory bandwidth in GB/s."""

    architecture: str
    multiprocessors: int
    clock: float
    bandwidth: float


CHIPS = {
    "A100": Chip("sm_80", 108, 1.41, 2039),
    "H100": Chip("sm_90", 132, 1.98, 3350),
    "H200": Chip("sm_90", 132, 1.98, 4800),
    "B200": Chip("sm_100", 148, 1.965, 8000),
    "RTX 4090": Chip("sm_89", 128, 2.52, 1008),
    "L4": Chip("sm_89", 58, 2.04, 300),
    "RTX 3090": Chip("sm_86", 82, 1.695, 936),
    "A10": Chip("sm_86", 72, 1.695, 600),
    "B300": Chip("sm_103", 148, 1.92, 8000),
}


def main(
    out: Annotated[Path, typer.Option(help="Folder for instructions.json.")] = Path("runs"),
) -> None:
    """Compile, count, print the table, write it."""
    counts = counted(LANES)
    ratios = {
        name: {chip: round(ratio(counts[name], PASSES[name].bytes, chip), 3) for chip in CHIPS}
        for name in PASSES
    }
    show(ratios)
    result = {
        "provenance": provenance(),
        "lanes": LANES,
        "chips": {name: chip._asdict() for name, chip in CHIPS.items()},
        "bytes": {name: p.bytes for name, p in PASSES.items()},
        "instructions": counts,
        "ratios": ratios,
    }
    file = out / "instructions.json"
    reports.write(file, result)
    print(f"Written to {file}")


def counted(architectures: Iterable[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Of each pass and architecture, the instructions of each pipe for one element."""
    cases = {name: (kernel, constants) for name, kernel, constants, *_ in triton_compile.cases()}
    return {
        name: {a: facts(*cases[launched(p.kernel, a, cases)], a) for a in architectures}
        for name, p in PASSES.items()
    }


def launched(kernel: str, architecture: str, cases: Container[str]) -> str:
    """The name of the kernel that NovoGrad launches on an architecture: there are two for sums of squares."""
    capability = divmod(int(architecture.removeprefix("sm_")), 10)
    in_words = f"{kernel} in words"
    return in_words if in_words in cases and capability not in triton_compile.kernels.MUCH_FLOAT64 else kernel


def facts(kernel: Any, constants: dict[str, Any], architecture: str) -> dict[str, float]:
    """The instructions of each pipe for one element."""
    asm = triton_compile.build(kernel, constants, architecture)
    loop = triton_compile.nvidia(asm, constants)["loop"]
    return {pipe: round(count, 3) for pipe, count in loop.items()}


def ratio(counts: dict[str, dict[str, float]], moved: float, chip: str) -> float:
    """Time at the busiest pipe over time at the memory's bandwidth."""
    architecture, multiprocessors, clock, bandwidth = CHIPS[chip]
    clocks = max(
        sum(counts[architecture].get(pipe, 0) for pipe in pipes.split(" + ")) / lanes
        for pipes, lanes in LANES[architecture].items()
    )
    return clocks / (multiprocessors * clock) * bandwidth / moved


def show(ratios: dict[str, dict[str, float]]) -> None:
    """Print the table."""
    table = Table(title="time at the busiest pipe over time at memory bandwidth", title_justify="left")
    table.add_column("pass (bytes for each element)", no_wrap=True)
    for chip in CHIPS:
        table.add_column(chip, justify="right", no_wrap=True)
    for name, row in ratios.items():
        cells = [f"[bold]{r:.2f}[/bold]" if r > 1 else f"{r:.2f}" for r in row.values()]
        table.add_row(f"{name} ({PASSES[name].bytes:g})", *cells)
    tables.console(160).print(table)


if __name__ == "__main__":
    typer.run(main)
