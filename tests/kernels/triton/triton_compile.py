"""Compiles the Triton kernels for GPUs that need not be here; a line of JSON on each kernel.

    python tests/kernels/triton/triton_compile.py sm_90 gfx942

Not under TRITON_INTERPRET, which leaves nothing to compile. ``tensors`` and ``stored`` are how many tensors
the kernel reads and writes by 128 bits at least once where they are aligned. ``loop``, for NVIDIA's: how many
instructions of its main loop each pipe gets for each element.
"""

import json
import re
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

sys.path.insert(0, str(Path(__file__).parents[3]))

from benchmarks import sass
from novoscale.kernels.triton import elements as kernels
from novoscale.kernels.triton import factored as triton_factored
from novoscale.kernels.triton import layers as triton_layers
from novoscale.kernels.triton import second_moments as triton_second_moments
from novoscale.kernels.triton import statistic as triton_statistic
from novoscale.kernels.triton import update as triton_update
from novoscale.kernels.triton import verdict as of_verdict
from novoscale.sharding.blocks import BLOCK
from novoscale.state.formats import FORMATS

TYPES = {
    "table": "*i64",
    "run_of": "*i32",
    "sources": "*i64",
    "gradients": "*i64",
    "partials": "*fp64",
    "statistic": "*fp64",
    "each": "*fp32",
    "groups": "*fp32",
    "active": "*i1",
    "key": "*i32",
    "row_root": "*fp32",
    "column_root": "*fp32",
    "sharded_blocks": "*i32",
    "sharded_count": "i32",
    "parameters": "*i64",
    "stretches": "*i64",
    "param_groups": "*fp64",
    "sums": "*fp64",
    "largest": "*i64",
    "share": "*fp64",
    "scale": "*fp32",
    "buffer": "*fp64",
    "slots": "*i32",
    "sum_of": "*i32",
    "veto": "*i1",
    "total": "*fp64",
    "finite": "*i1",
    "skipped": "*i64",
    "bad_at": "*i64",
    "vote": "*fp64",
    "expected": "*fp64",
    "uneven": "*i1",
    "noted_uneven": "*i1",
    "in_order": "*i32",
    "norms": "*fp64",
    "bad": "*i1",
    "mean_square": "*fp64",
    "result": "*fp64",
    **dict.fromkeys(
        (
            *("step", "first_number", "length", "parameter_count", "layer_count", "column_count"),
            *("vote_count", "voting", "alike_count", "ranks"),
        ),
        "i32",
    ),
}
FLOAT32, BFLOAT16, FLOAT16 = tl.float32, tl.bfloat16, tl.float16
IN_TURN = triton_update.IN_TURN.value
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
    (BFLOAT16, BFLOAT16, "int8", True, True, False, IN_TURN),
    (BFLOAT16, BFLOAT16, "bfloat16", True, True, False, 0, "term", "nesterov"),
    (FLOAT32, FLOAT32, "int8", False, True, False, 0, "term", "nesterov"),
    (BFLOAT16, BFLOAT16, "int8", True, False, True, 0, "change", "nesterov"),
    (BFLOAT16, BFLOAT16, "int4", True, True, False, 0, "term"),
    (BFLOAT16, BFLOAT16, "int8", True, False, True, 8, "change", "nesterov"),
    (FLOAT32, FLOAT32, "float32", False, True, False, IN_TURN, "term", "nesterov"),
    (BFLOAT16, BFLOAT16, "float32", True, True, False, IN_TURN, "term", "nesterov"),
    (BFLOAT16, BFLOAT16, "int8", True, True, False, IN_TURN, "term", "nesterov"),
    (BFLOAT16, BFLOAT16, "int4", True, True, False, IN_TURN, "term", "nesterov"),
    (BFLOAT16, BFLOAT16, "int8", True, True, False, 1, "term"),
    (BFLOAT16, BFLOAT16, "int8", True, True, False, 0, "term", "misaligned"),
    (BFLOAT16, BFLOAT16, "int8", True, True, False, 8, "sharded: find"),
    (BFLOAT16, BFLOAT16, "int8", True, True, False, 8, "sharded: agreed"),
    (BFLOAT16, BFLOAT16, "int8", True, True, False, 1, "term", "nesterov", "sharded: find", "misaligned"),
    (BFLOAT16, BFLOAT16, "int8", True, True, False, 1, "term", "nesterov", "sharded: agreed", "misaligned"),
    (FLOAT32, FLOAT32, "int4", False, False, True, 8, "sharded: agreed"),
]
GROUPS = {0: "", 1: ", layers of 1s", 8: ", layers of 8s", IN_TURN: ", layers in turn"}
FEW = {"scale": None, "scaled": False}
LAYERS = [  # kernel, its constants
    ("begin", of_verdict.begin, {"numbers": 3, "scaled": True, "reduced": False, "buffer": None, "slots":
    None}), ("begin, reduced", of_verdict.begin, {"numbers": 3, "reduced": True, **FEW}), ("pack",
    of_verdict.pack, {"shared": True, "scattered": 1, "vetoed": True}), (
        "verdict",
        of_verdict.verdict,
        {
            "twice": False, "shared": True, "counted": True, "scattered": 1, "vetoed": False, "veto": None,
            "clips": True, "reduced": True,
        },
    ),
    ("count", of_verdict.count, {"clips": True, "verdicts": True}),
    ("mean square", triton_second_moments.mean_square, {"clips": True}),
    (
        "advance",
        triton_second_moments.advance,
        {
            "averages": True, "concludes": True, "verdicts": False, "clips": True, "scaled": True,
            "clipped": False, "mean_square": None, "relative": True,
        },
    ),
    (
        "conclude",
        triton_second_moments.advance,
        {
            "averages": False, "concludes": True, "verdicts": True, "clips": True, "clipped": True,
            "relative": False, "norms": None, "bad": None, **FEW,
        },
    ),
]  # fmt: skip
SHARDINGS = {"sharded: find": triton_update.FIND.value, "sharded: agreed": triton_update.AGREED.value}
STATISTICS = [  # gradient, sums of squares or largest magnitudes, in words of float32, width of rows
    (FLOAT32, True, False, 1024),
    (BFLOAT16, True, False, 64),
    (BFLOAT16, False, False, 1024),
    (FLOAT32, True, True, 1024),
    (BFLOAT16, True, True, 64),
]
STRIPS = [
    (FLOAT32, False, 256),
    (BFLOAT16, False, 256),
    (BFLOAT16, False, 16),
    (FLOAT32, True, 256),
    (BFLOAT16, True, 256),
    (BFLOAT16, True, 16),
]


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
            "sharded": next((sharded for name, sharded in SHARDINGS.items() if name in more), None),
            "group": group,
            "aligned": "misaligned" not in more,
            "whole": not any(word in more for word in ("misaligned", "edges", *SHARDINGS)),
            "chunk": kernels.CHUNK,
        }
        constants |= {} if constants["sharded"] else {"sharded_blocks": None}
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
        counts = (0, 0) if "misaligned" in more or constants["sharded"] else (reads, writes)
        yield f"{name}{options}", triton_update.update, constants, *counts
    for dtype, squares, in_words, width in STATISTICS:
        constants = {"grad_type": dtype, "squares": squares, "in_words": in_words, "width": 0}
        name = f"{'sum' if squares else 'max'} {dtype}{' in words' * in_words}"
        yield f"chunk {name}", triton_statistic.chunk_statistic, constants, 1, 0
        yield f"rows of {width} {name}", triton_statistic.rows_statistic, constants | {"width": width}, 1, 0
    few, several = triton_statistic.FEW.value, triton_statistic.SEVERAL.value
    of_few = {"width": few, "tile": few * several}
    yield "layers of few partials", triton_statistic.layer_statistic, of_few, 0, 0
    yield "layers of many partials", triton_statistic.layer_statistic, {"width": kernels.TILE}, 0, 0
    for dtype, in_words, width in STRIPS:
        constants = {"grad_type": dtype, "in_words": in_words, "width": width}
        yield (
            f"strips of {width} {dtype}{' in words' * in_words}",
            triton_factored.strip_statistic,
            constants,
            1,
            0,
        )
    yield "sums of strips", triton_factored.panel_statistic, {}, 0, 0
    for name, kernel, constants in LAYERS:
        yield f"layers: {name}", kernel, constants, 0, 0


