"""How the first moment is stored: float32, bfloat16, or in blocks of int8 or int4 codes.

In blocks: each 128 consecutive elements of a parameter, counted from its first (and not from that of a
rank's piece of it), have one scale, and each element a signed code; its moment is their product. The scale is
the largest magnitude in the block over the largest code, rounded up to a bfloat16, which has the range of a
float32. (float16 would be finer and has not: the moments of a large layer are below its smallest numbers, and
unnormalised gradients, with ``reg_inside_moment=False``, above its largest. What finer scales would gain is
0.4 % of the rounding error: ``docs/momentum.md``.) Codes are rounded stochastically, see
``novoscale.rounding``.

So what is stored does not depend on how a parameter is cut. Of a block that a boundary cuts in two, each rank
keeps the codes of its own elements, and all the scale of the whole block: see ``novoscale.blocks``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from novoscale import rounding
from novoscale.blocks import BLOCK, SMALL, CutBlocks
from novoscale.dtensors import from_local
from novoscale.layout import Layout, Segment, local_tensor, repeated

# Of the optimizer's state: the first moment, its scales, and that of small parameters in a flat partition.
NAMES = ("exp_avg", "exp_avg_scale", "exp_avg_small")

SMALLEST_SCALE = 0x00800000  # as the bits of a float32: its smallest normal number


@dataclass(frozen=True)
class Format:
    """A way to store the first moment.

    Attributes:
        name: the value of the option ``momentum_dtype``.
        dtype: of the stored tensor. int4 has two codes in a byte, that of the even element in its lower half.
        largest: the largest code, of formats in blocks; 0 for the others.
        packed: codes in an element of the stored tensor.
    """

    name: str
    dtype: torch.dtype
    largest: int = 0
    packed: int = 1


FORMATS = {
    f.name: f
    for f in (
        Format("float32", torch.float32),
        Format("bfloat16", torch.bfloat16),
        Format("int8", torch.int8, largest=127),
        Format("int4", torch.uint8, largest=7, packed=2),
    )
}


def known_format(exp_avg: Tensor, scale: Tensor | None) -> Format | None:
    """The format of a stored moment; None if it is in no format that is an option."""
    found = (exp_avg.dtype, None if scale is None else scale.dtype)
    for form in FORMATS.values():
        if found == (form.dtype, torch.bfloat16 if form.largest else None):
            return form
    return None


def format_of(exp_avg: Tensor, scale: Tensor | None) -> Format:
    """The same, but any floating-point one that is no option counts as float32."""
    return known_format(exp_avg, scale) or FORMATS["float32"]


# ---- where each element's moment lies ------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """Segments whose moment is in one tensor.

    Attributes:
        key: the name of the tensor in the optimizer's state.
        segments: of the layout.
        places: of each segment, the place of its first element and the places from run to run: elements, or
            blocks.
        length: elements, or blocks.
        in_blocks: which of them.
    """

    key: str
    segments: tuple[Segment, ...]
    places: tuple[tuple[int, int], ...]
    length: int
    in_blocks: bool


def stored(layout: Layout, momentum_dtype: str) -> list[Stored]:
    """Where the moments of a tensor lie, of which parts may be large parameters and parts small ones."""
    as_they_are = tuple((s.start, s.run or s.numel) for s in layout.segments)
    plain = Stored("exp_avg", layout.segments, as_they_are, layout.numel, in_blocks=False)
    sizes = [h.parameter.numel for h in layout.held]
    # By the whole sizes: a rank may hold nothing of a DTensor, and has to keep it as the others do.
    if not FORMATS[momentum_dtype].largest or max(sizes, default=0) < SMALL:
        return [plain]
    large = tuple(s for s in layout.segments if sizes[s.parameter] >= SMALL)
    small = tuple(s for s in layout.segments if sizes[s.parameter] < SMALL)
    counts = [_blocks(s) for s in large]
    found = [_packed("exp_avg", large, counts, in_blocks=True)]
    if small:
        found.append(_packed("exp_avg_small", small, [(1, s.numel) for s in small], in_blocks=False))
    return found


def _packed(
    key: str, segments: tuple[Segment, ...], counts: Sequence[tuple[int, int]], in_blocks: bool
) -> Stored:
    places, end = [], 0
    for runs, each in counts:
        places.append((end, each))
        end += runs * each
    return Stored(key, segments, tuple(places), end, in_blocks)


def _blocks(s: Segment) -> tuple[int, int]:
    """The number of runs of a segment, and of blocks for each."""
    if s.run is None:
        return 1, (s.offset + s.numel - 1) // BLOCK - s.offset // BLOCK + 1
    runs = s.numel // s.run
    if s.run % BLOCK == s.stride % BLOCK == s.offset % BLOCK == 0:
        return runs, s.run // BLOCK
    return runs, (s.run + BLOCK - 2) // BLOCK + 1  # as many as it may touch, wherever it begins


def in_blocks(group: Mapping[str, Any]) -> bool:
    """Whether large parameters of a param group keep their first moment in blocks."""
    return group["betas"][0] != 0 and FORMATS[group["momentum_dtype"]].largest > 0


def pieces(
    layout: Layout,
    stored: Stored,
    first: int,
    first_column: int = 0,
    cut_blocks: CutBlocks | None = None,
    first_block: int = 0,
) -> Tensor:
    """The table of ``kernels.Shard`` for some segments of a layout.

    Args:
        layout: of the tensor.
        stored: the segments.
        first: the place of the tensor's layers in the vector of all layers.
        first_column: the same of its columns.
        cut_blocks: of the layout, if ranks agree on them; None: each piece of a block has its own scale.
        first_block: the place of these among all cut blocks.

    Returns:
        int64 ``[pieces, 9]`` on the CPU.
    """
    starts, columns = layout.places(), layout.column_places()
    rows = []
    for s, (place, each) in zip(stored.segments, stored.places, strict=True):
        h = layout.held[s.parameter]
        layer = first + starts[s.parameter] - h.first
        length = s.run or s.numel
        of_columns = first_column + columns[s.parameter] if h.columns else -1
        numbers = (s.numel // length, layer, h.parameter.layer_numel, of_columns, s.parameter)
        rows.append((s.start, s.offset, place, length, s.stride, each, *numbers))
    table = torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 11)
    segment, nth = repeated(table[:, 6])
    begin, offset, first_place, run, stride, step, _, base, size, column, parameter = table[segment].unbind(1)
    start, position = begin + nth * run, offset + nth * stride
    first_cut = last_cut = torch.full_like(start, -1)
    if cut_blocks is not None and stored.in_blocks and len(cut_blocks):
        find = cut_blocks.lookup()
        first_cut, last_cut = (
            torch.where(place < 0, place, place + first_block)
            for place in (find(parameter, position // BLOCK), find(parameter, (position + run - 1) // BLOCK))
        )
    return torch.stack(
        (
            start,
            start + run,
            base + position // size,
            position,
            size,
            first_place + nth * step,
            column,
            first_cut,
            last_cut,
        ),
        dim=1,
    )


# ---- the tensors of the state ----------------------------------------------------------------------------


def allocate(p: Tensor, layout: Layout, momentum_dtype: str) -> dict[str, Tensor]:
    """The first moment of a tensor, zero, as the optimizer keeps it.

    float32 and bfloat16 (float64 for a float64 parameter instead of float32) have its shape. In blocks, a
    parameter whose rows are whole blocks has its shape with the last dimension divided by the number of
    codes or elements in each element, and a DTensor its placements. Any other has, on each rank, the shape
    ``[blocks, ...]``: see ``novoscale.portable`` for how it is saved.

    Returns:
        ``exp_avg``; in blocks also ``exp_avg_scale`` (bfloat16, one for each block) and, where a flat
        partition holds small parameters too, ``exp_avg_small`` (float32, those in their order).
    """
    kept, form = stored(layout, momentum_dtype), FORMATS[momentum_dtype]
    if not kept[0].in_blocks:
        dtype = torch.float32 if form.largest else form.dtype
        if dtype == torch.float32 and p.dtype == torch.float64:
            dtype = torch.float64
        return {"exp_avg": torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)}
    made = {
        "exp_avg": _zeros(p, kept[0].length, BLOCK // form.packed, form.packed, form.dtype),
        "exp_avg_scale": _zeros(p, kept[0].length, 1, BLOCK, torch.bfloat16),
    }
    for other in kept[1:]:
        made[other.key] = torch.zeros(other.length, dtype=torch.float32, device=p.device)
    return made


def _zeros(p: Tensor, blocks: int, width: int, packed: int, dtype: torch.dtype) -> Tensor:
    """Zeros for the blocks of this rank, of ``width`` elements each, which stand for ``packed`` moments."""
    make = partial(torch.zeros, dtype=dtype, device=p.device)
    if not rows_are_blocks(p):
        return make((blocks, width)[: 2 if width > 1 else 1])
    local = make(_divided(local_tensor(p), packed))
    return from_local(local, p, _divided(p, packed), p.placements) if isinstance(p, DTensor) else local


def _divided(p: Tensor, by: int) -> tuple[int, ...]:
    """A shape with the last dimension divided."""
    return (*p.shape[:-1], p.shape[-1] // by)


def rows_are_blocks(p: Tensor) -> bool:
    """Whether every row of every rank's part of a parameter is a number of whole blocks."""
    if p.ndim < 2:
        return False
    ranks = math.prod(n for n, dim in cuts(p) if dim == p.ndim - 1) if isinstance(p, DTensor) else 1
    return p.shape[-1] % (BLOCK * ranks) == 0


