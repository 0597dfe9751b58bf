"""torch.compile: a training step with NovoGrad in it, and the reference captured as one graph."""

import pytest
import torch
from torch import nn

from novoscale import NovoGrad, release_gradients


def train(compiled, release=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = NovoGrad(model.parameters(), lr=0.1, preset="paper")
    if release:
        release_gradients(model, optimizer)

    def step(x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    run = torch.compile(step, backend="eager") if compiled else step
    losses = [run(torch.randn(5, 8, generator=torch.Generator().manual_seed(i))).item() for i in range(4)]
    return losses, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("release", [False, True])
def test_a_compiled_training_step_gives_the_same_bits(release):
    losses, weights = train(True, release)
    expected_losses, expected = train(compiled=False)
    assert losses == expected_losses
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_a_compiled_model_has_its_gradients_released():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = NovoGrad(model.parameters(), lr=0.1, preset="paper")
    release_gradients(model, optimizer)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        compiled(torch.randn(5, 8)).square().mean().backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
