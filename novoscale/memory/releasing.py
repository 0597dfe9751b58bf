"""Which trainings can release their gradients in the backward pass, and how many are then alive at once.

``novoscale.release_gradients`` steps a parameter as soon as its gradient is complete, and frees the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from torch import nn

from novoscale.memory.optimizers import CANDIDATES
from novoscale.memory.shardings import SHARDINGS, TITLES
from novoscale.optimizer.release import stepped_together, tied
from novoscale.verify import runs


def why_not(optimizer: str, sharding: str) -> str | None:
    """Why a training cannot release its gradients; None if it can. Names of the catalogues."""
    if CANDIDATES[optimizer].path != "novoscale:NovoGrad":
        return "not NovoGrad"
    if sharding in ("none", "fsdp2"):
        return None
    return "not under DDP" if SHARDINGS[sharding] is None else f"not under {TITLES[sharding]}"


def alive_at_once(model: nn.Module, sharding: str, world: int) -> int:
    """The most elements of gradients on the rank that holds most.

    In one process a large parameter, and the small ones that wait for each other then. The gradient of a tied
    parameter comes on top: what autograd has of it waits in the backward pass from the parameter's last use
    in the forward pass to its first. Under FSDP2 the shards of the largest unit.
    """
    if sharding == "fsdp2":
        return max(sum(_shard(p.shape, world) for p in unit) for unit in fsdp2_units(model))
    params = list(model.parameters())
    sizes: dict[int, int] = {id(p): p.numel() for p in params}
    always = sum(sizes.pop(id(p)) for p in tied(model))
    last = {id(unit[-1]): sum(sizes.get(id(p), 0) for p in unit) for unit in stepped_together(params)}
    alive = most = 0
    for p in reversed(params):
        alive += sizes.get(id(p), 0)
        most = max(most, alive)
        alive -= last.get(id(p), 0)
    return always + most


def fsdp2_units(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The parameters of each unit that ``runs.shard`` makes: each block of layers; and the rest."""
    inside: set[int] = set()
    for block in runs.fsdp2_blocks(model):
        unit = list(block.parameters())
        inside.update(map(id, unit))
        yield unit
    yield [p for p in model.parameters() if id(p) not in inside]


def _shard(shape: Iterable[int], world: int) -> int:
    """Elements of the first rank's slice along dimension 0, the largest."""
    rows, *rest = tuple(shape) or (1,)
    return -(-rows // world) * math.prod(rest)
