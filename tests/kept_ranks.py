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

# A process group of gloo has a thread that wakes up all the time, and cases leave their groups: those of some
# hundred cases took a core. New ranks take half a second.
MOST_GROUPS = 16


class Kept:
    """Ranks of each world size, started when a case first asks for them."""

    def __init__(self) -> None:
        self._ranks: dict[int, Ranks] = {}

    def run(
        self, function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120
    ) -> list[Any]:
        """As :func:`run_ranks`."""
        if world_size not in self._ranks or self._ranks[world_size].closed:
            self._ranks[world_size] = Ranks(world_size)
        ranks = self._ranks[world_size]
        answers = ranks.run(_counting_groups, function, *args, timeout=patient(timeout))
        if max(groups for _, groups in answers) > MOST_GROUPS:
            ranks.close()
        return [result for result, _ in answers]

    def close(self) -> None:
        """End them."""
        for ranks in self._ranks.values():
            ranks.close()


_of_all_tests = Kept()


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """As ``novoscale.tools.local_ranks.run_ranks``, on gloo ranks that an earlier case may have used.

    ``timeout``: seconds of a quiet machine.
    """
    return _of_all_tests.run(function, world_size, *args, timeout=timeout)


def _counting_groups(function: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    return function(*args), len(distributed_c10d._world.pg_map)
