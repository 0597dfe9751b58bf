"""Models and data that no two runs can share: ``novoscale verify`` names what is wrong with them."""

import torch
from torch import nn


def made(weight=None, requires_grad=True, rows=None):
    """A model of one layer and its data."""
    model = nn.Linear(5, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.ones(3, 5) if weight is None else weight)
    model.requires_grad_(requires_grad)
    return model, rows or (lambda step, samples: {"x": torch.full((samples, 5), float(step))})


def other_weights():
    return made(weight=torch.randn(3, 5))


def frozen():
    return made(requires_grad=False)


def too_few_rows():
    return made(rows=lambda step, samples: {"x": torch.ones(2, 5)})


def no_tensor():
    return made(rows=lambda step, samples: {"x": [1.0] * samples})


def other_data():
    return made(rows=lambda step, samples: {"x": torch.randn(samples, 5)})


def fails():
    return made(rows=lambda step, samples: {"x": torch.ones(samples, 1 // 0)})
