"""The state of one parameter in a flat partition: its first moments as numbers, its layers' second moments.

The optimizer keeps first moments as codes and scales. Tools that read or set the state of a parameter are
given, and give, a number for each element.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from novoscale.checkpoint.requantise import Piece, pieces_of, read_pieces, round_to_nearest
from novoscale.sharding.blocks import NONE, SMALL
from novoscale.sharding.layers import Parameter
from novoscale.sharding.layout import Layout
from novoscale.state.formats import format_of
from novoscale.state.momentum import in_blocks


def keeps_blocks(parameter: Parameter, group: Mapping[str, Any]) -> bool:
    """Whether a parameter's first moment is in blocks; the same on every rank, whatever it holds."""
    return in_blocks(group) and parameter.numel >= SMALL


def place_of(layout: Layout, parameter: Parameter) -> int | None:
    """The index of a parameter in ``layout.local_shards``; None: this rank has nothing of it."""
    numbers = [shard.parameter.number for shard in layout.local_shards]
    return numbers.index(parameter.number) if parameter.number in numbers else None


# ---- first moments ---------------------------------------------------------------------------------------


def moments(state: Mapping[str, Tensor], layout: Layout, index: int) -> Iterator[tuple[int, Tensor]]:
    """The first moments of a parameter that this rank holds: the first element of each stretch, and float32.

    Args:
        state: of the tensor.
        layout: of the tensor.
        index: of the parameter, in ``layout.local_shards``.
    """
    for piece, values in read_pieces(state, layout, index):
        yield piece.position, values.float()


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
            tensor are sharded: the ranks agree on their scales.
        first: ``value`` begins with this element of the parameter, and has what this rank holds of it. No
            block of it may be sharded.
    """
    sharded_blocks = layout.sharded_blocks() if first is None and keeps_blocks(parameter, group) else NONE
    index, begin = place_of(layout, parameter), first or 0
    found: list[Piece] = []
    if index is not None:
        form = format_of(state["exp_avg"], state.get("exp_avg_scale"))
        found = list(pieces_of(layout, form, sharded_blocks, index))

    def of_piece(piece: Piece) -> Tensor:
        at = piece.position - begin
        return value[at : at + piece.stop - piece.start]

    round_to_nearest(state, found, of_piece, sharded_blocks, value.device)


# ---- second moments --------------------------------------------------------------------------------------


def second_moments(state: Mapping[str, Tensor], layout: Layout, index: int) -> tuple[Tensor, Tensor | None]:
    """The second moments of the layers of a parameter that this rank has, and of its columns if it has any.

    They share the memory of the state.
    """
    shard, place = layout.local_shards[index], layout.places()[index]
    if not shard.parameter.factored:
        return state["exp_avg_sq"].view(-1)[place : place + shard.count], None
    place -= layout.layers - layout.rows
    column = layout.column_places()[index]
    return (
        state["exp_avg_sq_row"].view(-1)[place : place + shard.count],
        state["exp_avg_sq_col"].view(-1)[column : column + shard.columns],
    )


def units(parameter: Parameter, group: Mapping[str, Any]) -> int:
    """What a stored second moment is divided by to be that of an element.

    With ``normalize="rms"`` it is a sum over the elements of its layer: their number.
    """
    if parameter.factored or group["normalize"] != "rms":
        return 1
    return parameter.layer_numel * parameter.row_shares
