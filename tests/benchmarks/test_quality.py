"""The comparison of optimizers runs what is missing, and trains what it says."""

import pytest

from benchmarks import quality, tables
from benchmarks.quality import DECAY, LONG, Case, Run, missing


@pytest.fixture
def cases(monkeypatch):
    """Few steps, of few windows."""
    found = [
        Case("gpt2", "a", long=True, seeds=2),
        Case("gpt2", "b", options={"momentum_dtype": "int4"}, rate_of="a"),
    ]
    for name, value in {"CASES": found, "STEPS": 3, "BATCH": 2}.items():
        monkeypatch.setattr(quality, name, value)
    return found


def results_of(runs, best):
    """Made-up results of which one learning rate has the best."""
    return [{**run._asdict(), "loss": abs(run.lr - best)} for run in runs]


@pytest.mark.parametrize(("best", "tried"), [(0.001, 4), (0.008, 6), (0.0001, 7)])
def test_learning_rates_are_added_until_the_best_is_inside_of_them(cases, best, tried):
    results = []
    while all(run.steps < LONG for run in missing(results, cases[:1])):
        results += results_of(missing(results, cases[:1]), best)
    rates = sorted(r["lr"] for r in results)
    chosen = min(rates, key=lambda lr: abs(lr - best))
    assert len(rates) == tried
    assert rates[0] < chosen < rates[-1]


def test_the_best_rate_has_weight_decay_and_seeds_and_a_long_run_and_the_formats_have_it_too(cases):
    results = []
    while runs := list(missing(results, cases)):
        results += results_of(runs, 0.002)
    others = {Run(*(r[f] for f in Run._fields)) for r in results if r["lr"] == 0.002}
    assert others == {
        Run("gpt2", "a", 0.002),
        Run("gpt2", "a", 0.002, seed=1),
        Run("gpt2", "a", 0.002, weight_decay=DECAY),
        Run("gpt2", "a", 0.002, steps=LONG),
        *(Run("gpt2", "b", 0.002, seed=seed) for seed in (0, 1, 2)),
    }
    assert {r["case"] for r in results if r["lr"] != 0.002} == {"a"}


def test_a_run_that_diverged_is_the_worst(cases):
    results = results_of(missing([], cases), 0.001)
    next(r for r in results if r["lr"] == 0.001)["loss"] = None
    assert quality.best_rate(cases[0], quality.by_run(results)) == 0.0005


def test_the_table_has_a_row_for_each_case_that_was_run(cases, capsys):
    results = results_of(missing([], cases), 0.002)
    quality.show({"runs": results}, tables.console(200))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    a, b = ([cell.strip() for cell in line.split("│")[1:-1]] for line in lines)
    assert a[1].endswith("0.001: 0.001 0.002: 0.000 0.004: 0.002")
    assert a[:1] + a[2:] == ["a", "0.002", "0.000", "0.000", "0.000", "1", "-", "-"]
    assert b == ["b", "-", "0.002", "-", "-", "-", "0", "-", "-"]


def test_a_run_is_the_same_each_time_and_another_with_another_seed(cases):
    losses = [quality.train(Run("gpt2", "b", 0.01, seed, steps=3))["loss"] for seed in (0, 0, 1)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    assert all(1 < loss < 7 for loss in losses)


@pytest.mark.parametrize("case", {c.kind: c for c in quality.CASES[::-1]}.values(), ids=lambda c: c.kind)
def test_each_optimizer_trains_and_is_what_its_case_says(case):
    if case.kind in ("Lion", "AdamMini"):
        pytest.importorskip("pytorch_optimizer")
    if case.kind == "AdamW8bit":
        pytest.importorskip("bitsandbytes")
    model = quality.MODELS[case.model]()
    optimizer = quality.make_optimizer(case, model, Run(case.model, case.name, 0.001, weight_decay=DECAY))
    assert type(optimizer).__name__ == {"Muon": "MuonWithAdamW"}.get(case.kind, case.kind)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, DECAY}
