"""Which trainings can release their gradients in the backward pass, and how many are then alive at once.

With ``novoscale.release_gradients`` a parameter is stepped, and its gradient freed, as soon as that is whole.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator

from torch import nn

from novoscale.memory.cuts import CUTS, TITLES
from novoscale.memory.optimizers import CANDIDATES
from novoscale.verify import runs

# Elements of gradients that wait for each other, so that small parameters are stepped together: at most so
# many, and at most this part of the model's.
UNIT, PART = 8_000_000, 16


def why_not(optimizer: str, cut: str) -> str | None:
    """Why a training cannot release its gradients; None if it can. Names of the catalogues."""
    if CANDIDATES[optimizer].path != "novoscale:NovoGrad":
        return "not NovoGrad"
    if cut in ("none", "fsdp2"):
        return None
    return "not under DDP" if CUTS[cut] is None else f"not under {TITLES[cut]}"


def alive_at_once(model: nn.Module, cut: str, world: int) -> int:
    """The most elements of gradients on the rank that holds most.

    In one process the largest parameter, or those that wait for each other if they are more. A tied parameter
    comes on top: what autograd has of its gradient waits in the backward pass from its last use in the
    forward pass to its first. Under FSDP2 the shards of the largest unit.
    """
    if cut == "fsdp2":
        return max(sum(_shard(p.shape, world) for p in unit) for unit in fsdp2_units(model))
    sizes = {id(p): p.numel() for p in model.parameters()}
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    tied = sum(size for p, size in sizes.items() if uses[p] > 1)
    once = [size for p, size in sizes.items() if uses[p] == 1]
    unit = min(UNIT, sum(sizes.values()) // PART, sum(once))
    return tied + max([unit, *once])


def fsdp2_units(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The parameters of each unit that ``runs.cut`` makes: each block of layers; and the rest."""
    inside: set[int] = set()
    for block in runs.blocks(model):
        unit = list(block.parameters())
        inside.update(map(id, unit))
        yield unit
    yield [p for p in model.parameters() if id(p) not in inside]


def _shard(shape: Iterable[int], world: int) -> int:
    """Elements of the first rank's slice along dimension 0, the largest."""
    rows, *rest = tuple(shape) or (1,)
    return -(-rows // world) * math.prod(rest)
