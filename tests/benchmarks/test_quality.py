"""The comparison of optimizers runs what is missing, and trains what it says."""

import pytest

from benchmarks import plots, quality
from benchmarks.quality import SEEDS, Case, Setting, _missing


@pytest.fixture
def cases(monkeypatch):
    found = [Case("a", (0.1, 0.2)), Case("b", (1.0,), {"momentum_dtype": "int4"}, rows=True)]
    monkeypatch.setattr(quality, "SETS", {"few": Setting(found, steps=3, batch=2)})
    return found


def test_every_learning_rate_has_one_seed_and_the_best_of_them_all(cases):
    runs, order = [], []
    while missing := _missing(runs, ["few"]):
        order.append([(case.name, lr, seed) for _, case, lr, seed in missing])
        runs += [
            {"set": group, "case": case.name, "lr": lr, "seed": seed, "loss": abs(lr - 0.2)}
            for group, case, lr, seed in missing
        ]
    assert order[0] == [("a", 0.1, 0), ("a", 0.2, 0), ("b", 1.0, 0)]
    assert order[1:] == [[(name, lr, seed) for seed in SEEDS[1:] for name, lr in (("a", 0.2), ("b", 1.0))]]
    assert plots.losses({"runs": runs}, "few", "a") == {0.1: [0.1], 0.2: [0.0] * 3}


def test_a_run_is_the_same_each_time_and_another_with_another_seed(cases):
    losses = [quality.train("few", cases[1], 0.01, seed)["loss"] for seed in (0, 0, 1)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    assert all(1 < loss < 7 for loss in losses)
