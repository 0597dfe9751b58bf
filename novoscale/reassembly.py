"""The state of whole parameters from that of flat partitions, and back: for another number of ranks.

A wrapper such as ZeRO gives the optimizer flat tensors that hold pieces of many parameters. What is kept of
each piece does not depend on where it was cut, not even codes and scales: so nothing here is computed, it is
copied, and both ways keep every bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from novoscale import checkpoint, momentum, second_moment
from novoscale.blocks import BLOCK
from novoscale.layout import Held, Layout, LayoutError, Parameter, Segment, whole
from novoscale.momentum import Format, Stored

VERSION = 1  # of the record
State = Mapping[str, Any]


def record(layout: Layout) -> dict[str, Any]:
    """What a checkpoint has to say of a flat tensor: plain numbers, names and lists."""
    return {
        "version": VERSION,
        "numel": layout.numel,
        "parameters": [{**asdict(h.parameter), "shape": list(h.parameter.shape)} for h in layout.held],
        "held": [[h.first, h.stop] for h in layout.held],
        "segments": [[s.start, s.stop, s.parameter, s.offset] for s in layout.segments],
    }


def flat_state(state: State, layout: Layout) -> checkpoint.FlatState:
    """The state of a flat tensor as it is saved."""
    keys = checkpoint.FlatState.STATE, checkpoint.FlatState.LAYOUT
    return checkpoint.FlatState(zip(keys, (dict(state), record(layout)), strict=True))


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
            raise LayoutError(f"{p.name} is cut by tensor parallelism: its state cannot be put together yet")
    held = tuple(Held(p, first, stop) for p, (first, stop) in zip(parameters, found["held"], strict=True))
    return Layout(found["numel"], held, tuple(Segment(*s) for s in found["segments"]))


# ---- to whole parameters ---------------------------------------------------------------------------------


class Whole:
    """The state of one parameter, which is filled piece by piece.

    Args:
        parameter: the parameter.

    Attributes:
        parameter: the parameter.
        state: as one process keeps it, filled so far.
    """

    def __init__(self, parameter: Parameter) -> None:
        self.parameter = parameter
        self.state: dict[str, Tensor] = {}
        self._layout = whole(parameter)
        self._like = torch.empty((), device="cpu").expand(parameter.shape)  # of its shape, without its memory
        self._held = 0

    def add(self, layout: Layout, index: int, state: State) -> None:
        """Copy what a flat tensor has of it.

        Args:
            layout: of the flat tensor.
            index: which of its parameters it is.
            state: of the flat tensor.
        """
        self._held += sum(s.numel for s in layout.segments if s.parameter == index)
        for key, target, source in self._second_moments(layout, index, state):
            self.state[key].view(-1)[target] = state[key].view(-1)[source]
        if "exp_avg" not in state:
            return
        form = momentum.format_of(state["exp_avg"], state.get("exp_avg_scale"))
        if "exp_avg" not in self.state:
            dtype = state["exp_avg"].dtype if not form.largest else None
            made = momentum.allocate(self._like, self._layout, form.name)
            self.state |= {k: t if dtype is None else t.to(dtype) for k, t in made.items()}
        (mine,) = momentum.stored(self._layout, form.name)
        for part, segment, place in _stored_segments(layout, index, form):
            _copy(state, (part, place), self.state, (mine, _place(mine, segment)), segment, form)

    def _second_moments(self, layout: Layout, index: int, state: State) -> Iterator[tuple[str, slice, slice]]:
        made = second_moment.allocate(self._like, self._layout)
        if "step" in state:
            made["step"] = second_moment.allocate_steps(self._like, self._layout)
        for key, target, source in vectors(layout, index, "step" in state):
            self.state.setdefault(key, made[key])
            yield key, target, source

    def finished(self) -> dict[str, Any]:
        """The state as one process saves it.

        Raises:
            LayoutError: not every element has been there.
        """
        if self._held < self.parameter.numel:
            raise LayoutError(
                f"{self.parameter.name}: {self._held} of its {self.parameter.numel} elements are in the "
                "checkpoint: files of some ranks are missing"
            )
        return checkpoint.saved(self._like, self.state, self._layout)


def gather(parts: Iterable[tuple[Layout, State]]) -> dict[str, Whole]:
    """The states of whole parameters by name, from the flat tensors of all ranks: see ``Whole.finished``.

    Raises:
        LayoutError: two parameters of one name that are not the same.
    """
    found: dict[str, Whole] = {}
    for layout, state in parts:
        for index, h in enumerate(layout.held):
            known = found.setdefault(h.parameter.name, Whole(h.parameter))
            if known.parameter != h.parameter:
                raise LayoutError(f"{h.parameter.name}: ranks have saved different parameters of this name")
            known.add(layout, index, state)
    return found


# ---- and back --------------------------------------------------------------------------------------------


def scatter(
    wholes: Mapping[str, State], flat: Tensor, layout: Layout, group: Mapping[str, Any]
) -> dict[str, Any]:
    """The state of a flat tensor from those of whole parameters.

    Args:
        wholes: as one process saves them, by name; changed by nothing.
        flat: the tensor.
        layout: its layout.
        group: its param group.

    Raises:
        ValueError: there is none for a parameter, or one that does not fit it.
    """
    made: dict[str, Tensor] = second_moment.allocate(flat, layout)
    form = momentum.FORMATS[group["momentum_dtype"]]
    for index, h in enumerate(layout.held):
        name = h.parameter.name
        if name not in wholes:
            raise ValueError(f"{name}: the checkpoint has no state of it: it is of another model")
        own = whole(h.parameter)
        like = torch.empty((), device="cpu").expand(h.parameter.shape)
        state = checkpoint.loaded(name, wholes[name], like, own, group)
        if "step" in state and "step" not in made:
            made["step"] = second_moment.allocate_steps(flat, layout)
        for key, target, source in vectors(layout, index, "step" in state):
            made[key].view(-1)[source] = state[key].view(-1)[target].to(flat.device)
        if "exp_avg" not in state:
            continue
        if "exp_avg" not in made:
            made |= momentum.allocate(flat, layout, form.name)
        (mine,) = momentum.stored(own, form.name)
        for part, segment, place in _stored_segments(layout, index, form):
            _copy(state, (mine, _place(mine, segment)), made, (part, place), segment, form)
    return made


# ---- what both have in common ----------------------------------------------------------------------------


def vectors(layout: Layout, index: int, steps: bool) -> Iterator[tuple[str, slice, slice]]:
    """Where the second moments of a parameter lie, and its counts of steps if there are any.

    Args:
        layout: of a flat tensor.
        index: which of its parameters.
        steps: whether steps are counted.

    Yields:
        The key of the state; the places of what is held in the whole parameter's; and in the flat tensor's.
    """
    h = layout.held[index]
    order = layout.in_order()
    before = order[: order.index(index)]
    # The rows of factored parameters come after all other layers, in a vector of their own.
    alike = [layout.held[i] for i in before if layout.held[i].parameter.factored == h.parameter.factored]
    first = sum(other.count for other in alike)
    key = "exp_avg_sq_row" if h.parameter.factored else "exp_avg_sq"
    yield key, slice(h.first, h.stop), slice(first, first + h.count)
    if h.parameter.factored:
        column = layout.column_places()[index]
        yield "exp_avg_sq_col", slice(0, h.columns), slice(column, column + h.columns)
    if steps:
        counted = sum(layout.held[i].counts for i in before)
        whole_counts = slice(0, 1) if h.parameter.counts_once else slice(h.first, h.stop)
        yield "step", whole_counts, slice(counted, counted + h.counts)


def _stored_segments(layout: Layout, index: int, form: Format) -> Iterator[tuple[Stored, Segment, int]]:
    """Where the moments of a parameter lie in the state of a flat tensor: of each segment its first place."""
    for part in momentum.stored(layout, form.name):
        for segment, (place, _) in zip(part.segments, part.places, strict=True):
            if segment.parameter == index:
                yield part, segment, place


def _place(mine: Stored, segment: Segment) -> int:
    """Where a segment begins in the state of the whole parameter: an element, or a block."""
    return segment.offset // BLOCK if mine.in_blocks else segment.offset


def _copy(
    source: State,
    at: tuple[Stored, int],
    target: dict[str, Tensor],
    to: tuple[Stored, int],
    segment: Segment,
    form: Format,
) -> None:
    """Copy the moments of a segment of a parameter from one state to another, codes and scales as they are.

    Args:
        source: a state.
        at: where the moment of the segment's first element lies in it: an element, or its block.
        target: another; changed in place.
        to: the same of it.
        segment: of the parameter.
        form: of the large parameters.
    """
    (part, place), (other, start) = at, to
    if not part.in_blocks:
        moved = source[part.key].view(-1)[place : place + segment.numel]
        target[other.key].view(-1)[start : start + segment.numel] = moved.to(target[other.key].device)
        return
    first, last = segment.offset // BLOCK, (segment.offset + segment.numel - 1) // BLOCK + 1
    count, begin = last - first, segment.offset % BLOCK
    scales = target["exp_avg_scale"].view(-1)
    scales[start : start + count] = source["exp_avg_scale"].view(-1)[place : place + count].to(scales.device)
    width = BLOCK // form.packed
    given = source[part.key].view(-1, width)[place : place + count].to(scales.device)
    kept = target[other.key].view(-1, width)[start : start + count]
    codes = momentum.unpacked(kept, form).view(-1)
    codes[begin : begin + segment.numel] = momentum.unpacked(given, form).view(-1)[
        begin : begin + segment.numel
    ]
    kept.copy_(momentum.packed(codes.view(count, BLOCK), form))
