"""What Triton's compiler makes of the kernels: registers, widths, and instructions of the main loops."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "gfx942"]


@pytest.fixture(scope="module")
def compiled():
    """What triton_compile.py says of each kernel; in a process of its own, without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "triton_compile.py"
    run = subprocess.run(
        [sys.executable, str(script), *ARCHITECTURES],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.timeout(3000)  # two minutes of compiling, on a machine that has nothing else to do
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_code(compiled, architecture, record_property):
    mine = [kernel for kernel in compiled if kernel["architecture"] == architecture]
    everywhere = {k["name"] for k in compiled if "in words" not in k["name"] and not k["rare"]}
    assert {kernel["name"] for kernel in mine} >= everywhere
    for kernel in mine:
        print(json.dumps(kernel))
        record_property(kernel["name"], kernel["registers"])
        of_layers = kernel["name"].startswith("layers:")  # float64, of few elements
        divided, in_words = "factored" in kernel["name"], "in words" in kernel["name"]
        whole = divided and "bf16 bf16 int" in kernel["name"]
        # In whole tiles, with some spills in one kernel, an H100 is 9 % faster than in halves.
        assert kernel["spilled"] <= (10 if whole else 0)
        # 36 % of the threads that may run, or where each element is divided 30 %. 25 % where it is added to
        # two sums in words of float32, or divided in whole tiles. Less where a launch is of few chunks.
        limit = 128 if whole or in_words else 90 if divided else 80
        limit = 168 if of_layers else 112 if kernel["rare"] else limit
        assert kernel["registers"] <= limit
        assert kernel["float32 fma"] == 0 or of_layers  # with which divisions in float64 begin
        assert (kernel["written fma"] > 0) == in_words or of_layers
        assert kernel["other divisions"] == 0
        assert kernel["128-bit loads"] >= kernel["tensors"]
        assert kernel["128-bit stores"] >= kernel["stored"]


# Of the main loop, for each element on sm_90: all instructions, and those of the pipe for integers,
# comparisons and selections, which is the busiest. A fiftieth more than there were: to be lowered with them.
MOST = {
    "update fp32 fp32 float32": (11.5, 2),
    "update fp32 bf16 bfloat16": (31, 14),
    "update bf16 bf16 bfloat16": (38, 21),
    "update bf16 bf16 bfloat16 rounded": (36.5, 18.5),
    "update fp16 fp16 float32": (14.5, 2),
    "update bf16 bf16 None": (16, 8.5),
    "update bf16 bf16 None rounded": (24, 12.5),
    "update fp32 fp32 int8": (46.5, 18.5),
    "update fp32 bf16 int8": (48.5, 19),
    "update bf16 bf16 int8 rounded": (49.5, 22.5),
    "update fp32 fp32 int4": (48.5, 20.5),
    "update bf16 bf16 int4 rounded": (52, 24.5),
    "update fp32 fp32 float32, layers of 8s": (16.5, 3),
    "update bf16 bf16 int8 rounded, layers of 8s": (56.5, 26.5),
    "update bf16 bf16 int4 rounded, layers of 8s": (59, 29),
    "update fp32 fp32 float32, edges": (11.5, 1),
    "update bf16 bf16 bfloat16 rounded, edges": (36, 18.5),
    "update bf16 bf16 int8 rounded, edges": (52.5, 26),
    "update bf16 bf16 int8 rounded, nesterov": (52, 22.5),
    "update fp32 fp32 float32, factored, change": (28, 5.5),
    "update fp32 bf16 bfloat16, factored, change, nesterov": (50, 18.5),
    "update bf16 bf16 int8 rounded, layers in turn": (49, 22.5),
    "update bf16 bf16 bfloat16 rounded, factored, term, nesterov": (58.5, 24),
    "update fp32 fp32 int8, factored, term, nesterov": (71.5, 26.5),
    "update bf16 bf16 int8 rounded, factored, change, nesterov": (82.5, 33),
    "update bf16 bf16 int4 rounded, factored, term": (82, 34.5),
    "update bf16 bf16 int8 rounded, layers of 8s, factored, change, nesterov": (94, 41),
    "update fp32 fp32 float32, layers in turn, factored, term, nesterov": (28.5, 4),
    "update bf16 bf16 float32 rounded, layers in turn, factored, term, nesterov": (48.5, 17.5),
    "update bf16 bf16 int8 rounded, layers in turn, factored, term, nesterov": (79.5, 33),
    "update bf16 bf16 int4 rounded, layers in turn, factored, term, nesterov": (81.5, 35),
    "chunk sum fp32": (4, 1),
    "rows of 1024 sum fp32": (7, 4.5),
    "chunk sum bf16": (5, 1.5),
    "rows of 64 sum bf16": (7.5, 4),
    "chunk max bf16": (5, 3.5),
    "rows of 1024 max bf16": (6.5, 5),
    "chunk sum fp32 in words": (28, 3.5),
    "rows of 1024 sum fp32 in words": (30, 5.5),
    "chunk sum bf16 in words": (29, 4.5),
    "rows of 64 sum bf16 in words": (32, 7.5),
    "strips of 256 fp32": (17.5, 5),
    "strips of 256 bf16": (13, 3.5),
    "strips of 16 bf16": (11.5, 3.5),
    "strips of 256 fp32 in words": (88.5, 7.5),
    "strips of 256 bf16 in words": (67.5, 7.5),
    "strips of 16 bf16 in words": (55, 8),
}


@pytest.mark.timeout(3000)
def test_instructions_do_not_grow(compiled):
    loops = {k["name"]: k["loop"] for k in compiled if k["architecture"] == "sm_90" and k["loop"]}
    assert loops.keys() == MOST.keys()
    found = {name: (loop["issue"], loop["ALU"]) for name, loop in loops.items()}
    assert {n: f for n, f in found.items() if f[0] > MOST[n][0] or f[1] > MOST[n][1]} == {}
