"""The second moments as the optimizer keeps them: which there are of a tensor, and in which shapes.

What a step makes of them is in ``kernels.reference.layers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from novoscale.sharding.dtensors import by_rows, from_local, shards_rows
from novoscale.sharding.layers import counts_once, layer_matrix, matrix_dimensions
from novoscale.sharding.layout import Layout

# Of the optimizer's state: the second moments, and the counts of steps.
# The running mean squares of the rows of orthogonal directions.
DIRECTION_AVG_SQ = "direction_avg_sq"
NAMES = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "step")


def adds_up(options: Mapping[str, Any]) -> bool:
    """Whether the ranks add up numbers of each parameter of a param group in a step."""
    return bool(
        counts_once(options["granularity"]) or options["scale_parameter"] or options["clip_threshold"]
    )


def allocate(p: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The second moments of a tensor, zero: float32.

    Returns:
        ``exp_avg_sq``: one for each layer that this rank has, but those of factored parameters.
        ``exp_avg_sq_row`` and ``exp_avg_sq_col``: of each row that this rank has, and of each column, of
        factored parameters. Of a parameter they have the shapes of its leading and of its trailing
        dimensions, of a flat partition with several they are vectors. The rows of a DTensor that is sharded
        by rows are a DTensor sharded as it is; all else is the same on every rank of its mesh.
    """
    zeros = torch.zeros(layout.layers - layout.rows, dtype=torch.float32, device=p.device)
    made = {}
    if layout.rows < layout.layers or not layout.columns:
        made["exp_avg_sq"] = as_sharded(zeros, p, layout, p.shape[:1])
    if layout.columns:
        rows = torch.zeros(layout.rows, dtype=torch.float32, device=p.device)
        columns = torch.zeros(layout.columns, dtype=torch.float32, device=p.device)
        if len(layout.local_shards) == 1 and p.ndim > 1:
            split = matrix_dimensions(p.shape)
            rows = as_sharded(rows, p, layout, p.shape[:split])
            columns = columns.view(p.shape[split:])
        made |= {"exp_avg_sq_row": rows, "exp_avg_sq_col": columns}
    return made


def allocate_direction(p: Tensor, layout: Layout) -> Tensor:
    """The running mean squares of the rows of a full parameter's matrices, zero: float32, a vector."""
    parameter = layout.local_shards[0].parameter
    rows, _ = layer_matrix(parameter)
    return torch.zeros(parameter.layers * rows, dtype=torch.float32, device=p.device)


def as_sharded(local: Tensor, p: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    """A vector of this rank's layers, as a part of what all ranks have where the layers are sharded by rows.

    Args:
        local: float32, one for each layer or row that this rank has.
        p: the parameter.
        layout: of the parameter.
        shape: of the unsharded vector.
    """
    if not isinstance(p, DTensor) or not by_rows(p, layout.local_shards[0].parameter):
        return local if len(shape) < 2 else local.view(shape)
    local = local.view(-1, *shape[1:])
    placements = [x if shards_rows(x) else Replicate() for x in p.placements]
    return from_local(local, p, shape, placements) if any(map(shards_rows, p.placements)) else local
