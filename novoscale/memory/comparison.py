"""Optimizers against shardings: every cell measured, or why not."""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from novoscale.memory import measuring
from novoscale.memory.measuring import Job, Measured
from novoscale.memory.models import MemoryToolError
from novoscale.tools.local_ranks import RankError

# Of the length of the model's update in two steps. Rounding in float32 is below 1e-3 and that of Adam's
# 8-bit states below 0.05; a statistic of anything but the layer is 0.2 and more (docs/memory.md).
OTHER_TRAINING = 0.1

Row = dict[str, Any]


def compare(
    model: str,
    optimizers: Sequence[str],
    shardings: Sequence[tuple[str, int]],
    precision: str,
    timeout: float = 600,
    release: bool = False,
) -> Iterator[Row]:
    """Measure each optimizer under each sharding and number of ranks, a row for each, in this order.

    A row has ``why`` where nothing could be measured; else what ``Measured.to_dict`` has, and ``deviation``:
    the distance of the update from that of one process, relative; ``same_training``: whether that is within
    ``OTHER_TRAINING``. Both are None in bfloat16, where the rounding of the weights is as large, and where
    one process could not be measured.

    Args:
        model: of ``models.build``.
        optimizers: names of the catalogue.
        shardings: of ``SHARDINGS``, each with a number of ranks.
        precision: of ``PRECISIONS``.
        timeout: seconds for each.
        release: gradients are released in the backward pass; one process is compared with what it does
            without that.
    """
    for optimizer in optimizers:
        cell = functools.cache(functools.partial(_cell, timeout=timeout))  # one process is asked for again
        plain = Job(model, optimizer, "none", 1, precision)
        for sharding, ranks in shardings:
            job = replace(plain, sharding=sharding, ranks=ranks, release=release)
            found, row = cell(job)
            if found is not None and job != plain:
                row = _against(cell(plain)[0], found, row)
            yield row


def _cell(job: Job, timeout: float) -> tuple[Measured | None, Row]:
    try:
        found = measuring.measure(job, timeout)
    except MemoryToolError as error:
        return None, {**asdict(job), "why": str(error)}
    except RankError as error:
        return None, {**asdict(job), "why": _sentence(error)}
    return found, found.to_dict()


def _sentence(error: RankError) -> str:
    """What is wrong, without the advice that a library may add to it."""
    lines = [line for line in error.brief().splitlines() if not line.startswith("|")]
    says = ([line for line in lines if re.match(r"[\w.]+(Error|Exception): \S", line)] or lines)[-1]
    return textwrap.shorten(re.split(r"(?<=[.!]) ", says)[0], 300, placeholder=" ...")


def _against(unsharded: Measured | None, found: Measured, row: Row) -> Row:
    if unsharded is None or found.job.precision != "float32":
        return {**row, "deviation": None, "same_training": None}
    deviation = measuring.deviation(found, unsharded)
    return {**row, "deviation": deviation, "same_training": deviation <= OTHER_TRAINING}
