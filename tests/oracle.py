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
        self.inner = Oracle(self._sharding(whole), **options)

    def _sharding(self, arrays: list[Array]) -> list[Array]:
        return [
            part
            for a, n in zip(arrays, self.counts, strict=True)
            for part in (np.split(np.asarray(a), n) if n > 1 else [np.asarray(a)])
        ]

    def step(self, grads: list[Array]) -> None:
        self.inner.step(self._sharding(grads))

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


class FactoredOracle:
    """granularity="factored" in NumPy float64, from the equations of Adafactor (1804.04235) and of NAdam.

    A parameter of two dimensions or more is a matrix; a vector has a second moment for each element. One
    whose second moment has only seen zeros is left as it is; steps are counted from the first gradient
    of the parameter that is not all zero.
    """

    def __init__(
        self,
        weights: list[Array],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        grad_averaging: bool = True,
        init_zero: bool = True,
        nesterov: bool = True,
        maximize: bool = False,
        reg_inside_moment: bool = True,
        clip_threshold: float | None = None,
        scale_parameter: bool = False,
    ) -> None:
        self.options = locals()
        self.weights = [np.array(w, dtype=np.float64) for w in weights]
        self.t = [0 for _ in weights]
        self.m = [np.zeros_like(w) for w in self.weights]
        self.r, self.c = [], []
        for w in self.weights:
            rows, columns = self._matrix(w).shape
            self.r.append(np.zeros(rows))
            self.c.append(np.zeros(columns))

    @staticmethod
    def _matrix(a: Array) -> Array:
        a = np.asarray(a, dtype=np.float64)
        if a.ndim < 2:
            return a.reshape(-1, 1)  # a row for each element: its second moment is the row's
        sizes = [int(np.prod(a.shape[:k])) for k in range(1, a.ndim)]
        return a.reshape(min(sizes, key=lambda n: n + a.size // n), -1)

    def step(self, grads: list[Array]) -> None:
        for i, grad in enumerate(grads):
            self._step(i, np.asarray(grad, dtype=np.float64))

    def _step(self, i: int, grad: Array) -> None:
        o = self.options
        beta1, beta2 = o["betas"]
        vector = self.weights[i].ndim < 2
        g = self._matrix(-grad if o["maximize"] else grad)
        w = self._matrix(self.weights[i])
        m = self._matrix(self.m[i])
        self.r[i] = self._average(self.r[i], (g**2).mean(axis=1))
        self.c[i] = self._average(self.c[i], (g**2).mean(axis=0))
        if self.r[i].max(initial=0) == 0:
            return
        self.t[i] += 1
        t = self.t[i] if o["bias_correction"] else None
        r, c = self.r[i][:, None], self.c[i][None, :]
        with np.errstate(invalid="ignore", divide="ignore"):
            v = r + 0 * c if vector else r * c / r.mean()
            v = v / (1 - beta2**t if t else 1)
            root = np.sqrt(v) + o["eps"]
            known = (r > 0) & (c > 0)
            u = g if not o["reg_inside_moment"] else np.where(known, g / root, 0.0)
            if o["clip_threshold"]:
                corrected = self.r[i] / (1 - beta2**t if t else 1)
                mean_square = np.where(self.r[i] > 0, (g**2).mean(axis=1) / corrected, 0.0).mean()
                u = u / max(1.0, np.sqrt(mean_square) / o["clip_threshold"])
            if o["scale_parameter"]:
                u = u * max(1e-3, np.sqrt((w**2).mean()))
            n = u + (o["weight_decay"] * w if o["reg_inside_moment"] else 0.0)
            beta3 = 1 - beta1 if o["grad_averaging"] else 1.0
            new_m = beta1 * m + beta3 * n
            one, two = (1 - beta1**t, 1 - beta1 ** (t + 1)) if t else (1.0, 1.0)
            direction = beta1 * new_m / two + beta3 * n / one if o["nesterov"] else new_m / one
            if not o["reg_inside_moment"]:
                direction = direction / root + o["weight_decay"] * w
        self.m[i] = np.where(known, new_m, m).reshape(self.weights[i].shape)
        self.weights[i] = np.where(known, w - o["lr"] * direction, w).reshape(self.weights[i].shape)

    def _average(self, v: Array, new: Array) -> Array:
        beta2 = self.options["betas"][1]
        average = beta2 * v + (1 - beta2) * new
        return average if self.options["init_zero"] else np.where(v == 0, new, average)


def orthogonal(matrix: Array, steps: int = 5) -> Array:
    """Newton and Schulz on the singular values of a matrix, which keeps its singular vectors."""
    u, s, v = np.linalg.svd(np.asarray(matrix, dtype=np.float64), full_matrices=False)
    s = s / max(np.sqrt((s**2).sum()), 1e-30)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ v


@dataclass
class MuonOracle:
    """One scalar second moment for each matrix, and an orthogonal direction, in NumPy float64.

    The layers of a parameter are ``layers`` equal parts of it; each is a matrix, its first dimension by all
    others, or without the first where that has one index.
    """

    weights: list[Array]
    lr: float
    betas: tuple[float, float] = (0.95, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.0
    nesterov: bool = True
    maximize: bool = False
    layers: int = 1
    steps: int = 5
    row_normalize: bool = False

    def __post_init__(self) -> None:
        self.weights = [np.array(w, dtype=np.float64) for w in self.weights]
        self.m = [np.zeros_like(w) for w in self.weights]
        self.v = [np.zeros(self.layers) for _ in self.weights]
        self.t = [np.zeros(self.layers) for _ in self.weights]
        self.rows: dict[tuple[int, int], Array] = {}

    def step(self, grads: list[Array]) -> None:
        for i, grad in enumerate(grads):
            g = np.asarray(grad, dtype=np.float64) * (-1 if self.maximize else 1)
            for layer in range(self.layers):
                size = len(g) // self.layers
                self._step(i, layer, slice(layer * size, (layer + 1) * size), g)

    def _step(self, i: int, layer: int, own: slice, grad: Array) -> None:
        beta1, beta2 = self.betas
        g = grad[own]
        self.v[i][layer] = beta2 * self.v[i][layer] + (1 - beta2) * (g**2).mean()
        if self.v[i][layer] == 0:
            return
        self.t[i][layer] += 1
        t = self.t[i][layer]
        u = g / (np.sqrt(self.v[i][layer] / (1 - beta2**t)) + self.eps)
        self.m[i][own] = beta1 * self.m[i][own] + (1 - beta1) * u
        n = beta1 * self.m[i][own] + (1 - beta1) * u if self.nesterov else self.m[i][own]
        rows = n.shape[1] if len(n) == 1 and n.ndim > 2 else len(n)
        direction = n.reshape(rows, -1)
        direction = orthogonal(direction, self.steps)
        if self.row_normalize:
            mean_square = (direction**2).mean(axis=1)
            self.rows[i, layer] = 0.95 * self.rows.get((i, layer), 0) + 0.05 * mean_square
            normalized = direction / np.sqrt(self.rows[i, layer] / (1 - 0.95**t))[:, None]
            direction = normalized * np.linalg.norm(direction) / np.linalg.norm(normalized)
        direction = 0.2 * np.sqrt(max(direction.shape)) * direction
        change = direction.reshape(n.shape) + self.weight_decay * self.weights[i][own]
        self.weights[i][own] = self.weights[i][own] - self.lr * change
