"""benchmarks/instructions.py counts the main loop's instructions, and knows which pipe is the busiest."""

import json
from itertools import count

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import instructions, sass

KERNEL = """
 LDG.E.64 R2, desc[UR6][R18.64] ;
 LDG.E R3, desc[UR6][R18.64+0x8] ;
 @P0 BRA 0x10 ;
 IMAD.IADD R2, R2, 0x1, R3 ;
 @!P1 BRA 0x90 ;
 LDG.E.128 R4, desc[UR6][R18.64] ;
 F2F.F64.F32 R8, R4 ;
 DFMA R10, R8, R8, R10 ;
 BRA 0xf0 ;
 LDG.E.128 R4, desc[UR6][R18.64] ;
 LDG.E.128 R8, desc[UR6][R18.64+0x200] ;
 MUFU.RCP R12, R4 ;
 @P3 BRA 0xe0 ;
 CALL.REL.NOINC 0x200 ;
 FMUL R12, R12, R8 ;
 UIADD3 UR4, UR4, 0x1, URZ ;
 ISETP.LE.AND P0, PT, R2, UR4, PT ;
 @P0 BRA 0x40 ;
 STG.E.U16 desc[UR6][R18.64], R12 ;
 EXIT ;
 BRA 0x140 ;
"""


def numbered(kernel):
    lines = kernel.strip().splitlines()
    return "\n".join(f"        /*{i * 16:04x}*/ {line.strip()}  /* 0x0 */" for i, line in zip(count(), lines))


def test_the_main_loop_is_the_shortest_way_with_all_wide_loads():
    kernel = sass.instructions(numbered(KERNEL))
    assert len(kernel) == 21
    way = sass.main_loop(kernel)
    assert [x.name.split(".")[0] for x in way] == [
        "BRA", "LDG", "LDG", "MUFU", "BRA", "FMUL", "UIADD3", "ISETP", "BRA",
    ]  # fmt: skip
    assert sass.by_pipe(way) == {"issue": 9, "LSU": 2, "XU": 1, "FP32": 1, "ALU": 1}
    assert [x.bytes for x in kernel if x.name.startswith(("LDG", "STG"))] == [8, 4, 16, 16, 16, 2]


def test_a_kernel_without_wide_loads_has_no_main_loop():
    with pytest.raises(ValueError, match="128 bits"):
        sass.main_loop(sass.instructions(numbered(KERNEL.replace(".128", ".64"))))


def test_the_busiest_pipe_decides():
    counts = {
        "sm_80": {"issue": 60, "ALU": 32, "FP32": 16, "IMAD": 16.5},
        "sm_90": {"issue": 60, "ALU": 32, "FP32": 16, "IMAD": 16.5},
        "sm_86": {"issue": 4, "FP64": 1, "F64 conversion": 1},
    }
    ratio = lambda chip: instructions.ratio(counts, 8, chip)  # noqa: E731
    assert ratio("A100") == pytest.approx(32.5 / 64 / (108 * 1.41) * 2039 / 8)  # multiplications share lanes
    assert ratio("H100") == pytest.approx(32 / 64 / (132 * 1.98) * 3350 / 8)
    assert ratio("A10") == pytest.approx(2 / 2 / (72 * 1.695) * 600 / 8)


def test_every_pass_is_a_kernel_that_is_compiled():
    names = {name for name, *_ in instructions.triton_compile.cases()}
    assert {p.kernel for p in instructions.PASSES.values()} <= names
    assert instructions.launched("chunk sum fp32", "sm_90", names) == "chunk sum fp32"
    assert instructions.launched("chunk sum fp32", "sm_103", names) == "chunk sum fp32 in words"
    assert instructions.launched("update fp32 fp32 float32", "sm_86", names) == "update fp32 fp32 float32"


def test_a_table_is_printed_and_written(monkeypatch, tmp_path, capsys):
    counts = {name: {a: {"issue": 1.0} for a in instructions.LANES} for name in instructions.PASSES}
    monkeypatch.setattr(instructions, "counted", lambda architectures: counts)
    instructions.main(tmp_path)
    written = json.loads((tmp_path / "instructions.json").read_text())
    assert written["ratios"].keys() == instructions.PASSES.keys()
    assert written["provenance"]["versions"]["triton"]
    assert "update bfloat16, int8, rows (8)" in capsys.readouterr().out
