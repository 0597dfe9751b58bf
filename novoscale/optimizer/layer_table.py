"""The layers of the tensors of a step: the table of them that the kernels are given, and their state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from novoscale.kernels.interface import States
from novoscale.kernels.layers import NEEDED, RECORD, LayerTable
from novoscale.sharding.dtensors import local_tensor
from novoscale.sharding.layout import Layout
from novoscale.state import second_moment
from novoscale.state.step_counts import rounds

Group = dict[str, Any]
Groups = list[tuple[Group, list[Tensor]]]  # the tensors to step, by param group
# DTensors without a gradient on this rank, which other ranks may have: with the param group of each.
Absent = list[tuple[Group, Tensor]]
State = Mapping[Tensor, dict[str, Any]]


def states_of(own: Sequence[Mapping[str, Any]]) -> States:
    """The second moments and counts of steps of some tensors: this rank's parts of their states."""

    def named(*names: str) -> list[Tensor]:
        return [local_tensor(state[name]) for state in own for name in names if name in state]

    return States(named("exp_avg_sq", "exp_avg_sq_row"), named("exp_avg_sq_col"), named("step"))


def table_of_layers(
    groups: Groups, layouts: Sequence[Sequence[Layout]], own: Sequence[Mapping[str, Any]]
) -> LayerTable:
    """The table of the layers of a step; ``own``: the state of each tensor."""
    records: list[list[int]] = []
    layer = column = 0
    states = iter(own)
    for index, ((group, _), known) in enumerate(zip(groups, layouts, strict=True)):
        rounded = rounds(group)
        for layout in known:
            scattered = {span.place for reduction in layout.reductions for span in reduction.scattered}
            addresses = _addresses(layout, next(states))
            for place in layout.in_order():
                shard = layout.local_shards[place]
                p = shard.parameter
                numel, layers = p.layer_numel * p.row_shares, p.layers * p.column_shares
                flags = (p.number, p.counts_once, rounded, place in scattered)
                where = (index, layer, shard.count, column, shard.columns)
                records.append([*where, numel, layers, *flags, *next(addresses)])
                layer += shard.count
                column += shard.columns
    adds_up = any(second_moment.adds_up(group) for group, _ in groups)
    return LayerTable(
        records=torch.tensor(records, dtype=torch.int64, device="cpu").view(-1, RECORD),
        layers=layer,
        columns=column,
        share=_shares([layout for known in layouts for layout in known]) if adds_up else None,
        uses=frozenset(name for name in NEEDED for group, _ in groups if group[name]),
        dtype=torch.float64 if _any_float64(groups) else torch.float32,
    )


def _any_float64(groups: Groups) -> bool:
    return torch.float64 in {p.dtype for _, params in groups for p in params}


def _addresses(layout: Layout, of: Mapping[str, Tensor]) -> Iterator[tuple[int, int, int]]:
    """Of each parameter of a tensor the addresses of its second moments and counts, in the layers' order."""
    address = {name: local_tensor(of[name]).data_ptr() for name in second_moment.NAMES if name in of}
    for place in layout.in_order():
        shard = layout.local_shards[place]
        name = "exp_avg_sq_row" if shard.parameter.factored else "exp_avg_sq"
        yield address[name], address.get("exp_avg_sq_col", 0) if shard.columns else 0, address.get("step", 0)
        for part, count in ((name, shard.count), ("exp_avg_sq_col", shard.columns), ("step", shard.counts)):
            if part in address:
                address[part] += 4 * count  # they are float32


def _shares(layouts: Sequence[Layout]) -> Tensor:
    """See ``LayerTable.share``; of tensor parallelism each rank counts an equal part of a layer."""
    parts = []
    for layout in layouts:
        shares = torch.zeros(layout.layers, dtype=torch.float64, device="cpu")
        for owned in layout.owned():
            shares[owned.start : owned.stop] = 1
        for shard, place in zip(layout.local_shards, layout.places(), strict=True):
            shares[place : place + shard.count] /= shard.parameter.row_shares
        parts.append(shares)
    return torch.cat(parts)
