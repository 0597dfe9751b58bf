"""Each row of docs/coming-from.md against a transcription of that implementation's equations.

Transcribed from the sources at the revisions that the project's notes name: NVIDIA/apex 6424da3b, NeMo
8cfedd72, timm aa4b5850, MONAI d388d1c6, DeepLearningExamples 729963dd, optax 2edbcbe2, flashlight;
torch_optimizer 0.3.0 and pytorch_optimizer 4.1.0. NumPy
float64, one tensor; none shares code with the package or with another.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import deviation

from novoscale import NovoGrad

WEIGHT_DECAY = 0.03
STEPS = 12


def learning_rate(step):
    return 0.05 / (1 + 0.3 * step)


class Apex:
    def __init__(self, reg_inside_moment=False, norm_type=2, init_zero=False):
        self.inside, self.norm_type, self.init_zero = reg_inside_moment, norm_type, init_zero
        self.t, self.norm, self.m = 0, None, 0.0

    def __call__(self, p, g, lr):
        beta1, beta2, eps = 0.9, 0.999, 1e-8
        now = np.sqrt((g * g).sum()) if self.norm_type == 2 else np.abs(g).max()
        self.t += 1
        if self.norm is None:
            self.norm = 0.0 if self.init_zero else now
        if self.norm_type == 2:
            self.norm = np.sqrt(beta2 * self.norm**2 + (1 - beta2) * now**2)
        else:
            self.norm = beta2 * self.norm + (1 - beta2) * now
        c1, c2 = 1 - beta1**self.t, np.sqrt(1 - beta2**self.t)
        denominator = self.norm / c2 + eps
        if self.inside:
            self.m = beta1 * self.m + (1 - beta1) * (g / denominator + WEIGHT_DECAY * p)
            return p - lr * self.m / c1
        self.m = beta1 * self.m + (1 - beta1) * g
        return p - lr * (self.m / c1 / denominator + WEIGHT_DECAY * p)


class Jasper:
    """The code that NeMo, timm, MONAI and DeepLearningExamples have from NVIDIA's Jasper."""

    def __init__(self, betas, grad_averaging=False):
        self.betas, self.averaging = betas, grad_averaging
        self.exp_avg, self.exp_avg_sq = 0.0, 0.0

    def __call__(self, p, g, lr):
        norm = np.square(g).sum()
        if self.exp_avg_sq == 0:
            self.exp_avg_sq = norm
        else:
            self.exp_avg_sq = self.exp_avg_sq * self.betas[1] + (1 - self.betas[1]) * norm
        g = g / (np.sqrt(self.exp_avg_sq) + 1e-8)
        g = g + WEIGHT_DECAY * p
        if self.averaging:
            g = g * (1 - self.betas[0])
        self.exp_avg = self.exp_avg * self.betas[0] + g
        return p - lr * self.exp_avg


class Optax:
    def __init__(self):
        self.count, self.mu, self.nu = 0, None, None

    def __call__(self, p, g, lr):
        self.count += 1
        power = np.linalg.norm(g.ravel()) ** 2
        self.nu = power if self.count == 1 else 0.25 * self.nu + 0.75 * power
        update = g / (np.sqrt(self.nu + 0.0) + 1e-6) + WEIGHT_DECAY * p
        self.mu = update if self.count == 1 else 0.9 * self.mu + update
        return p - lr * self.mu


class Flashlight:
    def __init__(self):
        self.norm, self.acc = 0.0, 0.0

    def __call__(self, p, g, lr):
        self.norm = 0.98 * self.norm + (1 - 0.98) * float((g * g).sum())
        self.acc = 0.95 * self.acc + (1 - 0.95) * (g / (np.sqrt(self.norm) + 1e-8) + WEIGHT_DECAY * p)
        return p - lr * self.acc


IMPLEMENTATIONS = {
    ("Apex", "its defaults"): Apex,
    ("Apex", "reg_inside_moment=True"): lambda: Apex(reg_inside_moment=True),
    ("Apex", "norm_type=0"): lambda: Apex(norm_type=0),
    ("Apex", "init_zero=True"): lambda: Apex(init_zero=True),
    ("NeMo", "its defaults (no LUC)"): lambda: Jasper((0.95, 0.98)),
    ("NeMo", "grad_averaging=True"): lambda: Jasper((0.95, 0.98), grad_averaging=True),
    ("timm", "its defaults"): lambda: Jasper((0.95, 0.98)),
    ("MONAI", "its defaults"): lambda: Jasper((0.9, 0.98)),
    ("DeepLearningExamples", "its defaults"): lambda: Jasper((0.95, 0.0)),
    ("torch_optimizer", "its defaults"): lambda: Jasper((0.95, 0.0)),
    ("pytorch_optimizer", "its defaults"): lambda: Jasper((0.95, 0.98)),
    ("optax", "its defaults"): Optax,
    ("flashlight", "its defaults"): Flashlight,
}


def documented():
    """(implementation, its options) -> the keyword arguments that the docs say reproduce it."""
    page = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text()
    rows = re.findall(r"^\| (\w+) .*?\| (.*?) \| `(.*?)` \|$", page, re.MULTILINE)
    return {(name, its.strip("`")): eval(f"dict({use})") for name, its, use in rows}


def test_every_row_has_a_transcription_and_every_transcription_a_row():
    assert documented().keys() == IMPLEMENTATIONS.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("row", IMPLEMENTATIONS, ids=lambda row: " ".join(row))
def test_documented_arguments_reproduce(row, dtype):
    rng = np.random.default_rng(3)
    theirs = {name: rng.standard_normal(shape) for name, shape in (("a", (7, 5)), ("b", (11,)))}
    ours = {name: torch.tensor(p, dtype=dtype, requires_grad=True) for name, p in theirs.items()}
    implementations = {name: IMPLEMENTATIONS[row]() for name in theirs}
    optimizer = NovoGrad(ours.values(), weight_decay=WEIGHT_DECAY, **{"preset": "paper", **documented()[row]})
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        for name, p in theirs.items():
            g = rng.standard_normal(p.shape) * 10 ** rng.uniform(-2, 1)
            ours[name].grad = torch.tensor(g, dtype=dtype)
            g = ours[name].grad.double().numpy()  # as rounded to the dtype
            theirs[name] = implementations[name](p, g, learning_rate(step))
        optimizer.step()
    for name, p in theirs.items():
        assert deviation(ours[name].detach().numpy(), p) < 1e-6
