"""Shards that the tests of the Triton kernels have in common. See ``triton_fixtures`` for their fixtures."""

import torch
from against_reference import (
    Part,
    moment,
    shard,
    uniform,
    values,
)

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
OPTIONS = [
    {"group": 1, "decays": False},
    {"group": 2, "decays": True},
    {"group": 3, "decays": True, "reg_inside_moment": False},
]


def generated(seed=0):
    return torch.Generator().manual_seed(seed)


def made(numel, form, parts=None, *, param=torch.float32, grad=torch.float32, offset=0, special=0, **options):
    """A shard of numbers that nobody chose."""
    generator = generated()
    parts = [Part(0, numel, 0)] if parts is None else parts
    tensors = [values((numel,), t, generator, offset, special) for t in (param, grad)]
    exp_avg, scale = moment(form, parts, numel, generator, offset, special)
    return shard(*tensors, exp_avg, parts, scale=scale, **options)


def ones(layers):
    return uniform(layers, device=DEVICE)
