"""The change from AdamW to NovoGrad at half the steps trains what it says."""

import pytest

from benchmarks import changeover, plots


@pytest.fixture
def few(monkeypatch):
    for name, value in {"BATCH": 2, "EVERY": 2, "CLOSELY": 1, "VALIDATION_WINDOWS": 2}.items():
        monkeypatch.setattr(changeover, name, value)


def test_all_that_leaves_adamw_begins_where_it_is_and_goes_on_by_itself(few, tmp_path):
    curves = changeover.train("gpt2", 0, "AdamW", 8)
    assert curves.keys() == {name for name in plots.CHANGEOVER_COLORS if name.startswith("AdamW")}
    at_half = {dict(curve)[4] for curve in curves.values()}
    assert len(at_half) == 1
    after = [dict(curve)[8] for curve in curves.values()]
    assert len(set(after)) >= 3  # int8 may be float32 to the last digit
    curves |= changeover.train("gpt2", 0, "float32", 8)
    report = {
        "model": "gpt2",
        "steps": 8,
        "runs": [{"name": n, "seed": 0, "validation_loss": c} for n, c in curves.items()],
        "provenance": {"versions": {}, "command": "make changeover"},
    }
    changeover.show(report)
    plots.changeover(report, tmp_path / "changeover")
    assert {f.suffix for f in tmp_path.iterdir()} == {".png", ".svg"}
