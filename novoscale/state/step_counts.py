"""The counts of steps of layers or parameters: whether a param group needs them, and their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from novoscale.sharding.layout import Layout
from novoscale.state.second_moment import as_sharded


def rounds_weights(group: Mapping[str, Any]) -> bool:
    """Whether weights of a param group are rounded stochastically."""
    return bool(group["stochastic_rounding"]) and any(p.dtype == torch.bfloat16 for p in group["params"])


def rounds(group: Mapping[str, Any]) -> bool:
    """Whether anything of a param group is rounded stochastically."""
    return rounds_weights(group) or group["momentum_dtype"] != "float32"


def counts_steps(group: Mapping[str, Any]) -> bool:
    """Whether the steps of each layer (or parameter) of a param group have to be known."""
    return group["bias_correction"] or rounds(group)


def allocate(p: Tensor, layout: Layout) -> Tensor:
    """Zeros, one for each count of steps of a tensor: float32.

    By layers they are placed as the second moments are (see ``second_moment.allocate``); one for each
    parameter is on every rank.
    """
    zeros = torch.zeros(layout.counts, dtype=torch.float32, device=p.device)
    once = any(shard.parameter.counts_once for shard in layout.local_shards)
    return zeros if once else as_sharded(zeros, p, layout, p.shape[:1])
