"""Shared by the comparisons of optimizers: how an optimizer is made, which rates are tried, which is best."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from novoscale import NovoGrad, param_groups

Key = TypeVar("Key")

BETAS = (0.9, 0.98)
# With all of its momentum_decay over at once, torch's NAdam has a constant beta1 (Dozat 2016).
NADAMW = {"betas": BETAS, "momentum_decay": 1e9, "decoupled_weight_decay": True}
# The classes that are not in torch.optim.
ELSEWHERE = {
    "NovoGrad": "novoscale",
    "Lion": "pytorch_optimizer",
    "AdamMini": "pytorch_optimizer",
    "AdamW8bit": "bitsandbytes.optim",
}


def make_optimizer(
    kind: str, model: nn.Module, weight_decay: float, seed: int = 0, **options: Any
) -> torch.optim.Optimizer:
    """An optimizer of what is trained of a model, with weight decay on matrices only.

    Args:
        kind: its class, of torch.optim or of ELSEWHERE.
        model: whose parameters it has; AdamMini takes the model itself, and decides what decays.
        weight_decay: of parameters that have rows and columns.
        seed: of what NovoGrad rounds by chance.
        options: its other keyword arguments.

    Raises:
        ImportError: the package of its class is not installed.
    """
    made = getattr(importlib.import_module(ELSEWHERE.get(kind, "torch.optim")), kind)
    if kind == "AdamMini":
        if (config := getattr(model, "config", None)) is not None:  # of transformers: AdamMini goes by heads
            heads = {"num_embeds": config.hidden_size, "num_heads": config.num_attention_heads}
            options = {**heads, **options}
        return made(model, weight_decay=weight_decay, **options)
    if kind == "NovoGrad":
        options["seed"] = seed
        if options.get("preset") == "muon":
            return _novograd_muon(model, weight_decay, **options)
    if kind == "Muon":
        return MuonWithAdamW(model, weight_decay=weight_decay, **options)
    return made(_decayed([p for p in model.parameters() if p.requires_grad], weight_decay), **options)


def _decayed(params: Sequence[torch.Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Param groups with weight decay on matrices only."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon for the matrices of hidden layers, and torch's AdamW for all else.

    Args:
        model: whose parameters are trained.
        lr: of AdamW.
        ratio: how many times that Muon has, whose steps have the root mean square of AdamW's.
        betas: of AdamW.
        weight_decay: of matrices.
    """

    def __init__(
        self, model: nn.Module, lr: float, ratio: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        groups = param_groups(model, preset="muon")
        hidden, others = (
            [p for group in groups if group["orthogonalize"] == is_hidden for p in group["params"]]
            for is_hidden in (True, False)
        )
        muon = torch.optim.Muon(
            hidden, lr=ratio * lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self._parts = muon, torch.optim.AdamW(_decayed(others, weight_decay), lr=lr, betas=betas)
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> None:
        """Take a step of both."""
        for part in self._parts:
            part.step()


def _novograd_muon(
    model: nn.Module,
    weight_decay: float,
    lr: float,
    ratio: float | None = None,
    others: str | None = None,
    **options: Any,
) -> NovoGrad:
    """NovoGrad with orthogonal directions for the matrices of hidden layers.

    Args:
        model: whose parameters are trained.
        weight_decay: of matrices.
        lr: of all else.
        ratio: how many times that the matrices have; None: what the preset has.
        others: the preset of all else; None: the same.
        options: NovoGrad's.
    """
    exclude = None if any(isinstance(m, nn.Embedding) for m in model.modules()) else [_last_layer(model)]
    groups = param_groups(model, weight_decay=weight_decay, preset="muon", others=others, exclude=exclude)
    for group in groups:
        if ratio is not None and group["orthogonalize"]:
            group["lr"] = ratio * lr
    return NovoGrad(groups, lr=lr, **options)


def _last_layer(model: nn.Module) -> str:
    """A pattern for the last matrix of a model, which is its head."""
    return [name for name, p in model.named_parameters() if p.ndim > 1][-1]


def rates(
    first: Sequence[float], loss: Callable[[float], float | None], either_side: int, most: int
) -> list[float]:
    """The learning rates to try, as far as what is known tells.

    Args:
        first: those to begin with; others are halves of the lowest and doubles of the highest.
        loss: of a rate; None before it has been tried.
        either_side: how many that are worse have to be on either side of the best.
        most: how many there are at most.
    """
    found = sorted(first)
    while len(found) < most:
        known = [loss(lr) for lr in found]
        if None in known:
            break
        best = known.index(min(known))
        if best < either_side:
            found.insert(0, found[0] / 2)
        elif len(found) - 1 - best < either_side:
            found.append(found[-1] * 2)
        else:
            break
    return found


def best(losses: Mapping[Key, float]) -> Key | None:
    """What has the lowest loss, a rate or a run, and of equals the first; None of none."""
    return min(losses, key=losses.__getitem__, default=None)


def losses(kind: Callable[..., Key], rows: Sequence[Mapping[str, Any]]) -> dict[Key, float]:
    """The loss of each run, infinite if it diverged; ``kind`` is the NamedTuple of the runs."""
    return {run: loss_of(row) for run, row in by_run(kind, rows).items()}


def by_run(kind: Callable[..., Key], rows: Sequence[Mapping[str, Any]]) -> dict[Key, Mapping[str, Any]]:
    """The result of each run."""
    return {kind(*(row[name] for name in kind._fields)): row for row in rows}


def finite(value: float | None) -> float | None:
    """A number as JSON has it: None for what is not finite."""
    return value if value is not None and math.isfinite(value) else None


def loss_of(row: Mapping[str, Any], measure: str = "loss") -> float:
    """A measure of a run; infinite if it diverged, which is None in JSON."""
    return math.inf if row.get(measure) is None else row[measure]
