"""The full states of parameters from those of flat partitions, and back: for another number of ranks.

A wrapper such as ZeRO gives the optimizer flat tensors that hold fragments of many parameters. The state of a
fragment does not depend on the sharding, not even its codes and scales. So nothing is computed here: states
are copied, and both ways keep every bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from novoscale.checkpoint import FlatState
from novoscale.checkpoint.state_dict import loaded_state, saved_state
from novoscale.sharding.blocks import BLOCK
from novoscale.sharding.layers import LayoutError, Parameter
from novoscale.sharding.layout import Fragment, Layout, LocalShard, unsharded
from novoscale.state import formats, momentum, second_moment, step_counts
from novoscale.state.formats import Format
from novoscale.state.momentum import Stored

VERSION = 1  # of the record
State = Mapping[str, Any]


def record(layout: Layout) -> dict[str, Any]:
    """What a checkpoint has to say of a flat tensor: plain numbers, names and lists."""
    return {
        "version": VERSION,
        "numel": layout.numel,
        "parameters": [
            {**asdict(shard.parameter), "shape": list(shard.parameter.shape)} for shard in layout.local_shards
        ],
        "held": [[shard.first, shard.stop] for shard in layout.local_shards],
        "segments": [[s.start, s.stop, s.parameter, s.offset] for s in layout.fragments],
    }


def flat_state(state: State, layout: Layout) -> FlatState:
    """The state of a flat tensor as it is saved."""
    keys = FlatState.STATE, FlatState.LAYOUT
    return FlatState(zip(keys, (dict(state), record(layout)), strict=True))


def layout_of(found: Mapping[str, Any]) -> Layout:
    """The layout of which :func:`record` was made, without what needs the ranks.

    Raises:
        LayoutError: a record of a newer version, or of tensor-parallel parameters.
    """
    if found["version"] > VERSION:
        raise LayoutError(
            f"the state was saved by a newer novoscale (its record has version {found['version']}, this one "
            f"reads up to {VERSION}): update novoscale"
        )
    parameters = [Parameter(**{**of, "shape": tuple(of["shape"])}) for of in found["parameters"]]
    for p in parameters:
        if p.row_shares > 1 or p.column_shares > 1:
            raise LayoutError(
                f"{p.name} is sharded by tensor parallelism: its state cannot be put together yet"
            )
    shards = tuple(
        LocalShard(p, first, stop) for p, (first, stop) in zip(parameters, found["held"], strict=True)
    )
    return Layout(found["numel"], shards, tuple(Fragment(*s) for s in found["segments"]))


# ---- to full states --------------------------------------------------------------------------------------


class FullState:
    """The state of one unsharded parameter, which is filled fragment by fragment.

    Args:
        parameter: the parameter.

    Attributes:
        parameter: the parameter.
        state: as one process keeps it, filled so far.
    """

    def __init__(self, parameter: Parameter) -> None:
        self.parameter = parameter
        self.state: dict[str, Tensor] = {}
        self._layout = unsharded(parameter)
        self._like = torch.empty((), device="cpu").expand(parameter.shape)  # of its shape, without its memory
        self._filled = 0

    def add(self, layout: Layout, index: int, state: State) -> None:
        """Copy what a flat tensor has of it.

        Args:
            layout: of the flat tensor.
            index: which of its parameters it is.
            state: of the flat tensor.
        """
        self._filled += sum(s.numel for s in layout.fragments if s.parameter == index)
        for key, target, source in self._second_moments(layout, index, state):
            self.state[key].view(-1)[target] = state[key].view(-1)[source]
        if "exp_avg" not in state:
            return
        form = formats.format_of(state["exp_avg"], state.get("exp_avg_scale"))
        if "exp_avg" not in self.state:
            dtype = state["exp_avg"].dtype if not form.largest else None
            made = momentum.allocate(self._like, self._layout, form.name)
            self.state |= {k: t if dtype is None else t.to(dtype) for k, t in made.items()}
        (mine,) = momentum.stored(self._layout, form.name)
        for part, fragment, place in _stored_fragments(layout, index, form):
            _copy(state, (part, place), self.state, (mine, _place(mine, fragment)), fragment, form)

    def _second_moments(self, layout: Layout, index: int, state: State) -> Iterator[tuple[str, slice, slice]]:
        made = second_moment.allocate(self._like, self._layout)
        if "step" in state:
            made["step"] = step_counts.allocate(self._like, self._layout)
        for key, target, source in vectors(layout, index, "step" in state):
            self.state.setdefault(key, made[key])
            yield key, target, source

    def finished(self) -> dict[str, Any]:
        """The state as one process saves it.

        Raises:
            LayoutError: not every element has been added.
        """
        if self._filled < self.parameter.numel:
            raise LayoutError(
                f"{self.parameter.name}: {self._filled} of its {self.parameter.numel} elements are in the "
                "checkpoint: files of some ranks are missing"
            )
        return saved_state(self._like, self.state, self._layout)


def gather(parts: Iterable[tuple[Layout, State]]) -> dict[str, FullState]:
    """The full states of parameters by name, from the flat tensors of all ranks: see ``FullState.finished``.

    Raises:
        LayoutError: two parameters of one name that are not the same.
    """
    found: dict[str, FullState] = {}
    for layout, state in parts:
        for index, shard in enumerate(layout.local_shards):
            name = shard.parameter.name
            known = found.setdefault(name, FullState(shard.parameter))
            if known.parameter != shard.parameter:
                raise LayoutError(f"{name}: ranks have saved different parameters of this name")
            known.add(layout, index, state)
    return found


# ---- and back --------------------------------------------------------------------------------------------


def scatter(
    full_states: Mapping[str, State], flat: Tensor, layout: Layout, group: Mapping[str, Any]
) -> dict[str, Any]:
    """The state of a flat tensor from the full states of its parameters.

    Args:
        full_states: as one process saves them, by name; left as they are.
        flat: the tensor.
        layout: its layout.
        group: its param group.

    Raises:
        ValueError: there is none for a parameter, or one that does not fit it.
    """
    made: dict[str, Tensor] = second_moment.allocate(flat, layout)
    form = formats.FORMATS[group["momentum_dtype"]]
    for index, shard in enumerate(layout.local_shards):
        name = shard.parameter.name
        if name not in full_states:
            raise ValueError(f"{name}: the checkpoint has no state of it: it is of another model")
        own = unsharded(shard.parameter)
        like = torch.empty((), device="cpu").expand(shard.parameter.shape)
        state = loaded_state(name, full_states[name], like, own, group)
        if "step" in state and "step" not in made:
            made["step"] = step_counts.allocate(flat, layout)
        for key, target, source in vectors(layout, index, "step" in state):
            made[key].view(-1)[source] = state[key].view(-1)[target].to(flat.device)
        if "exp_avg" not in state:
            continue
        if "exp_avg" not in made:
            made |= momentum.allocate(flat, layout, form.name)
        (mine,) = momentum.stored(own, form.name)
        for part, fragment, place in _stored_fragments(layout, index, form):
            _copy(state, (mine, _place(mine, fragment)), made, (part, place), fragment, form)
    return made


# ---- what both have in common ----------------------------------------------------------------------------


def vectors(layout: Layout, index: int, steps: bool) -> Iterator[tuple[str, slice, slice]]:
    """Where the second moments of a parameter lie, and its counts of steps if there are any.

    Args:
        layout: of a flat tensor.
        index: which of its parameters.
        steps: whether steps are counted.

    Yields:
        The key of the state; the places of this rank's part in the full state; and in the flat tensor's.
    """
    shard = layout.local_shards[index]
    order = layout.in_order()
    before = order[: order.index(index)]
    # The rows of factored parameters come after all other layers, in a vector of their own.
    alike = [
        layout.local_shards[i]
        for i in before
        if layout.local_shards[i].parameter.factored == shard.parameter.factored
    ]
    first = sum(other.count for other in alike)
    key = "exp_avg_sq_row" if shard.parameter.factored else "exp_avg_sq"
    yield key, slice(shard.first, shard.stop), slice(first, first + shard.count)
    if shard.parameter.factored:
        column = layout.column_places()[index]
        yield "exp_avg_sq_col", slice(0, shard.columns), slice(column, column + shard.columns)
    if steps:
        counted = sum(layout.local_shards[i].counts for i in before)
        of_full = slice(0, 1) if shard.parameter.counts_once else slice(shard.first, shard.stop)
        yield "step", of_full, slice(counted, counted + shard.counts)


def _stored_fragments(layout: Layout, index: int, form: Format) -> Iterator[tuple[Stored, Fragment, int]]:
    """Where a parameter's moments lie in the state of a flat tensor: of each fragment its first place."""
    for part in momentum.stored(layout, form.name):
        for fragment, (place, _) in zip(part.fragments, part.places, strict=True):
            if fragment.parameter == index:
                yield part, fragment, place


