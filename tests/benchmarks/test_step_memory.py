"""Memory over the time of a step: the exact peak is kept, and what could not be measured says so."""

import json

import pytest

from benchmarks import plots, step_memory


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(step_memory, "MODELS", {"gpt2-1m": {"tokens": 8, "checkpointing": True}})
    monkeypatch.setattr(step_memory, "OPTIMIZERS", (("NovoGrad, int4", False), ("NovoGrad, int4", True)))


@pytest.mark.usefixtures("small")
def test_each_cell_is_written_once_with_its_exact_peak(tmp_path, monkeypatch):
    step_memory.main(out=tmp_path, timeout=100)
    report = json.loads((tmp_path / "step_memory.json").read_text())
    assert {"date", "command", "commit", "versions", "machine"} <= report["provenance"].keys()
    kept, released = report["rows"]
    for row in report["rows"]:
        assert [phase["name"] for phase in row["phases"]] == ["forward", "backward", "step"]
        for phase in row["phases"]:
            assert max(phase[plots.SLICES]) == phase["peak"]
        assert row["peak_bytes"] == max(phase["peak"] for phase in row["phases"])
    # All gradients wait for the step, or none does.
    waiting = [row["phases"][2]["before"] - row["phases"][0]["before"] for row in (kept, released)]
    assert waiting == pytest.approx([kept["gradient_bytes"], 0], rel=0.01, abs=0.01 * waiting[0])
    assert (kept["release"], released["release"]) == (False, True)
    assert released["peak_bytes"] < kept["peak_bytes"]
    for name in ("step_memory.png", "step_memory.svg"):
        assert (tmp_path / name).stat().st_size > 5000
    monkeypatch.setattr(step_memory, "cell", None)  # nothing is measured again
    step_memory.main(out=tmp_path, timeout=100)


def test_a_cell_that_cannot_be_measured_says_why(monkeypatch):
    monkeypatch.setattr(step_memory, "MODELS", {"gpt2-1m": {}})
    monkeypatch.setattr(step_memory, "OPTIMIZERS", (("Apex FusedAdam", False), ("torch AdamW", True)))
    rows = [step_memory.cell(job, 100) for job in step_memory.jobs(["gpt2-1m"])]
    assert step_memory.markdown({"rows": rows}).splitlines() == [
        "| optimizer | gpt2-1m: state | gradients | peak |",
        "|---|---:|---:|---:|",
        "| Apex FusedAdam | not installed: pip install apex |  |  |",
        "| torch AdamW, gradients released | gradients are not released: not NovoGrad |  |  |",
    ]
