"""benchmarks/released_step.py times the same work with and without release."""

import torch

from benchmarks import released_step


def test_the_optimizer_is_timed_in_both(monkeypatch):
    stepped = {"calls": 0}
    original = released_step.NovoGrad.step_some

    def step_some(self, tensors):
        stepped["calls"] += 1
        original(self, tensors)

    monkeypatch.setattr(released_step.NovoGrad, "step_some", step_some)
    found = released_step.measure("builtin", torch.float32, {}, rounds=1)
    assert stepped["calls"] > 2 * 3 * 2  # several in each backward pass
    assert 0 < found["step_ms"] < 1e4
    assert found["ratio"] == found["released_ms"] / found["step_ms"]
    assert found["training_step_ratio"] > 0
