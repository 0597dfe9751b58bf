"""What the tests of torch's promises share: sets of options, implementations, and a small problem."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn

from novoscale import NovoGrad, kernels

OPTIONS = {
    "paper": {},
    "lr": {"lr": 0.01},
    "tensor lr": {"lr": torch.tensor(0.001)},
    "decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "maximize, decay": {"maximize": True, "weight_decay": 0.1},
    "no first moment": {"betas": (0.0, 0.98)},
    "no moments": {"betas": (0.0, 0.0)},
    "bias correction": {"bias_correction": True, "grad_averaging": True},
    "start at zero": {"init_zero": True},
    "largest magnitude": {"norm_type": 0},
    "outside the moment": {"reg_inside_moment": False, "weight_decay": 0.1},
    "clipped": {"max_grad_norm": 1.0},
    "rows": {"granularity": "row", "normalize": "rms"},
    "clipped update": {"normalize": "rms", "clip_threshold": 1.0, "scale_parameter": True},
    "nesterov": {"nesterov": True},
    "bfloat16": {"momentum_dtype": "bfloat16"},
    "int8": {"momentum_dtype": "int8"},
    "int4": {"momentum_dtype": "int4", "granularity": "row"},
    "adamw": {"preset": "adamw", "weight_decay": 0.1},
    "adamw, int8": {"preset": "adamw", "momentum_dtype": "int8"},
}
IMPLEMENTATIONS = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}

needs_compiler = pytest.mark.skipif(kernels.fused("cpu") is None, reason="no C++ compiler")
each_implementation = pytest.mark.parametrize(
    "implementation",
    [pytest.param(name, marks=needs_compiler if name == "fused" else ()) for name in IMPLEMENTATIONS],
)


def everywhere(test):
    """Run a test with each set of options, in each implementation."""
    return each_implementation(pytest.mark.parametrize("options", OPTIONS)(test))


def options_of(options, implementation):
    # A scheduler or a test may change an lr that is a tensor in place.
    return copy.deepcopy(OPTIONS[options]) | IMPLEMENTATIONS[implementation]


class Problem:
    """A matrix large enough for the formats in blocks, a vector, and a loss with one minimum."""

    def __init__(self, contiguous=True):
        random = torch.Generator().manual_seed(0)
        make = partial(torch.randn, generator=random)
        if contiguous:
            self.weight, self.bias = nn.Parameter(make(64, 65)), nn.Parameter(make(64))
        else:
            self.weight, self.bias = nn.Parameter(make(64, 65, 2)[..., 0]), nn.Parameter(make(64, 2)[..., 0])
        self.input = make(65)

    @property
    def params(self):
        return [self.weight, self.bias]

    @property
    def named(self):
        return [("weight", self.weight), ("bias", self.bias)]

    def loss(self):
        """With new gradients."""
        for p in self.params:
            p.grad = None
        loss = (self.weight.mv(self.input) + self.bias).square().sum()
        loss.backward()
        return loss

    def train(self, optimizer, steps=3):
        for _ in range(steps):
            optimizer.step(self.loss)
        return self

    def same_bits(self, other):
        return all(torch.equal(a, b) for a, b in zip(self.params, other.params, strict=True))

    def twin(self):
        return copy.deepcopy(self)


def trained(options, implementation, steps=3):
    problem = Problem()
    optimizer = NovoGrad(problem.params, **{"preset": "paper", **options_of(options, implementation)})
    problem.train(optimizer, steps)
    return problem, optimizer


def through_file(state_dict):
    """Saved, and loaded as torch.load does by default: tensors and plain values only."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(found, expected):
    """Two state dicts, to the bit."""
    torch.testing.assert_close(found["state"], expected["state"], rtol=0, atol=0)
    assert found["param_groups"] == expected["param_groups"]
