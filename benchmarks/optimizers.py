"""The optimizers that the benchmarks compare, by name: how to make each, and what it moves and needs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LR = 1e-3


@dataclass(frozen=True)
class Candidate:
    """An optimizer to measure.

    Attributes:
        path: ``module:Class``.
        options: keyword arguments.
        devices: types of device on which it runs.
        moved: of weight, gradient and state how often an element is read or written in a step without
            clipping; None where that depends on the shape.
        state_bytes: of an element of state; None: as the weight.
        clips: the option that clips by the global norm in the step, if it has one.
        package: what to install.
    """

    path: str
    options: dict[str, Any]
    devices: tuple[str, ...] = ("cpu", "cuda")
    moved: tuple[int, int, int] | None = None
    state_bytes: float | None = None
    clips: str | None = None
    package: str = "torch"

    def make(self, params: Sequence[Tensor], clip: float | None) -> torch.optim.Optimizer:
        """The optimizer; raises ImportError where its package is not installed."""
        module, name = self.path.split(":")
        options = {**self.options, **({self.clips: clip} if clip and self.clips else {})}
        made: torch.optim.Optimizer = getattr(importlib.import_module(module), name)(params, **options)
        return made

    def bytes_moved(self, elements: int, size: int, clip: bool) -> float | None:
        """By count, with weights and gradients of ``size`` bytes.

        Clipping from outside reads the gradient twice and writes it once.
        """
        if self.moved is None:
            return None
        weight, grad, state = self.moved
        outside = 3 if clip and self.clips is None else 0
        of_state = size if self.state_bytes is None else self.state_bytes
        return elements * ((weight + grad + outside) * size + state * of_state)


def _novograd(**options: Any) -> Candidate:
    return Candidate(
        "novoscale:NovoGrad", {"lr": LR, **options}, moved=(2, 2, 2), state_bytes=4, clips="max_grad_norm"
    )


CUDA = ("cuda",)
CANDIDATES: dict[str, Candidate] = {
    "NovoGrad": _novograd(),
    "NovoGrad, reference": _novograd(fused=False),
    "torch AdamW, fused": Candidate("torch.optim:AdamW", {"lr": LR, "fused": True}, moved=(2, 1, 4)),
    "torch AdamW, foreach": Candidate("torch.optim:AdamW", {"lr": LR, "foreach": True}),
    "torch SGD with momentum, fused": Candidate(
        "torch.optim:SGD", {"lr": LR, "momentum": 0.9, "fused": True}, moved=(2, 1, 2)
    ),
    "torch Adafactor": Candidate("torch.optim:Adafactor", {"lr": LR}),
    "DeepSpeed CPUAdam": Candidate(
        "deepspeed.ops.adam:DeepSpeedCPUAdam",
        {"lr": LR},
        ("cpu",),
        moved=(2, 1, 4),
        state_bytes=4,
        package="deepspeed",
    ),
    "DeepSpeed FusedAdam": Candidate(
        "deepspeed.ops.adam:FusedAdam", {"lr": LR}, CUDA, moved=(2, 1, 4), package="deepspeed"
    ),
    "Apex FusedNovoGrad": Candidate("apex.optimizers:FusedNovoGrad", {"lr": LR}, CUDA, package="apex"),
    "Apex FusedAdam": Candidate("apex.optimizers:FusedAdam", {"lr": LR}, CUDA, package="apex"),
    "bitsandbytes AdamW8bit": Candidate(
        "bitsandbytes.optim:AdamW8bit", {"lr": LR}, CUDA, package="bitsandbytes"
    ),
    "torchao AdamW8bit": Candidate("torchao.optim:AdamW8bit", {"lr": LR}, CUDA, package="torchao"),
    "flashoptim AdamW": Candidate("flashoptim:FlashAdamW", {"lr": LR}, CUDA, package="flashoptim"),
    "gefen-x": Candidate("gefen:Gefen", {"lr": LR}, CUDA, package="gefen-x"),
}
