"""The optimizer's state of one parameter element by element, in and out, where it lies in a flat partition.

What the optimizer keeps is codes and scales, and one second moment for each layer. Here a first moment is a
number for each element.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from novoscale.blocks import NONE, SMALL, CutBlocks
from novoscale.collectives import Placed, agree_on_blocks, blocks_in_stages
from novoscale.conversion import rows
from novoscale.layout import Layout, Parameter
from novoscale.momentum import FORMATS, format_of, in_blocks, read, write

HALF = 0x7FFF  # as random bits, those that round to the nearest


def keeps_blocks(parameter: Parameter, group: Mapping[str, Any]) -> bool:
    """Whether a parameter's first moment is in blocks; the same on every rank, whatever it holds."""
    return in_blocks(group) and parameter.numel >= SMALL


def place_of(layout: Layout, parameter: Parameter) -> int | None:
    """The index of a parameter in ``layout.held``; None: this rank has nothing of it."""
    numbers = [h.parameter.number for h in layout.held]
    return numbers.index(parameter.number) if parameter.number in numbers else None


# ---- first moments ---------------------------------------------------------------------------------------


def moments(state: Mapping[str, Tensor], layout: Layout, index: int) -> Iterator[tuple[int, Tensor]]:
    """The first moments of a parameter that this rank holds: the first element of each stretch, and float32.

    Args:
        state: of the tensor.
        layout: of the tensor.
        index: of the parameter, in ``layout.held``.
    """
    form = format_of(state["exp_avg"], state.get("exp_avg_scale"))
    for part, (start, stop, _, position, _, place, *_) in rows(layout, form, index=index):
        scale = state["exp_avg_scale"] if part.in_blocks else None
        yield position, read(state[part.key].contiguous(), scale, place, position, stop - start).float()


def set_moments(
    state: Mapping[str, Tensor],
    layout: Layout,
    parameter: Parameter,
    group: Mapping[str, Any],
    value: Tensor,
    first: int | None = None,
) -> None:
    """Put first moments in place of those of a parameter, rounded to the nearest that can be stored.

    Args:
        state: of the tensor; changed in place.
        layout: of the tensor.
        parameter: of the layout; this rank may hold nothing of it.
        group: the tensor's param group.
        value: float32, flat: all elements of the parameter. Then this is a collective where blocks of the
            tensor are cut: the ranks agree on their scales.
        first: ``value`` begins with this element of the parameter, and has what this rank holds of it. No
            block of it may be cut.
    """
    cut_blocks = layout.cut_blocks() if first is None and keeps_blocks(parameter, group) else NONE
    index, first = place_of(layout, parameter), first or 0
    largest = _largest(layout, index, value, cut_blocks, group["momentum_dtype"])
    if index is None:
        return
    form = format_of(state["exp_avg"], state.get("exp_avg_scale"))
    half = torch.tensor(HALF, device=value.device)
    for part, (start, stop, _, position, _, place, _, cut) in rows(layout, form, cut_blocks, index):
        scale = state["exp_avg_scale"] if part.in_blocks else None
        bits = half.expand(stop - start)
        of_block = largest[:, cut] if cut >= 0 else None
        values = value[position - first : position - first + stop - start]
        write(state[part.key], scale, place, position, values, bits, bits > 0, of_block)


def _largest(
    layout: Layout, index: int | None, value: Tensor, cut_blocks: CutBlocks, momentum_dtype: str
) -> Tensor:
    """The largest magnitudes in cut blocks, as ``kernels.Coefficients`` has them: all ranks'."""
    largest = torch.zeros(2, len(cut_blocks), dtype=torch.float32, device=value.device)
    largest[1] = 1  # all are written
    if index is not None and len(cut_blocks):
        for _, (start, stop, _, position, *_, cut) in rows(
            layout, FORMATS[momentum_dtype], cut_blocks, index
        ):
            if cut >= 0:
                here = value[position : position + stop - start].abs().amax()
                largest[0, cut] = torch.maximum(largest[0, cut], here)
    # As integers: they are in the order of the numbers.
    return agree_on_blocks(
        largest.view(torch.int32), blocks_in_stages([Placed(layout, 0, cut_blocks=cut_blocks)])
    )


# ---- second moments --------------------------------------------------------------------------------------


def second_moments(state: Mapping[str, Tensor], layout: Layout, index: int) -> tuple[Tensor, Tensor | None]:
    """The second moments of the layers of a parameter that this rank has, and of its columns if it has any.

    They share the memory of the state.
    """
    h, place = layout.held[index], layout.places()[index]
    if not h.parameter.factored:
        return state["exp_avg_sq"].view(-1)[place : place + h.count], None
    place -= layout.layers - layout.rows
    column = layout.column_places()[index]
    return (
        state["exp_avg_sq_row"].view(-1)[place : place + h.count],
        state["exp_avg_sq_col"].view(-1)[column : column + h.columns],
    )


def units(parameter: Parameter, group: Mapping[str, Any]) -> int:
    """What a stored second moment is divided by to be that of an element: with "rms" its layer's elements."""
    if parameter.factored or group["normalize"] != "rms":
        return 1
    return parameter.layer_numel * parameter.row_shares
