"""Parameters of odd shapes, gradients of all magnitudes, and an optimizer stepped beside the oracle."""

import numpy as np
import torch
from oracle import clipped, deviation
from torch import nn

SHAPES = [(5, 7), (7,), (3, 2, 2), (1,), (), (300, 401)]  # the last is more than one tile


def parameters(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def gradients(step, shapes=SHAPES):
    rng = np.random.default_rng(100 + step)
    return [rng.standard_normal(shape) * 10 ** rng.uniform(-3, 2) for shape in shapes]


def set_gradients(params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.as_tensor(np.asarray(g)).to(p.dtype).reshape(p.shape)
    return [p.grad.double().numpy().copy() for p in params]


def run(params, optimizer, oracle, steps=10, clip=None):
    for step in range(steps):
        grads = set_gradients(params, gradients(step))
        optimizer.step()
        oracle.step(clipped(grads, clip) if clip else grads)


def worst(params, oracle):
    return max(deviation(p.detach().double().numpy(), w) for p, w in zip(params, oracle.weights, strict=True))
