"""GPT-2 124M on a GPU: what is run next, and that a training runs, here on a tiny one."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from typer.testing import CliRunner

from benchmarks import gpt2

TINY = gpt2.Shape(vocabulary=64, context=16, width=16, layers=1, heads=2, batch=4, steps=30, held_out=4)


def result(run: gpt2.Run, loss: float | None) -> dict[str, object]:
    return {**run._asdict(), "loss": loss}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    pattern = (numpy.arange(4000) * 7 % 61).astype(numpy.uint16)
    numpy.savez_compressed(tmp_path / "tokens.npz", training=pattern, held_out=pattern[:500])
    return tmp_path / "tokens.npz"


def test_rates_are_tried_until_one_on_either_side_is_worse_then_seeds_and_formats_run_at_the_best() -> None:
    loss = {lr: abs(lr - 0.0024) for lr in (0.0003, 0.0006, 0.0012, 0.0024, 0.0048, 0.0096)}
    loss |= {lr: abs(lr - 0.005) for lr in (0.0025, 0.005, 0.01, 0.02)}
    results: list[dict[str, object]] = []
    while run := next(gpt2.missing(results), None):
        results.append(result(run, loss[run.lr]))
        assert len(results) < 50
    runs = [gpt2.Run(r["case"], r["lr"], r["seed"]) for r in results]  # type: ignore[arg-type]
    assert [r.lr for r in runs if r.case == "AdamW"] == [0.0006, 0.0012, 0.0024, 0.0048, 0.0024]
    assert [r for r in runs if r.case == "NovoGrad, adamw, int4"] == [
        gpt2.Run("NovoGrad, adamw, int4", 0.0024)
    ]
    assert {r.lr for r in runs if r.case == "NovoGrad, paper"} == {0.0025, 0.005, 0.01, 0.02}
    assert runs[-2:] == [gpt2.Run("AdamW", 0.0024, 1), gpt2.Run("NovoGrad, adamw", 0.0024, 1)]


def test_a_diverged_rate_is_worst() -> None:
    runs = [gpt2.Run("AdamW", lr) for lr in gpt2.RATES]
    results = [result(run, loss) for run, loss in zip(runs, (3.0, 2.0, None), strict=True)]
    assert gpt2.Run("AdamW", 0.0048) not in list(gpt2.missing(results))


@pytest.mark.parametrize("case", [c for c in gpt2.CASES if c != "AdamW"])
def test_a_training_learns_from_the_same_weights_each_time(case: str, data: Path) -> None:
    torch.set_num_threads(1)
    trainer = gpt2.Trainer(TINY, data, torch.device("cpu"))
    first, second = (trainer.train(gpt2.Run(case, 0.01)) for _ in range(2))
    assert first["curve"] == second["curve"]
    assert first["loss"] < first["curve"][0][1] < 4.3
    assert len(first["curve"]) == 10
    assert 0 < first["optimizer_ms"] < first["step_ms"]


def test_tokens_are_those_of_a_folders_text(tmp_path: Path) -> None:
    for n in range(25):
        (tmp_path / f"{n}.txt").write_text(f"A text, number {n}.\n\nIt has two paragraphs.\n" * 30)
    done = CliRunner().invoke(
        gpt2.app, ["tokens", str(tmp_path), "--out", str(tmp_path / "out" / "tokens.npz")]
    )
    assert done.exit_code == 0, done.output
    with numpy.load(tmp_path / "out" / "tokens.npz") as content:
        assert content["training"].dtype == numpy.uint16
        assert len(content["training"]) > 10 * len(content["held_out"]) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = CliRunner().invoke(gpt2.app, ["train"])
    assert done.exit_code == 2
