"""A small training run, the same in one process (float64, the oracle's update) and under any wrapper."""

from __future__ import annotations

from typing import Any

import torch
from oracle import FactoredOracle, Oracle, RowOracle, clipped
from torch import Tensor, nn

SAMPLES = 48  # divided by the ranks and the accumulation steps
STEPS = 10


class OddModel(nn.Module):
    """Odd shapes, one-element parameters, large ones: every way for a sharding to fall."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first = nn.Linear(13, 17)
        self.norm = nn.LayerNorm(17)
        self.middle = nn.Linear(17, 5, bias=False)
        self.gain = nn.Parameter(torch.tensor([1.3]))
        self.offset = nn.Parameter(torch.tensor([[0.7]]))
        self.last = nn.Linear(5, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.1 * torch.randn_like(p))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.first(x)))
        return self.last(torch.tanh(self.middle(h) * self.gain) + self.offset)


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(SAMPLES, 13), draw(SAMPLES, 3)


def two_groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Decay on matrices, none on the others: as the Trainer does."""
    dimensions = lambda p: len(getattr(p, "ds_shape", p.shape))  # noqa: E731  as it was before zero.Init
    matrices = [p for p in model.parameters() if dimensions(p) > 1]
    others = [p for p in model.parameters() if dimensions(p) <= 1]
    return [{"params": matrices, "weight_decay": 0.05, **options}, {"params": others, "weight_decay": 0.0}]


def reference(
    lr: float,
    clip: float = 0.0,
    groups: bool = False,
    weight_decay: float = 0.0,
    rows: bool = False,
    normalize: str = "norm",
    adamw: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The weights after STEPS steps in one process: gradients in float64, the update by the oracle.

    ``adamw``: options beside preset="adamw".
    """
    model = OddModel().double()
    named = dict(model.named_parameters())
    decayed = {n for n, p in named.items() if p.ndim > 1}
    members = (
        [sorted(decayed, key=list(named).index), [n for n in named if n not in decayed]]
        if groups
        else [list(named)]
    )
    decays = [0.05, 0.0] if groups else [weight_decay]
    oracles: list[Any] = []
    for names, decay in zip(members, decays, strict=True):
        weights = [named[n].detach().numpy() for n in names]
        if adamw is not None:
            oracles.append(FactoredOracle(weights, lr=lr, weight_decay=decay, **adamw))
        else:
            kind = RowOracle if rows else Oracle
            oracles.append(kind(weights, lr=lr, weight_decay=decay, normalize=normalize))
    for step in range(STEPS):
        x, y = data(step)
        model.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        grads = {n: p.grad.numpy() for n, p in named.items()}
        if clip:
            grads = dict(zip(grads, clipped(list(grads.values()), clip), strict=True))
        for names, oracle in zip(members, oracles, strict=True):
            oracle.step([grads[n] for n in names])
            with torch.no_grad():
                for n, w in zip(names, oracle.weights, strict=True):
                    named[n].copy_(torch.from_numpy(w))
    return {n: p.detach().numpy() for n, p in named.items()}
