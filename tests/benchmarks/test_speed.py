"""benchmarks/speed.py measures what it names, says why where it cannot, and appends."""

import json

import pytest
import torch

from benchmarks import speed
from benchmarks.shapes import CATALOGUE, LLAMA_7B, gpt2
from novoscale.memory.optimizers import CANDIDATES


def elements(shapes):
    return sum(torch.Size(shape).numel() for shape in shapes)


def test_shapes_are_those_of_the_models():
    assert elements(gpt2()) == 124_439_808
    assert elements(LLAMA_7B) == 6_738_415_616
    assert elements(CATALOGUE["llama-1b"]()) == 1_235_814_400
    assert len(CATALOGUE["1000-small"]()) == 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_optimizer_is_timed_with_and_without_clipping(monkeypatch, dtype):
    monkeypatch.setattr(speed, "COPY", 1 << 16)
    names = ["NovoGrad", "NovoGrad, reference", "torch AdamW, fused", "torch Adafactor", "Apex FusedAdam"]
    measured = speed.measure([(7, 5), (3,)], names, "cpu", dtype, rounds=1, steps=2)
    assert (measured["elements"], measured["tensors"]) == (38, 2)
    assert [(r["optimizer"], r["clip"]) for r in measured["rows"]] == [
        (name, clip) for name in names for clip in (False, True)
    ]
    for row in measured["rows"]:
        if row["optimizer"].startswith("Apex"):
            assert "apex" in row["why"]
        else:
            assert row["quartiles_ms"][0] <= row["ms"] <= row["quartiles_ms"][1]
            assert row["launches"] is row["host_ms"] is None  # of a GPU


def test_bytes_moved_by_count():
    bytes_per_element = lambda name, size, clip: CANDIDATES[name].bytes_moved(1, size, clip)  # noqa: E731
    assert bytes_per_element("NovoGrad", 4, False) == bytes_per_element("NovoGrad", 4, True) == 24
    assert bytes_per_element("torch AdamW, fused", 4, False) == 28
    assert bytes_per_element("torch AdamW, fused", 4, True) == 40
    assert bytes_per_element("torch AdamW, fused", 2, False) == 14
    assert bytes_per_element("NovoGrad", 2, False) == 16  # its first moment is float32
    assert bytes_per_element("torch Adafactor", 4, False) is None


def test_a_run_is_appended_and_drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "COPY", 1 << 16)
    monkeypatch.setitem(CATALOGUE, "1000-small", lambda: [(4, 4)] * 3)
    for expected in (1, 2):
        speed.main(["1000-small"], ["float32"], ["NovoGrad", "AdamW"], "cpu", 1, 2, tmp_path)
        runs = json.loads((tmp_path / "speed.json").read_text())
        assert len(runs) == expected
    assert runs[0]["provenance"]["versions"]["torch"] == torch.__version__
    assert (tmp_path / "speed_cpu_float32.png").stat().st_size > 1000
    assert (tmp_path / "speed_cpu_float32.svg").exists()
