"""``make memory`` loses nothing that it has measured, and its tables say what is not there."""

import json

import pytest
import typer

from benchmarks import memory

STOPS = "RuntimeError: got mixed torch.Tensor and DTensor"


def row(optimizer, sharding, ranks, held=2.0, **more):
    """What ``compare`` yields for a model of 100 parameters."""
    state = {"total": int(100 * held / ranks), "by_key": {"exp_avg": int(100 * held / ranks)}}
    return {
        "optimizer": optimizer,
        "sharding": sharding,
        "ranks": ranks,
        "device": "cpu",
        "parameters": 100,
        "state_bytes_per_parameter": held,
        "transient_bytes": 50,
        "ranks_measured": [{"bytes": {"state": state}, "phases": []}] * ranks,
        **more,
    }


def measured(monkeypatch, *, stop_after=None):
    """Have nothing trained; returns what is asked for, and interrupts after so many rows."""
    asked = []

    def compare(model, optimizers, shardings, precision, timeout):
        for name in optimizers:
            for sharding, ranks in shardings:
                if len(asked) == stop_after:
                    raise KeyboardInterrupt
                asked.append((name, sharding, ranks))
                stops = name == "torch Adafactor" and sharding == "fsdp2"
                yield (
                    {"optimizer": name, "sharding": sharding, "ranks": ranks, "why": STOPS}
                    if stops
                    else row(*asked[-1])
                )

    monkeypatch.setattr(memory, "compare", compare)
    return asked


def test_an_interrupted_run_keeps_each_row_and_measures_only_what_is_missing(tmp_path, monkeypatch):
    first = measured(monkeypatch, stop_after=10)
    with pytest.raises(KeyboardInterrupt):
        memory.main(out=tmp_path)
    report = json.loads((tmp_path / "memory.json").read_text())
    assert list(map(memory.key, report["rows"])) == first
    assert {"date", "command", "commit", "versions", "machine"} <= report["provenance"].keys()
    assert all({"date", "commit"} <= row.keys() for row in report["rows"])
    rest = measured(monkeypatch)
    memory.main(out=tmp_path)
    assert not set(first) & set(rest)
    assert len(first) + len(rest) == len(memory.SHARDINGS) * len(memory.ORDER)
    again = measured(monkeypatch)
    memory.main(out=tmp_path)  # what could not be measured is tried again, and takes the place of its row
    assert again == [("torch Adafactor", "fsdp2", 2), ("torch Adafactor", "fsdp2", 4)]
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert list(map(memory.key, rows)) == [
        (name, *sharding) for name in memory.ORDER for sharding in memory.SHARDINGS
    ]
    for name in ("memory.md", "memory.png", "memory.svg"):
        assert (tmp_path / name).stat().st_size > 500


def test_what_is_asked_first_is_measured_first(tmp_path, monkeypatch):
    asked = measured(monkeypatch)
    memory.main(out=tmp_path)
    first = len(memory.ASKED) * len(memory.SHARDINGS)
    assert {name for name, _, _ in asked[:first]} == set(memory.ASKED)
    others = [sharding for _, *sharding in asked[first:]]
    for shardings in (2, 4):  # of all others, before any of them goes on
        done = len(memory.OTHERS) * shardings
        assert all(tuple(sharding) in memory.SHARDINGS[:shardings] for sharding in others[:done])


def test_a_row_keeps_the_state_of_the_rank_that_holds_most(tmp_path, monkeypatch):
    found = row("Lion", "zero2", 2)
    found["ranks_measured"][1:] = [{"bytes": {"state": {"total": 900, "by_key": {"exp_avg": 900}}}}]
    monkeypatch.setattr(memory, "compare", lambda *_: iter([found]))
    memory.measure({"model": "m", "rows": []}, tmp_path / "memory.json", "make memory", 1)
    (written,) = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert written["state_by_key"] == {"exp_avg": 900}
    assert "ranks_measured" not in written


def test_a_file_of_another_model_is_named_and_left_alone(tmp_path):
    (tmp_path / "memory.json").write_text('{"model": "gpt2-1m", "rows": []}')
    with pytest.raises(typer.BadParameter, match=r"memory\.json is of gpt2-1m: take another --out"):
        memory.main(out=tmp_path)
    assert (tmp_path / "memory.json").read_text() == '{"model": "gpt2-1m", "rows": []}'


def test_tables_answer_how_much_less_and_say_what_stops_or_is_not_measured():
    other = {"same_training": False, "deviation": 0.97}
    table = memory.markdown(
        [
            row("torch AdamW, fused", "none", 1, 8.0),
            row("torch Adafactor", "none", 1, 0.02),
            row("torch Adafactor", "zero2", 4, 4.0, **other),
            {"optimizer": "torch Adafactor", "sharding": "fsdp2", "ranks": 2, "why": STOPS},
            {"optimizer": "torch Adafactor", "sharding": "fsdp2", "ranks": 4, "why": STOPS},
            row(memory.OURS, "none", 1, 1.0),
            row(memory.OURS, "zero2", 4, 1.0),
        ]
    ).splitlines()
    assert "| torch AdamW, fused | 8.0 (8.00) | not measured | not measured | not measured |" in table
    assert "| torch Adafactor | 0.02 (0.02) | 4.0 (4.00, 97% off) | not measured | stops |" in table
    cells = "| 0.02 | not measured | not measured | stops | 4.00, 97% off | not measured | stops | 0.50 |"
    assert f"| torch Adafactor {cells}" in table
    assert table[-1].startswith("- Not measured: bitsandbytes AdamW8bit; torchao AdamW8bit; ")
    assert table[-2] == f"- torch Adafactor under FSDP2, 2 ranks and FSDP2, 4 ranks: `{STOPS}`"
