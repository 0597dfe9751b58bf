"""Training with gradients that do not depend on the weights: states can be compared bit for bit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from novoscale import NovoGrad
from novoscale.sharding.dtensors import local_tensor
from novoscale.state import momentum

SHAPES = {
    "wide": (96, 130),
    "blocks": (40, 128),
    "small": (33,),
    "vector": (5000,),
    "tiny": (7, 9),
    "one": (1,),
    "few": (3, 1500),
}
STEPS = 6
Piece = tuple[str, int, Tensor, Tensor]  # parameter, first element in it, weights, first moments


class FixedGradients(nn.Module):
    """The gradient of each parameter is the same in any run: a sum over products is linear."""

    def __init__(self, shapes: dict[str, tuple[int, ...]] = SHAPES, frozen: Sequence[str] = ()) -> None:
        super().__init__()
        torch.manual_seed(3)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape), requires_grad=name not in frozen))

    def forward(self, step: Tensor) -> Tensor:
        rows = zip(self.parameters(), gradients(int(step), [p.shape for p in self.parameters()]), strict=True)
        return torch.stack([(p * g.to(p.dtype)).sum() for p, g in rows]).sum()


def gradients(step: int, shapes: Sequence[Any] = tuple(SHAPES.values())) -> list[Tensor]:
    """Multiples of 3/8, exact in bfloat16: a mean over 2, 3 or 4 ranks rounds nothing. Some rows are zero."""
    generator = torch.Generator().manual_seed(step)
    made = []
    for shape in shapes:
        g = torch.randint(-20, 21, tuple(shape), generator=generator) * 0.375
        made.append(g * (torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator) < 0.8))
    return made


def unsharded(
    options: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    master: torch.dtype | None = None,
    frozen: Sequence[str] = (),
) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights and first moments of every parameter after STEPS steps in one process.

    ``master``: of the weights that are updated, which begin as ``dtype``; None: the same.
    """
    model = FixedGradients(frozen=frozen).to(dtype).to(master or dtype)
    optimizer = NovoGrad(model.named_parameters(), **{"preset": "paper", **options})
    for step in range(STEPS):
        optimizer.zero_grad()
        model(torch.tensor(step)).backward()
        optimizer.step()
    return {name: (w, m) for name, _, w, m in pieces(optimizer)}


def pieces(optimizer: NovoGrad) -> list[Piece]:
    """What this rank holds: weights and first moments, as numbers."""
    found = []
    for p, state in optimizer.state.items():
        layout = optimizer._layouts.get(id(p)) or optimizer._dtensor_layouts[id(p)][2]
        weights = local_tensor(p).detach().reshape(-1)
        for part in momentum.stored(layout, optimizer.defaults["momentum_dtype"]):
            stored = local_tensor(state[part.key]).contiguous()
            scale = local_tensor(state["exp_avg_scale"]) if part.in_blocks else None
            for start, stop, _, position, _, place, *_ in momentum.pieces(layout, part, 0).tolist():
                (held,) = [s.parameter for s in layout.fragments if s.start <= start < s.stop]
                values = momentum.read(stored, scale, place, position, stop - start)
                name = layout.local_shards[held].parameter.name
                found.append((name, position, weights[start:stop].clone(), values.clone()))
    return found


def differing(ranks: Sequence[Sequence[Piece]], expected: dict[str, tuple[Tensor, Tensor]]) -> set[str]:
    """Parameters of which an element differs from one process.

    Raises:
        AssertionError: the ranks do not hold every element.
    """
    found, held = set(), defaultdict(set)
    for name, position, weights, moments in (piece for rank in ranks for piece in rank):
        stop = position + len(weights)
        held[name] |= set(range(position, stop))
        for mine, its in zip((weights, moments), expected[name], strict=True):
            if not torch.equal(mine.to(its.dtype), its[position:stop]):
                found.add(name)
    assert all(len(held[name]) == w.numel() for name, (w, _) in expected.items())
    return found
