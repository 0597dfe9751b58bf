"""Ranks that are kept for many cases: starting them, torch.distributed and DeepSpeed is most of a case.

A case that leaves its process changed (Accelerate's state, DeepSpeed's groups of experts and of models, a
patch) or that fails on purpose takes ranks of its own, by ``novoscale.tools.local_ranks.run_ranks``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from patience import patient

from novoscale.tools.local_ranks import Ranks

_kept: dict[int, Ranks] = {}


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """As ``novoscale.tools.local_ranks.run_ranks``, on gloo ranks that an earlier case may have used.

    ``timeout``: seconds of a quiet machine.
    """
    if world_size not in _kept or _kept[world_size].closed:
        _kept[world_size] = Ranks(world_size)
    return _kept[world_size].run(function, *args, timeout=patient(timeout))