def of_thread(constants):
    """How many elements each thread handles at a time, as Kernels would have it."""
    return 4 if "param_type" in constants and kernels.halved(constants) else 8


def build(kernel, constants, architecture):
    """Compile as Kernels would launch it."""
    amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture[3:]), 32)
    # Triton makes a function of the names of the arguments, and has some of its own.
    create_function_from_signature(kernel.signature, kernel.params, make_backend(target))
    tile = of_thread(constants) * kernels.WARPS * target.warp_size
    if kernel in [of_layers for _, of_layers, _ in LAYERS]:
        constants = constants | {"tile": triton_layers.TILE}
    if "param_type" in constants and kernels.halved(constants) and constants["group"] > 1:
        constants = constants | {"group": constants["group"] // 2}
    constants = {"tile": BLOCK if constants.get("sharded") else tile} | constants
    types = {name: kind for name, kind in TYPES.items() if name not in constants}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in pointers})
    return triton.compile(source, target=target, options=dict(kernels.LAUNCH)).asm


def by_pipe(text, constants):
    """Instructions of the main loop for each element; nothing if it reads or writes element by element."""
    if constants.get("group") == 1:
        return {}
    try:
        way = sass.main_loop(sass.instructions(text))
    except ValueError:
        return {}
    moved = lambda kind: 8 * sum(x.bytes for x in way if x.name.startswith(kind))  # noqa: E731
    if "param_type" in constants:
        form, largest = constants["exp_avg_type"], constants["largest"]
        moment = 0 if form is None else 4 if 0 < largest < 8 else form.primitive_bitwidth
        elements = moved("STG") / (constants["param_type"].primitive_bitwidth + moment)
    else:
        elements = moved("LDG") / constants["grad_type"].primitive_bitwidth
    # The compiler may have unrolled the loop. Scales of blocks make it a little more.
    at_a_time = of_thread(constants)
    elements = at_a_time * max(1, round(elements / at_a_time))
    return {pipe: count / elements for pipe, count in sass.by_pipe(way).items()}