def cuts(p: DTensor) -> list[tuple[int, int]]:
    """Over how many ranks which dimension of a DTensor is cut."""
    placed = zip(p.device_mesh.shape, p.placements, strict=True)
    return [(n, cast(Shard, x).dim) for n, x in placed if not x.is_replicate()]


# ---- reading and writing: the definition -----------------------------------------------------------------


def read(exp_avg: Tensor, scale: Tensor | None, place: int, position: int, numel: int) -> Tensor:
    """The moments of consecutive elements.

    Args:
        exp_avg: as stored; contiguous.
        scale: of its blocks, if it has any.
        place: of the first element, see ``kernels.shards.PLACE``.
        position: of the first element in its parameter.
        numel: how many.

    Returns:
        ``[numel]``, float32, or as stored where that is a floating-point format.
    """
    if scale is None:
        return exp_avg.view(-1)[place : place + numel]
    begin = position % BLOCK
    blocks = (begin + numel - 1) // BLOCK + 1
    form = format_of(exp_avg, scale)
    codes = exp_avg.view(-1, BLOCK // form.packed)[place : place + blocks]
    values = unpacked(codes, form).float() * scale.view(-1)[place : place + blocks, None].float()
    return values.view(-1)[begin : begin + numel]


def unpacked(codes: Tensor, form: Format) -> Tensor:
    """Codes as int8 ``[..., codes]``, from elements as they are stored."""
    if form.packed == 1:
        return codes
    # Four bits with a sign: shifted to the top of the byte and back.
    low, high = (codes << 4).view(torch.int8) >> 4, codes.view(torch.int8) >> 4
    return torch.stack((low, high), dim=-1).flatten(-2)


def packed(codes: Tensor, form: Format) -> Tensor:
    """Codes as they are stored, from int8 ``[..., codes]``."""
    if form.packed == 1:
        return codes
    pairs = codes.view(torch.uint8).view(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    low, high = pairs.unbind(-1)
    return (low & 15) | (high << 4)


def write(
    exp_avg: Tensor,
    scale: Tensor | None,
    place: int,
    position: int,
    values: Tensor,
    bits: Tensor,
    active: Tensor,
    cut: Tensor | None = None,
) -> None:
    """Store the moments of consecutive elements; the arguments of :func:`read`, and:

    Args:
        exp_avg: as stored, in blocks or in float32; changed in place.
        scale: of its blocks; changed in place.
        place: see :func:`read`.
        position: see :func:`read`.
        values: ``[numel]``, float32 or float64; where a block is shared, of the inactive elements what they
            were.
        bits: 16 random bits for each.
        active: bool, for each: a block without any is left as it is.
        cut: of the only block, if it is cut, the largest magnitude and whether it has any active element, as
            in ``kernels.Coefficients``.
    """
    numel = len(values)
    if scale is None:
        target = exp_avg.view(-1)[place : place + numel]
        target.copy_(torch.where(active, values.to(target.dtype), target))
        return
    begin = position % BLOCK
    blocks = (begin + numel - 1) // BLOCK + 1
    form = format_of(exp_avg, scale)

    def whole(t: Tensor) -> Tensor:
        return torch.nn.functional.pad(t, (begin, blocks * BLOCK - begin - numel)).view(-1, BLOCK)

    largest = None if cut is None else cut[:1].view(torch.float32)
    codes, new_scale = encode(whole(values), whole(bits), form, largest)
    changed = whole(active).any(dim=1) if cut is None else cut[1:] > 0
    for stored, new in ((exp_avg.view(-1, BLOCK // form.packed), codes), (scale.view(-1), new_scale)):
        target = stored[place : place + blocks]
        target.copy_(torch.where(changed.view(-1, *[1] * (target.ndim - 1)), new, target))


def encode(
    values: Tensor, bits: Tensor, form: Format, largest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of blocks.

    Args:
        values: ``[blocks, 128]``, float32; float64 is rounded to it.
        bits: 16 random bits for each.
        form: one in blocks.
        largest: of each block the largest magnitude, if others have elements of it too.

    Returns:
        Codes as they are stored, and bfloat16 scales ``[blocks]``. A block with a value that is not finite
        has the scale NaN.
    """
    values = values.float()
    largest = values.abs().amax(dim=1) if largest is None else largest
    # Up to the next bfloat16, so that no code is beyond the largest.
    wide = (largest * (1 / form.largest)).view(torch.int32).long()
    wide = ((wide + 0xFFFF) & ~0xFFFF).clamp(min=SMALLEST_SCALE)
    wide = torch.where(largest == 0, 0, torch.where(largest.isfinite(), wide, rounding.NAN_BFLOAT16 << 16))
    scale = wide.to(torch.int32).view(torch.float32)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    # In the middle of one of 2**16 equal parts of 0..1: exact, as is the sum's floor.
    chance = (bits * 2 + 1).float() * 2.0**-17
    codes = (values * inverse[:, None] + chance).floor()
    codes = codes.clamp(-form.largest, form.largest).nan_to_num(nan=0.0).to(torch.int8)
    return packed(codes, form), (wide >> 16).to(torch.int16).view(torch.bfloat16)