def _place(mine: Stored, fragment: Fragment) -> int:
    """Where a fragment begins in the full state of its parameter: an element, or a block."""
    return fragment.offset // BLOCK if mine.in_blocks else fragment.offset


def _copy(
    source: State,
    at: tuple[Stored, int],
    target: dict[str, Tensor],
    to: tuple[Stored, int],
    fragment: Fragment,
    form: Format,
) -> None:
    """Copy the moments of a fragment of a parameter from one state to another, codes and scales as they are.

    Args:
        source: a state.
        at: where the moment of the fragment's first element lies in it: an element, or its block.
        target: another; changed in place.
        to: the same of it.
        fragment: of the parameter.
        form: of the large parameters.
    """
    (part, place), (other, start) = at, to
    if not part.in_blocks:
        moved = source[part.key].view(-1)[place : place + fragment.numel]
        target[other.key].view(-1)[start : start + fragment.numel] = moved.to(target[other.key].device)
        return
    first, last = fragment.offset // BLOCK, (fragment.offset + fragment.numel - 1) // BLOCK + 1
    count, begin = last - first, fragment.offset % BLOCK
    scales = target["exp_avg_scale"].view(-1)
    scales[start : start + count] = source["exp_avg_scale"].view(-1)[place : place + count].to(scales.device)
    width = BLOCK // form.packed
    given = source[part.key].view(-1, width)[place : place + count].to(scales.device)
    kept = target[other.key].view(-1, width)[start : start + count]
    codes = formats.unpacked(kept, form).view(-1)
    codes[begin : begin + fragment.numel] = formats.unpacked(given, form).view(-1)[
        begin : begin + fragment.numel
    ]
    kept.copy_(formats.packed(codes.view(count, BLOCK), form))
