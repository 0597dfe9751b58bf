"""What NVIDIA's compiler made of a kernel: the instructions of its main loop, and the pipes they go to.

The main loop is where almost all of the time goes: the first of the innermost loops of a kernel that load
128 bits at a time, and of the ways through it the shortest with all of those loads, which leaves out what is
for the ends of chunks and for extreme numbers.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import triton

# The pipe of an instruction, by the beginning of its name; the first that fits. Those that are not here, such
# as branches and what is done once for a whole warp, are only issued.
PIPES = {
    "F64 conversion": "F2F.F64 F2F.F32.F64 F2F.F16.F64 F2I.F64 F2I.S64 F2I.U64 I2F.F64 I2F.S64 I2F.U64",
    "XU": "BREV F2F F2I FLO FRND I2F. MUFU POPC REDUX",
    "FP64": "DADD DFMA DMUL DSETP",
    "FP32": "FADD FFMA FMUL HADD2 HFMA2 HMUL2",
    "IMAD": "IMAD",
    "LSU": "ATOM LD RED. SHFL ST",
    "ALU": "BMSK CS2R F2FP FCHK FMNMX FSEL FSET I2FP IABS IADD IMNMX ISETP LEA LOP MOV P2R PLOP PRMT R2P SEL "
    "SGXT SHF VABSDIFF VIADD VIMNMX",
}


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        address: where it is.
        name: with its suffixes.
        target: of a jump.
        always: whether no predicate decides.
    """

    address: int
    name: str
    target: int | None
    always: bool

    @property
    def bytes(self) -> int:
        """That a thread reads or writes by it, if it does."""
        bits = re.search(r"\.(128|64|U16|S16|U8|S8)\b", self.name)
        return int(re.sub(r"\D", "", bits[1])) // 8 if bits else 4


def disassembled(cubin: bytes) -> str:
    """The SASS and the resources of a kernel, as cuobjdump prints them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [str(tool), "-res-usage", "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def instructions(sass: str) -> list[Instruction]:
    """Those of a kernel, in their order."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@\S+ )?(\S+)([^;]*);", sass, re.MULTILINE)
    return [
        Instruction(int(address, 16), name, _target(name, operands), not predicate and "P" not in operands)
        for address, predicate, name, operands in found
    ]


def _target(name: str, operands: str) -> int | None:
    return int(operands.split()[-1], 16) if name.startswith("BRA") else None


def main_loop(kernel: Sequence[Instruction]) -> list[Instruction]:
    """The way through the main loop of a kernel: see the top of this file.

    Raises:
        ValueError: no loop loads 128 bits at a time.
    """
    at = {x.address: i for i, x in enumerate(kernel)}
    loops = [(at[x.target], i) for i, x in enumerate(kernel) if x.target is not None and x.target < x.address]
    ways = {(begin, end): _shortest(kernel, begin, end) for begin, end in loops}
    wide = [loop for loop, way in ways.items() if _wide(way)]
    inner = [a for a in wide if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in wide)]
    if not inner:
        raise ValueError("no loop loads 128 bits at a time")
    return ways[min(inner)]


def _wide(way: Sequence[Instruction]) -> int:
    return sum(x.name.startswith("LDG") and x.bytes == 16 for x in way)


def _shortest(kernel: Sequence[Instruction], begin: int, end: int) -> list[Instruction]:
    """From the beginning of a loop to the jump at its end, forwards only: with the most wide loads, then
    with the fewest instructions.
    """
    at = {x.address: i for i, x in enumerate(kernel)}
    # From each instruction on: how many wide loads, less, and how many instructions; and the next one.
    best: dict[int, tuple[int, int, int]] = {end: (0, 1, end)}
    for i in reversed(range(begin, end)):
        this = kernel[i]
        leaves = this.always and this.name.startswith(("BRA", "EXIT", "RET"))
        following = ([] if leaves else [i + 1]) + ([] if this.target is None else [at[this.target]])
        known = [(*best[j][:2], j) for j in following if j > i and j in best]
        if known:
            wide, length, j = min(known)
            best[i] = (wide - _wide([this]), length + 1, j)
    way = [begin] if begin in best else []
    while way and way[-1] != end:
        way.append(best[way[-1]][2])
    return [kernel[i] for i in way]


def by_pipe(way: Sequence[Instruction]) -> Counter[str]:
    """How many instructions go to each pipe; under "issue" how many there are."""
    counts = Counter({"issue": len(way)})
    for instruction in way:
        pipe = next(
            (p for p, names in PIPES.items() if instruction.name.startswith(tuple(names.split()))), None
        )
        if pipe is not None:
            # Two at a time, as FADD2 of Blackwell, take as long as two.
            counts[pipe] += 2 if re.match(r"F\w+2\b", instruction.name) else 1
    return counts
