"""Ranks that are kept for many cases: starting them, torch.distributed and DeepSpeed is most of a case.

A case that leaves its process changed (Accelerate's state, DeepSpeed's groups of experts and of models, a
patch) or that fails on purpose takes ranks of its own, by ``novoscale.tools.local_ranks.run_ranks``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from patience import patient
from torch.distributed import distributed_c10d

from novoscale.tools.local_ranks import Ranks

_kept: dict[int, Ranks] = {}
# A process group of gloo has a thread that wakes up all the time, and cases leave their groups: those of some
# hundred cases took a core. New ranks take half a second.
MOST_GROUPS = 16


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """As ``novoscale.tools.local_ranks.run_ranks``, on gloo ranks that an earlier case may have used.

    ``timeout``: seconds of a quiet machine.
    """
    if world_size not in _kept or _kept[world_size].closed:
        _kept[world_size] = Ranks(world_size)
    ranks = _kept[world_size]
    answers = ranks.run(_counting_groups, function, *args, timeout=patient(timeout))
    if max(groups for _, groups in answers) > MOST_GROUPS:
        ranks.close()
    return [result for result, _ in answers]


def _counting_groups(function: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    return function(*args), len(distributed_c10d._world.pg_map)
