"""torch.compile: a training step with NovoGrad in it, and the reference captured as one graph."""

import torch
from torch import nn

from novoscale import NovoGrad
from novoscale.kernels import Coefficients, Shard, reference
from novoscale.layout import Segment


def train(compiled):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = NovoGrad(model.parameters(), lr=0.1)

    def step(x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    run = torch.compile(step, backend="eager") if compiled else step
    losses = [run(torch.randn(5, 8, generator=torch.Generator().manual_seed(i))).item() for i in range(4)]
    return losses, [p.detach() for p in model.parameters()]


def test_a_compiled_training_step_gives_the_same_bits():
    losses, weights = train(compiled=True)
    expected_losses, expected = train(compiled=False)
    assert losses == expected_losses
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_the_reference_is_captured_in_one_graph():
    def both(shards, scale):
        statistic = reference.sum_of_squares(shards, torch.device("cpu"), 2)
        reference.update(shards, Coefficients(scale, scale, scale, statistic > 0))
        return statistic

    def shards():
        torch.manual_seed(0)
        tensors = [torch.randn(10) for _ in range(3)]
        return [Shard(*tensors, (Segment(0, 3, 0), Segment(4, 9, 1)), 0, 2, 0.9, 1.0, 0.1, True)]

    scale = torch.full((2,), 0.3, dtype=torch.float64)
    one, other = shards(), shards()
    found = torch.compile(both, fullgraph=True, backend="aot_eager")(one, scale)
    assert torch.equal(found, both(other, scale))
    assert torch.equal(one[0].param, other[0].param)
    assert torch.equal(one[0].exp_avg, other[0].exp_avg)
