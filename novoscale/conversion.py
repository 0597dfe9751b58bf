"""The first moment from one format to another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from novoscale.blocks import BLOCK, CutBlocks
from novoscale.collectives import Placed, agree_on_blocks, blocks_in_stages
from novoscale.kernels.shards import at_cut_blocks
from novoscale.layout import Layout
from novoscale.momentum import Format, Stored, format_of, pieces, read, stored, unpacked, write


def loses_nothing(saved: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> bool:
    """Whether :func:`convert` loses no digit."""
    source, target = saved["exp_avg"].dtype, made["exp_avg"].dtype
    if source == target:
        return True
    if "exp_avg_scale" in saved:  # a code times its scale has 15 digits at most
        return target in (torch.float32, torch.float64) or (source, target) == (torch.uint8, torch.int8)
    return torch.promote_types(source, target) == target and target.is_floating_point


def convert(saved: Mapping[str, Tensor], made: Mapping[str, Tensor], layout: Layout) -> None:
    """Fill a first moment from another, in whatever format; what is lost, if anything, is rounded.

    A collective where that is to be in blocks that are cut, for the ranks agree on their scales.

    Args:
        saved: what ``momentum.allocate`` makes for one format, filled; local tensors.
        made: what it makes for the other; changed in place; local tensors.
        layout: of the tensor.
    """
    source, target = (format_of(m["exp_avg"], m.get("exp_avg_scale")) for m in (saved, made))
    if saved.keys() == made.keys() and (source.largest == 0 or source == target):
        for key, tensor in made.items():
            tensor.copy_(saved[key])
    elif (source.name, target.name) == ("int4", "int8"):
        for key, tensor in made.items():
            given = saved[key] if key != "exp_avg" else unpacked(saved[key], source)
            tensor.copy_(given.view(tensor.shape))
    else:
        flat = _elements(saved, source, layout)
        if target.largest:
            _round_to_nearest(flat, made, target, layout)
        else:
            made["exp_avg"].copy_(flat.view(made["exp_avg"].shape))


def _elements(saved: Mapping[str, Tensor], source: Format, layout: Layout) -> Tensor:
    """A first moment as float32, flat."""
    flat = torch.zeros(layout.numel, dtype=torch.float32, device=saved["exp_avg"].device)
    for part, (start, stop, _, position, _, place, *_) in rows(layout, source):
        scale = saved["exp_avg_scale"] if part.in_blocks else None
        flat[start:stop] = read(saved[part.key].contiguous(), scale, place, position, stop - start)
    return flat


def _round_to_nearest(flat: Tensor, made: Mapping[str, Tensor], target: Format, layout: Layout) -> None:
    cut_blocks = layout.cut_blocks()
    largest = torch.zeros(2, len(cut_blocks), dtype=torch.float32, device=flat.device)
    largest[1] = 1  # all are written
    for _, (start, stop, *_, cut) in rows(layout, target, cut_blocks):
        if cut >= 0:
            largest[0, cut] = torch.maximum(largest[0, cut], flat[start:stop].abs().amax())
    agreed = largest.view(torch.int32)  # which orders as float32 does, with NaN above all
    agreed = agree_on_blocks(agreed, blocks_in_stages([Placed(layout, 0, cut_blocks=cut_blocks)]))
    half = torch.tensor(0x7FFF, device=flat.device)
    for part, (start, stop, _, position, _, place, _, cut) in rows(layout, target, cut_blocks):
        scale = made["exp_avg_scale"] if part.in_blocks else None
        bits = half.expand(stop - start)
        of_block = agreed[:, cut] if cut >= 0 else None
        write(made[part.key], scale, place, position, flat[start:stop], bits, bits > 0, of_block)


def rows(
    layout: Layout, form: Format, cut_blocks: CutBlocks | None = None, index: int | None = None
) -> Iterator[tuple[Stored, list[int]]]:
    """The pieces of a layout, those of cut blocks apart: the columns of a piece up to COLUMN, and CUT.

    Args:
        layout: of a tensor.
        form: in which its first moment is.
        cut_blocks: see ``momentum.pieces``.
        index: of a parameter in ``layout.held``: only its pieces; None: all.
    """
    for part in stored(layout, form.name):
        if index is not None:
            part = _of_parameter(part, index)
        table, _ = at_cut_blocks(pieces(layout, part, 0, cut_blocks=cut_blocks), BLOCK)
        for row in table.tolist():
            yield part, row


def _of_parameter(part: Stored, index: int) -> Stored:
    """The segments of one parameter, where they lie among the others."""
    mine = [nth for nth, s in enumerate(part.segments) if s.parameter == index]
    segments = tuple(part.segments[nth] for nth in mine)
    return replace(part, segments=segments, places=tuple(part.places[nth] for nth in mine))
