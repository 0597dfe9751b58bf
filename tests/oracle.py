"""NovoGrad in NumPy float64, written from the paper's equations. Shares no code with the package."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray


@dataclass
class Oracle:
    """Algorithm 1 of arXiv 1905.11286 on a list of layers, with the options of one param group."""

    weights: list[Array]
    lr: float
    betas: tuple[float, float] = (0.95, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_averaging: bool = False
    init_zero: bool = False
    norm_type: int = 2
    maximize: bool = False
    normalize: str = "norm"
    v: list[float] = field(default_factory=list)
    m: list[Array] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights = [np.array(w, dtype=np.float64) for w in self.weights]
        self.v = [0.0 for _ in self.weights]
        self.m = [np.zeros_like(w) for w in self.weights]

    def step(self, grads: list[Array]) -> None:
        beta1, beta2 = self.betas
        for i, grad in enumerate(grads):
            g = np.asarray(grad, dtype=np.float64) * (-1 if self.maximize else 1)
            statistic = (g**2).sum() if self.norm_type == 2 else np.abs(g).max(initial=0.0)
            if self.v[i] == 0 and statistic == 0:
                continue
            if self.v[i] == 0 and not self.init_zero:
                self.v[i] = statistic
            else:
                self.v[i] = beta2 * self.v[i] + (1 - beta2) * statistic
            norm = np.sqrt(self.v[i]) if self.norm_type == 2 else self.v[i]
            if self.normalize == "rms":
                norm = norm / np.sqrt(g.size)
            new = g / (norm + self.eps) + self.weight_decay * self.weights[i]
            self.m[i] = beta1 * self.m[i] + (1 - beta1 if self.grad_averaging else 1) * new
            self.weights[i] = self.weights[i] - self.lr * self.m[i]


class RowOracle:
    """The same for parameters of which each row of a matrix is a layer (or each of ``splits`` slices)."""

    def __init__(self, weights: list[Array], splits: int | None = None, **options: Any) -> None:
        whole = [np.array(w, dtype=np.float64) for w in weights]
        self.counts = [splits or (len(w) if w.ndim > 1 else 1) for w in whole]
        self.shapes = [w.shape for w in whole]
        self.inner = Oracle(self._cut(whole), **options)

    def _cut(self, arrays: list[Array]) -> list[Array]:
        return [
            part
            for a, n in zip(arrays, self.counts, strict=True)
            for part in (np.split(np.asarray(a), n) if n > 1 else [np.asarray(a)])
        ]

    def step(self, grads: list[Array]) -> None:
        self.inner.step(self._cut(grads))

    @property
    def weights(self) -> list[Array]:
        parts = iter(self.inner.weights)
        rows = zip(self.counts, self.shapes, strict=True)
        return [np.stack([next(parts) for _ in range(n)]).reshape(shape) for n, shape in rows]


def clipped(grads: list[Array], max_norm: float) -> list[Array]:
    """As torch.nn.utils.clip_grad_norm_."""
    norm = np.sqrt(sum((g**2).sum() for g in grads))
    return [g * min(1.0, max_norm / (norm + 1e-6)) for g in grads]


def deviation(value: Array, reference: Array) -> float:
    """The largest difference, relative to the largest magnitude of the reference."""
    value, reference = np.asarray(value, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    return float(np.abs(value - reference).max(initial=0) / max(np.abs(reference).max(initial=0), 1e-30))
