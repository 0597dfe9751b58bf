"""Compiles the Triton kernels for GPUs that need not be here; a line of JSON on each kernel.

    python tests/kernels/triton_compile.py sm_90 gfx942

Not under TRITON_INTERPRET, which leaves nothing to compile. ``tensors`` and ``stored`` are how many tensors
the kernel reads and writes by 128 bits at least once where they are aligned.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from novoscale.blocks import BLOCK
from novoscale.kernels import triton as kernels
from novoscale.kernels import triton_factored as factored
from novoscale.kernels import triton_passes as passes
from novoscale.momentum import FORMATS

TYPES = {
    "table": "*i64",
    "run_of": "*i32",
    "sources": "*i64",
    "gradients": "*i64",
    "partials": "*fp64",
    "statistic": "*fp64",
    "each": "*fp32",
    "options": "*fp32",
    "active": "*i1",
    "key": "*i32",
    "row_root": "*fp32",
    "column_root": "*fp32",
    "cut_blocks": "*i32",
    "cut_count": "i32",
}
FLOAT32, BFLOAT16, FLOAT16 = tl.float32, tl.bfloat16, tl.float16
UPDATES = [  # param, grad, exp_avg, rounds the weights, decay inside, decay outside, group; further options
    (FLOAT32, FLOAT32, "float32", False, True, False, 0),
    (FLOAT32, BFLOAT16, "bfloat16", False, False, True, 0),
    (BFLOAT16, BFLOAT16, "bfloat16", False, True, False, 0),
    (BFLOAT16, BFLOAT16, "bfloat16", True, True, False, 0),
    (FLOAT16, FLOAT16, "float32", False, False, True, 0),
    (BFLOAT16, BFLOAT16, None, False, False, False, 0),
    (BFLOAT16, BFLOAT16, None, True, False, False, 0),
    (FLOAT32, FLOAT32, "int8", False, True, False, 0),
    (FLOAT32, BFLOAT16, "int8", False, True, False, 0),
    (BFLOAT16, BFLOAT16, "int8", True, True, False, 0),
    (FLOAT32, FLOAT32, "int4", False, True, False, 0),
    (BFLOAT16, BFLOAT16, "int4", True, True, False, 0),
    (FLOAT32, FLOAT32, "float32", False, True, False, 8),
    (BFLOAT16, BFLOAT16, "int8", True, True, False, 8),
    (BFLOAT16, BFLOAT16, "int4", True, False, True, 8),
    (BFLOAT16, BFLOAT16, "int8", True, True, False, 1),
    (FLOAT32, FLOAT32, "float32", False, True, False, 0, "edges"),
    (BFLOAT16, BFLOAT16, "bfloat16", True, True, False, 0, "edges"),
    (BFLOAT16, BFLOAT16, "bfloat16", True, True, False, 0, "misaligned"),
    (BFLOAT16, BFLOAT16, "int8", True, True, False, 0, "edges"),
    (BFLOAT16, BFLOAT16, "int4", True, True, False, 0, "misaligned"),
    (BFLOAT16, BFLOAT16, "int8", True, True, False, 0, "nesterov"),
    (FLOAT32, FLOAT32, "float32", False, False, True, 0, "change"),
    (FLOAT32, BFLOAT16, "bfloat16", False, False, True, 0, "change", "nesterov"),
    (BFLOAT16, BFLOAT16, "float32", True, False, True, 0, "change"),
    (BFLOAT16, BFLOAT16, "int8", True, False, True, 0, "change"),
    (BFLOAT16, BFLOAT16, "int4", True, False, True, -1, "change"),
    (BFLOAT16, BFLOAT16, "int8", True, True, False, -1),
    (BFLOAT16, BFLOAT16, "bfloat16", True, True, False, 0, "term", "nesterov"),
    (FLOAT32, FLOAT32, "int8", False, True, False, 0, "term", "nesterov"),
    (BFLOAT16, BFLOAT16, "int8", True, False, True, 0, "change", "nesterov"),
    (BFLOAT16, BFLOAT16, "int4", True, True, False, 0, "term"),
    (BFLOAT16, BFLOAT16, "int8", True, False, True, 8, "change", "nesterov"),
    (BFLOAT16, BFLOAT16, "int8", True, True, False, 1, "term"),
    (BFLOAT16, BFLOAT16, "int8", True, True, False, 0, "term", "misaligned"),
    (BFLOAT16, BFLOAT16, "int8", True, True, False, 8, "cut: find"),
    (BFLOAT16, BFLOAT16, "int8", True, True, False, 8, "cut: agreed"),
    (BFLOAT16, BFLOAT16, "int8", True, True, False, 1, "term", "nesterov", "cut: find", "misaligned"),
    (BFLOAT16, BFLOAT16, "int8", True, True, False, 1, "term", "nesterov", "cut: agreed", "misaligned"),
    (FLOAT32, FLOAT32, "int4", False, False, True, 8, "cut: agreed"),
]
GROUPS = {0: "", 1: ", layers of 1s", 8: ", layers of 8s", passes.IN_TURN.value: ", layers in turn"}
CUTS = {"cut: find": passes.FIND.value, "cut: agreed": passes.AGREED.value}
STATISTICS = [(FLOAT32, True, 1024), (BFLOAT16, True, 64), (BFLOAT16, False, 1024)]
STRIPS = [(FLOAT32, 256), (BFLOAT16, 256), (BFLOAT16, 16)]


def in_128_bits(types, half):
    """How many of some tensors a thread reads so many bits of at a time: of half a tile only float32."""
    return sum(t == FLOAT32 or not half for t in types)


def cases():
    """Name, kernel, its constants, and how many tensors it reads and writes."""
    for param, grad, form, rounds, inside, outside, group, *more in UPDATES:
        divided = next((d for d in ("term", "change") if d in more), None)
        largest = FORMATS[form].largest if form else 0
        constants = {
            "param_type": param,
            "grad_type": grad,
            "exp_avg_type": tl.int8 if largest else kernels.FORMATS[FORMATS[form].dtype] if form else None,
            "largest": largest,
            "codes_aligned": True,
            "rounds_weights": rounds,
            "inside": inside,
            "outside": outside,
            "nesterov": "nesterov" in more,
            "divided": divided,
            "cut": next((cut for name, cut in CUTS.items() if name in more), None),
            "group": group,
            "aligned": "misaligned" not in more,
            "whole": not any(word in more for word in ("misaligned", "edges", *CUTS)),
            "chunk": kernels.CHUNK,
        }
        constants |= {} if constants["cut"] else {"cut_blocks": None}
        constants |= {} if divided else {"row_root": None, "column_root": None}
        # Of codes a thread has less than 128 bits; where any lane may be of another layer, none is sure to be
        # written, and the roots are read one by one.
        moments = [constants["exp_avg_type"]] if form and not largest else []
        half = kernels.halved(constants)
        roots = [FLOAT32] if divided and group != 1 else []
        reads = in_128_bits([param, grad, *moments, *roots], half)
        writes = in_128_bits([param, *moments], half) * (group != 1)
        options = "".join(f", {'factored, ' * (option == divided)}{option}" for option in more)
        name = f"update {param} {grad} {form}{' rounded' * rounds}{GROUPS[group]}"
        counts = (0, 0) if "misaligned" in more or constants["cut"] else (reads, writes)
        yield f"{name}{options}", passes.update, constants, *counts
    for dtype, squares, width in STATISTICS:
        constants = {"grad_type": dtype, "squares": squares, "width": 0}
        name = f"{'sum' if squares else 'max'} {dtype}"
        yield f"chunk {name}", passes.chunk_statistic, constants, 1, 0
        yield f"rows of {width} {name}", passes.rows_statistic, constants | {"width": width}, 1, 0
    few = {"width": passes.FEW.value, "tile": passes.FEW.value * passes.SEVERAL.value}
    yield "layers of few partials", passes.layer_statistic, few, 0, 0
    yield "layers of many partials", passes.layer_statistic, {"width": kernels.TILE}, 0, 0
    for dtype, width in STRIPS:
        constants = {"grad_type": dtype, "width": width}
        yield f"strips of {width} {dtype}", factored.strip_statistic, constants, 1, 0
    yield "sums of strips", factored.panel_statistic, {}, 0, 0


def build(kernel, constants, architecture):
    """Compile as Kernels would launch it."""
    amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture[3:]), 32)
    # By each thread as many elements as Kernels would give it.
    half = "param_type" in constants and kernels.halved(constants)
    tile = (4 if half else 8) * kernels.WARPS * target.warp_size
    constants = {"tile": BLOCK if constants.get("cut") else tile, **constants}
    if half and constants["group"] > 1:
        constants["group"] //= 2
    types = {name: kind for name, kind in TYPES.items() if name not in constants}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in pointers})
    return triton.compile(source, target=target, options=dict(kernels.LAUNCH)).asm


def nvidia(asm):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(asm["cubin"])
        command = [str(tool), "-res-usage", "-sass", file.name]
        text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    # A correctly rounded division is made of multiply-adds: six, and ten or eleven in a function for extreme
    # numbers.
    divisions = asm["ptx"].count("div.rn.f32") + asm["ptx"].count("rcp.rn.f32")
    fused = len(re.findall(r"\bFFMA2?\b", text)) - (6 * divisions + 11 if divisions else 0)
    return {
        "registers": int(usage[1]),
        "spilled": int(usage[2]) + len(re.findall(r"\b(?:LDL|STL)\b", text)),
        "128-bit loads": len(re.findall(r"\bLDG\.E\.128\b", text)),
        "128-bit stores": len(re.findall(r"\bSTG\.E\.128\b", text)),
        "float32 fma": max(0, fused) + asm["ptx"].count("fma.rn.f32"),
        "divisions": divisions,
        "other divisions": len(re.findall(r"\b(?:div|rcp)\.(?:full|approx)\S*f32", asm["ptx"])),
    }


def amd(asm):
    text = asm["amdgcn"]
    count = {name: int(value) for name, value in re.findall(r"\.(\w+): +(\d+)\n", text)}
    # v_fma_mix is how float16 is read: a product with nothing added, or a sum of something times 1.
    fused = [
        line
        for line in re.findall(r"v_\w*(?:fma|mac|mad)\w*f32.*", text)
        if not re.search(r"fma_mix_f32.*(neg\(0\)|, 1\.0,)", line)
    ]
    divisions = len(re.findall(r"\bv_div_fixup_f32\w*", text))  # each with six of the above
    return {
        "registers": count["vgpr_count"],
        "spilled": sum(count[f"{name}_spill_count"] for name in ("vgpr", "sgpr"))
        + count["private_segment_fixed_size"],
        "128-bit loads": len(re.findall(r"\b(?:global|flat|buffer)_load_dwordx4\b", text)),
        "128-bit stores": len(re.findall(r"\b(?:global|flat|buffer)_store_dwordx4\b", text)),
        "float32 fma": len(fused) - 6 * divisions,
        "divisions": divisions,
        "other divisions": len(re.findall(r"amdgcn\.(?:rcp|fdiv)|fdiv (?:fast|arcp|afn)", asm["llir"])),
    }


if __name__ == "__main__":
    for name, kernel, constants, tensors, stored in cases():
        for architecture in sys.argv[1:]:
            asm = build(kernel, constants, architecture)
            facts = amd(asm) if architecture.startswith("gfx") else nvidia(asm)
            rare = any(word in name for word in ("edges", "misaligned", "layers of 1s", "cut"))
            line = {
                "architecture": architecture,
                "name": name,
                "rare": rare,
                "tensors": tensors,
                "stored": stored,
                **facts,
            }
            print(json.dumps(line))
