"""First moments read as numbers, stored rounded to the nearest, and converted from one format to another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from novoscale.kernels.shards import at_sharded_blocks
from novoscale.sharding.blocks import BLOCK, ShardedBlocks
from novoscale.sharding.collectives import agree_on_blocks, blocks_in_stages
from novoscale.sharding.layout import Layout
from novoscale.state.formats import Format, format_of, unpacked
from novoscale.state.momentum import Stored, pieces, read, stored, write

HALF = 0x7FFF  # as random bits, those that round to the nearest


class Piece(NamedTuple):
    """The elements ``start..stop`` of a tensor, whose moments lie one after another in one of its state.

    Attributes:
        start: the first element.
        stop: the end.
        position: the place of the first in its parameter.
        place: where it is stored, see ``kernels.shards.PLACE``.
        sharded: the place of its block among those that are sharded; -1: it is of none, or of several blocks.
        part: where it is stored.
    """

    start: int
    stop: int
    position: int
    place: int
    sharded: int
    part: Stored

    def scale(self, state: Mapping[str, Tensor]) -> Tensor | None:
        """The scales of its blocks, if it is in blocks."""
        return state["exp_avg_scale"] if self.part.in_blocks else None


def loses_nothing(saved: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> bool:
    """Whether :func:`convert` loses no digit."""
    source, target = (format_of(m["exp_avg"], m.get("exp_avg_scale")) for m in (saved, made))
    wide = made["exp_avg"].dtype in (torch.float32, torch.float64)
    if source.largest:  # a code times its scale has 15 digits at most
        return wide or source == target or target.holds_codes_of(source)
    dtypes = saved["exp_avg"].dtype, made["exp_avg"].dtype
    return not target.largest and torch.promote_types(*dtypes) == dtypes[1]


def convert(saved: Mapping[str, Tensor], made: Mapping[str, Tensor], layout: Layout) -> None:
    """Fill a first moment from another, in whatever format; what is lost, if anything, is rounded.

    A collective where that is to be in blocks that are sharded, for the ranks agree on their scales.

    Args:
        saved: what ``momentum.allocate`` makes for one format, filled; local tensors.
        made: what it makes for the other; changed in place; local tensors.
        layout: of the tensor.
    """
    source, target = (format_of(m["exp_avg"], m.get("exp_avg_scale")) for m in (saved, made))
    if saved.keys() == made.keys() and (source.largest == 0 or source == target):
        for key, tensor in made.items():
            tensor.copy_(saved[key])
    elif target.holds_codes_of(source):
        for key, tensor in made.items():
            given = saved[key] if key != "exp_avg" else unpacked(saved[key], source)
            tensor.copy_(given.view(tensor.shape))
    else:
        flat = torch.zeros(layout.numel, dtype=torch.float32, device=saved["exp_avg"].device)
        for piece, values in read_pieces(saved, layout):
            flat[piece.start : piece.stop] = values
        if target.largest:
            sharded_blocks = layout.sharded_blocks()
            found = pieces_of(layout, target, sharded_blocks)
            round_to_nearest(made, found, lambda p: flat[p.start : p.stop], sharded_blocks, flat.device)
        else:
            made["exp_avg"].copy_(flat.view(made["exp_avg"].shape))


def read_pieces(
    state: Mapping[str, Tensor], layout: Layout, index: int | None = None
) -> Iterator[tuple[Piece, Tensor]]:
    """The first moments of a tensor, piece by piece, as ``momentum.read`` gives them.

    Args:
        state: of the tensor; local tensors.
        layout: of the tensor.
        index: of a parameter in ``layout.local_shards``: only its pieces; None: all.
    """
    form = format_of(state["exp_avg"], state.get("exp_avg_scale"))
    for piece in pieces_of(layout, form, index=index):
        stored_moments, scale = state[piece.part.key].contiguous(), piece.scale(state)
        yield piece, read(stored_moments, scale, piece.place, piece.position, piece.stop - piece.start)


def round_to_nearest(
    state: Mapping[str, Tensor],
    found: Iterable[Piece],
    values: Callable[[Piece], Tensor],
    sharded_blocks: ShardedBlocks,
    device: torch.device,
) -> None:
    """Store first moments, rounded to the nearest; a collective where blocks are sharded.

    Args:
        state: of the tensor; changed in place; local tensors.
        found: the pieces to be stored, of :func:`pieces_of` with the same ``sharded_blocks``; none, where
            this rank has no element of what other ranks store.
        values: the moments of a piece: float32.
        sharded_blocks: those on whose scales the ranks agree.
        device: of the moments.
    """
    found = list(found)
    # Of each sharded block the largest magnitude and that it is written: see kernels.Coefficients.
    largest = torch.zeros(2, len(sharded_blocks), dtype=torch.float32, device=device)
    largest[1] = 1
    for piece in found:
        if piece.sharded >= 0:
            here = values(piece).abs().amax()
            largest[0, piece.sharded] = torch.maximum(largest[0, piece.sharded], here)
    # As integers, which order as float32 does, with NaN above all.
    agreed = agree_on_blocks(largest.view(torch.int32), blocks_in_stages([(sharded_blocks, 0)]))
    half = torch.tensor(HALF, device=device)
    for piece in found:
        bits = half.expand(piece.stop - piece.start)
        of_block = agreed[:, piece.sharded] if piece.sharded >= 0 else None
        where = (state[piece.part.key], piece.scale(state), piece.place, piece.position)
        write(*where, values(piece), bits, bits > 0, of_block)


def pieces_of(
    layout: Layout, form: Format, sharded_blocks: ShardedBlocks | None = None, index: int | None = None
) -> Iterator[Piece]:
    """The pieces of a layout, those of sharded blocks apart.

    Args:
        layout: of a tensor.
        form: in which its first moment is.
        sharded_blocks: see ``momentum.pieces``.
        index: of a parameter in ``layout.local_shards``: only its pieces; None: all.
    """
    for part in stored(layout, form.name):
        if index is not None:
            part = _of_parameter(part, index)
        table, _ = at_sharded_blocks(pieces(layout, part, 0, sharded_blocks=sharded_blocks), BLOCK)
        for start, stop, _, position, _, place, _, sharded in table.tolist():
            yield Piece(start, stop, position, place, sharded, part)


def _of_parameter(part: Stored, index: int) -> Stored:
    """The fragments of one parameter, where they lie among the others."""
    mine = [nth for nth, s in enumerate(part.fragments) if s.parameter == index]
    fragments = tuple(part.fragments[nth] for nth in mine)
    return replace(part, fragments=fragments, places=tuple(part.places[nth] for nth in mine))
