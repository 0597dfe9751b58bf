"""Parameters, the state that an Adam has collected of them, and a NovoGrad that takes it over."""

import warnings

import numpy as np
import torch
from torch import nn

from novoscale import NovoGrad

SHAPES = [(6, 10), (4, 3, 8), (7,), (1,)]
COLLECTED, FURTHER = 25, 3  # of three steps with one magnitude no sum is 0
LR = 0.02


def weights():
    rng = np.random.default_rng(5)
    return [rng.standard_normal(shape) for shape in SHAPES]


def parameters(dtype=torch.float32):
    return [nn.Parameter(torch.tensor(w, dtype=dtype)) for w in weights()]


def exact():
    """In float64, so that a deviation is not one of the weights' last bits; v is in float32 all the same."""
    return parameters(torch.float64)


def state_dict_of_adam(gradients, betas=(0.9, 0.98), params=None, kind=torch.optim.AdamW, **options):
    """The state dict of torch's Adam after steps that changed no weight."""
    params = params or parameters()
    optimizer = kind(params, lr=0.0, betas=betas, **{"weight_decay": 0.0, **options})
    for grads in gradients:
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.tensor(g, dtype=p.dtype)
        optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = LR
    return saved


def taken_over(saved, params=None, **options):
    optimizer = NovoGrad(
        params or parameters(), **{"preset": "paper", "lr": LR, "allow_lossy_load": True, **options}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        optimizer.load_state_dict(saved)
    return optimizer


def changing_gradients(steps=COLLECTED):
    rng = np.random.default_rng(1)
    return [[rng.standard_normal(s) * 10 ** rng.uniform(-2, 1) for s in SHAPES] for _ in range(steps)]
