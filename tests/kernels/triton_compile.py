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

from novoscale.kernels import triton as kernels

TYPES = {
    "table": "*i64",
    "partials": "*fp64",
    "statistic": "*fp64",
    "grad_scale": "*fp64",
    "step_size": "*fp64",
    "decay": "*fp64",
    "active": "*i1",
    "beta1": "fp32",
    "beta3": "fp32",
    "weight_decay": "fp32",
}
UPDATES = [  # param, grad, exp_avg, decay inside, decay outside
    (tl.float32, tl.float32, tl.float32, True, False),
    (tl.float32, tl.bfloat16, tl.bfloat16, False, True),
    (tl.bfloat16, tl.bfloat16, tl.bfloat16, True, False),
    (tl.float16, tl.float16, tl.float32, False, True),
    (tl.bfloat16, tl.bfloat16, None, False, False),
]
STATISTICS = [(tl.float32, True), (tl.bfloat16, True), (tl.bfloat16, False)]


def cases():
    """Name, kernel, its constants, and how many tensors it reads and writes."""
    for *types, inside, outside in UPDATES:
        names = ("param_type", "grad_type", "exp_avg_type")
        constants = dict(zip(names, types, strict=True)) | {"inside": inside, "outside": outside}
        moment = types[2] is not None
        yield f"update {' '.join(map(str, types))}", kernels._update, constants, 2 + moment, 1 + moment
    for dtype, squares in STATISTICS:
        name = f"chunk {'sum' if squares else 'max'} {dtype}"
        yield name, kernels._chunk_statistic, {"grad_type": dtype, "squares": squares}, 1, 0
    yield "layer", kernels._layer_statistic, {}, 0, 0


def build(kernel, constants, architecture):
    """Compile as Kernels would launch it."""
    amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture[3:]), 32)
    constants = constants | {"block": 8 * kernels.WARPS * target.warp_size}
    signature = {name: TYPES.get(name, "constexpr") for name in kernel.arg_names}
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
    return {
        "registers": int(usage[1]),
        "spilled": int(usage[2]) + len(re.findall(r"\b(?:LDL|STL)\b", text)),
        "128-bit loads": len(re.findall(r"\bLDG\.E\.128\b", text)),
        "128-bit stores": len(re.findall(r"\bSTG\.E\.128\b", text)),
        "float32 fma": len(re.findall(r"\bFFMA2?\b", text)) + asm["ptx"].count("fma.rn.f32"),
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
    return {
        "registers": count["vgpr_count"],
        "spilled": sum(count[f"{name}_spill_count"] for name in ("vgpr", "sgpr"))
        + count["private_segment_fixed_size"],
        "128-bit loads": len(re.findall(r"\b(?:global|flat|buffer)_load_dwordx4\b", text)),
        "128-bit stores": len(re.findall(r"\b(?:global|flat|buffer)_store_dwordx4\b", text)),
        "float32 fma": len(fused),
    }


if __name__ == "__main__":
    for name, kernel, constants, tensors, stored in cases():
        for architecture in sys.argv[1:]:
            asm = build(kernel, constants, architecture)
            facts = amd(asm) if architecture.startswith("gfx") else nvidia(asm)
            line = {"architecture": architecture, "name": name, "tensors": tensors, "stored": stored, **facts}
            print(json.dumps(line))