def nvidia(asm, constants):
    text = sass.disassembled(asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    # A correctly rounded division is made of multiply-adds: six, and ten or eleven in a function for extreme
    # numbers.
    divisions = asm["ptx"].count("div.rn.f32") + asm["ptx"].count("rcp.rn.f32")
    written = asm["ptx"].count("fma.rn.f32")
    fused = len(re.findall(r"\bFFMA2?\b", text)) - (6 * divisions + 11 if divisions else 0)
    return {
        "registers": int(usage[1]),
        "spilled": int(usage[2]) + len(re.findall(r"\b(?:LDL|STL)\b", text)),
        "128-bit loads": len(re.findall(r"\bLDG\.E\.128\b", text)),
        "128-bit stores": len(re.findall(r"\bSTG\.E\.128\b", text)),
        "float32 fma": max(0, fused - written),
        "written fma": written,
        "divisions": divisions,
        "other divisions": len(re.findall(r"\b(?:div|rcp)\.(?:full|approx)\S*f32", asm["ptx"])),
        "loop": by_pipe(text, constants),
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
    of_integers = len(re.findall(r"\b[su](?:div|rem) i64 %[^,]+, %", asm["llir"]))  # each with two
    return {
        "registers": count["vgpr_count"],
        "spilled": sum(count[f"{name}_spill_count"] for name in ("vgpr", "sgpr"))
        + count["private_segment_fixed_size"],
        "128-bit loads": len(re.findall(r"\b(?:global|flat|buffer)_load_dwordx4\b", text)),
        "128-bit stores": len(re.findall(r"\b(?:global|flat|buffer)_store_dwordx4\b", text)),
        "float32 fma": len(fused) - 6 * divisions - 2 * of_integers,
        "written fma": len(re.findall(r"@llvm\.fma\.v?\d?f32\(", asm["llir"])),
        "divisions": divisions,
        "other divisions": len(re.findall(r"amdgcn\.(?:rcp|fdiv)|fdiv (?:fast|arcp|afn)", asm["llir"])),
    }


if __name__ == "__main__":
    for name, kernel, constants, tensors, stored in cases():
        # Where there is much float64 nothing is done in words; compiled for sm_80 and sm_90 to be counted.
        elsewhere = ("sm_100", "gfx") if "in words" in name else ()
        # What few programs run is compiled for one chip of each maker.
        rare = any(word in name for word in ("edges", "misaligned", "layers of 1s", "sharded"))
        elsewhere += ("sm_80", "sm_100") if rare else ()
        for architecture in (a for a in sys.argv[1:] if not a.startswith(elsewhere)):
            asm = build(kernel, constants, architecture)
            facts = amd(asm) if architecture.startswith("gfx") else nvidia(asm, constants)
            line = {
                "architecture": architecture,
                "name": name,
                "rare": rare,
                "tensors": tensors,
                "stored": stored,
                **facts,
            }
            print(json.dumps(line))
