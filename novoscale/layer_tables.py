"""The layers of a param group in a step: tables of what they are, and their state as vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from novoscale import second_moment
from novoscale.layout import Layout, counts_once, local_tensor
from novoscale.second_moment import Layers

Group = dict[str, Any]
Groups = list[tuple[Group, list[Tensor]]]  # the tensors to step, by param group
State = Mapping[Tensor, dict[str, Any]]


def rounds(group: Group) -> bool:
    """Whether anything of a param group is rounded stochastically."""
    weights = group["stochastic_rounding"] and any(p.dtype == torch.bfloat16 for p in group["params"])
    return bool(weights) or group["momentum_dtype"] != "float32"


def counts_steps(group: Group) -> bool:
    """Whether the steps of each layer (or parameter) of a param group have to be known."""
    return group["bias_correction"] or rounds(group)


def has_dtensors(tensors: Sequence[Any]) -> bool:
    """Whether any of them is one. By type first: there may be a thousand."""
    return any(issubclass(kind, DTensor) for kind in set(map(type, tensors)))


def layers_of_group(group: Group, layouts: Sequence[Layout], kept: Kept, device: torch.device) -> Layers:
    """The tables of the layers of a param group."""
    held = [layout.held[i] for layout in layouts for i in layout.in_order()]
    parameters = [h.parameter for h in held]

    def integers(values: Iterable[int]) -> Tensor:
        return torch.tensor([*values], dtype=torch.int64, device=device)

    share = scattered = None
    if second_moment.adds_up(group):
        scattered = integers(flag for layout in layouts for flag in _scattered(layout)) > 0
        share = _shares(layouts).to(device)
    return Layers(
        v=kept.v,
        columns=kept.columns,
        t=kept.t,
        counts_once=counts_once(group["granularity"]),
        here=integers(h.count for h in held),
        numel=integers(p.layer_numel * p.row_shares for p in parameters),
        number=integers(p.number for p in parameters),
        layers=integers(p.layers * p.column_shares for p in parameters).double(),
        factored=integers(p.factored for p in parameters) > 0,
        width=integers(h.columns for h in held),
        share=share,
        scattered=scattered,
    )


def _scattered(layout: Layout) -> list[bool]:
    """Whether ranks have different layers of each parameter; in the order of the vector of layers."""
    found = {span.place for completion in layout.completions for span in completion.scattered}
    return [index in found for index in layout.in_order()]


def _shares(layouts: Sequence[Layout]) -> Tensor:
    """See ``second_moment.Layers.share``; of tensor parallelism each rank counts an equal part of a layer."""
    parts = []
    for layout in layouts:
        shares = torch.zeros(layout.layers, dtype=torch.float64, device="cpu")
        for owned in layout.owned():
            shares[owned.start : owned.stop] = 1
        for h, place in zip(layout.held, layout.places(), strict=True):
            shares[place : place + h.count] /= h.parameter.row_shares
        parts.append(shares)
    return torch.cat(parts)


class Kept:
    """The second moments and the counts of steps of a param group as vectors.

    Those of plain tensors are made views of one vector, so that a step need not gather them. A DTensor's stay
    tensors of their own, for a view can be neither saved nor copied as the local part of one: they are
    gathered, and put back after a step.

    Args:
        group: the param group.
        params: its tensors.
        state: of the optimizer; changed in place, but for what is a view already.
        device: of the vectors.
    """

    def __init__(self, group: Group, params: Sequence[Tensor], state: State, device: torch.device) -> None:
        self._apart: list[tuple[Tensor, list[Tensor]]] = []
        self.v = self._join(params, state, ("exp_avg_sq", "exp_avg_sq_row"), device)
        has_columns = any("exp_avg_sq_col" in state[p] for p in params)
        self.columns = self._join(params, state, ("exp_avg_sq_col",), device) if has_columns else None
        self.t = self._join(params, state, ("step",), device) if counts_steps(group) else None

    def gather(self) -> None:
        """Have the vectors say what the states that are not views of them say: they may have been loaded."""
        for vector, states in self._apart:
            torch.cat([t.reshape(-1).to(vector.device) for t in states], out=vector)

    def put_back(self) -> None:
        """Copy the vectors to the states that are not views of them."""
        for vector, states in self._apart:
            parts = torch.split(vector, [t.numel() for t in states])
            torch._foreach_copy_(states, [part.view_as(t) for part, t in zip(parts, states, strict=True)])

    def _join(
        self, params: Sequence[Tensor], state: State, names: Sequence[str], device: torch.device
    ) -> Tensor:
        kept = [(state[p], name) for p in params for name in names if name in state[p]]
        tensors = [of[name] for of, name in kept]
        if has_dtensors(tensors):
            local = [*map(local_tensor, tensors)]
            vector = torch.cat([t.reshape(-1).to(device) for t in local])
            self._apart.append((vector, local))
            return vector
        joined = _joined(tensors, device)
        if joined is None:
            joined = torch.cat([t.reshape(-1).to(device) for t in tensors])
            for (of, name), view in zip(kept, torch.split(joined, [t.numel() for t in tensors]), strict=True):
                of[name] = view.view(of[name].shape)
        return joined


def _joined(parts: Sequence[Tensor], device: torch.device) -> Tensor | None:
    """The vector of which ``parts`` are consecutive views, if they are."""
    first, end = parts[0], parts[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        # Addresses alone do not do: two storages may lie next to each other.
        if part.data_ptr() != end or part.untyped_storage().data_ptr() != storage:
            return None
        end += part.numel() * part.element_size()
    if first.device != device:
        return None
    length = sum(part.numel() for part in parts)
    return first.as_strided((length,), (1,), first.storage_offset())
