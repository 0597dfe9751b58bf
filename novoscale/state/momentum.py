"""Where the first moments of a tensor are stored: the tensors of its state, and the place of each element.

What is stored does not depend on how a parameter is sharded. Of a block that a boundary splits in two, each
rank keeps the codes of its own elements, and the scale of the full block: see ``novoscale.sharding.blocks``.
The formats are in ``novoscale.state.formats``.
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

from novoscale.sharding.blocks import BLOCK, SMALL, ShardedBlocks
from novoscale.sharding.dtensors import from_local, local_tensor
from novoscale.sharding.indices import repeated
from novoscale.sharding.layout import Fragment, Layout
from novoscale.state.formats import FORMATS, decoded, encode, format_of

# Of the optimizer's state: the first moment, its scales, and that of small parameters in a flat partition.
NAMES = ("exp_avg", "exp_avg_scale", "exp_avg_small")

# ---- where each element's moment lies ------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """Fragments whose moment is in one tensor.

    Attributes:
        key: the name of the tensor in the optimizer's state.
        fragments: of the layout.
        places: of each fragment, the place of its first element and the places from run to run: elements, or
            blocks.
        length: elements, or blocks.
        in_blocks: which of them.
    """

    key: str
    fragments: tuple[Fragment, ...]
    places: tuple[tuple[int, int], ...]
    length: int
    in_blocks: bool


def stored(layout: Layout, momentum_dtype: str) -> list[Stored]:
    """Where the moments of a tensor lie, of which parts may be large parameters and parts small ones."""
    as_they_are = tuple((s.start, s.run or s.numel) for s in layout.fragments)
    plain = Stored("exp_avg", layout.fragments, as_they_are, layout.numel, in_blocks=False)
    sizes = [shard.parameter.numel for shard in layout.local_shards]
    # By the full sizes: a rank may hold nothing of a DTensor, and has to keep it as the others do.
    if not FORMATS[momentum_dtype].largest or max(sizes, default=0) < SMALL:
        return [plain]
    large = tuple(s for s in layout.fragments if sizes[s.parameter] >= SMALL)
    small = tuple(s for s in layout.fragments if sizes[s.parameter] < SMALL)
    counts = [_blocks(s) for s in large]
    found = [_packed("exp_avg", large, counts, in_blocks=True)]
    if small:
        found.append(_packed("exp_avg_small", small, [(1, s.numel) for s in small], in_blocks=False))
    return found


def _packed(
    key: str, fragments: tuple[Fragment, ...], counts: Sequence[tuple[int, int]], in_blocks: bool
) -> Stored:
    places, end = [], 0
    for runs, each in counts:
        places.append((end, each))
        end += runs * each
    return Stored(key, fragments, tuple(places), end, in_blocks)


def _blocks(s: Fragment) -> tuple[int, int]:
    """The number of runs of a fragment, and of blocks for each."""
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
    sharded_blocks: ShardedBlocks | None = None,
    first_block: int = 0,
) -> Tensor:
    """The table of ``kernels.Shard`` for some fragments of a layout.

    Args:
        layout: of the tensor.
        stored: the fragments.
        first: the place of the tensor's layers in the vector of all layers.
        first_column: the same of its columns.
        sharded_blocks: of the layout, if ranks agree on them; None: each piece of a block has its own scale.
        first_block: the place of these among all sharded blocks.

    Returns:
        int64 ``[pieces, 9]`` on the CPU.
    """
    starts, columns = layout.places(), layout.column_places()
    rows = []
    for s, (place, each) in zip(stored.fragments, stored.places, strict=True):
        shard = layout.local_shards[s.parameter]
        layer = first + starts[s.parameter] - shard.first
        length = s.run or s.numel
        of_columns = first_column + columns[s.parameter] if shard.columns else -1
        numbers = (s.numel // length, layer, shard.parameter.layer_numel, of_columns, s.parameter)
        rows.append((s.start, s.offset, place, length, s.stride, each, *numbers))
    table = torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 11)
    fragment, nth = repeated(table[:, 6])
    begin, offset, first_place, run, stride, step, _, base, size, column, parameter = table[fragment].unbind(
        1
    )
    start, position = begin + nth * run, offset + nth * stride
    first_sharded = last_sharded = torch.full_like(start, -1)
    if sharded_blocks is not None and stored.in_blocks and len(sharded_blocks):
        find = sharded_blocks.lookup()
        first_sharded, last_sharded = (
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
            first_sharded,
            last_sharded,
        ),
        dim=1,
    )


# ---- the tensors of the state ----------------------------------------------------------------------------


def allocate(p: Tensor, layout: Layout, momentum_dtype: str) -> dict[str, Tensor]:
    """The first moment of a tensor, zero, as the optimizer keeps it.

    float32 and bfloat16 (float64 for a float64 parameter instead of float32) have its shape. In blocks, a
    parameter whose rows are whole blocks has its shape with the last dimension divided by the number of
    codes or elements in each element, and a DTensor its placements. Any other has, on each rank, the shape
    ``[blocks, ...]``: see ``novoscale.checkpoint.sharded_format`` for how it is saved.

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
    ranks = math.prod(n for n, dim in sharded_dims(p) if dim == p.ndim - 1) if isinstance(p, DTensor) else 1
    return p.shape[-1] % (BLOCK * ranks) == 0


def sharded_dims(p: DTensor) -> list[tuple[int, int]]:
    """Over how many ranks which dimension of a DTensor is sharded."""
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
    return decoded(codes, scale.view(-1)[place : place + blocks], form).view(-1)[begin : begin + numel]


def write(
    exp_avg: Tensor,
    scale: Tensor | None,
    place: int,
    position: int,
    values: Tensor,
    bits: Tensor,
    active: Tensor,
    sharded: Tensor | None = None,
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
        sharded: of the only block, if it is sharded, the largest magnitude and whether it has any active
            element, as in ``kernels.Coefficients``.
    """
    numel = len(values)
    if scale is None:
        target = exp_avg.view(-1)[place : place + numel]
        target.copy_(torch.where(active, values.to(target.dtype), target))
        return
    begin = position % BLOCK
    blocks = (begin + numel - 1) // BLOCK + 1
    form = format_of(exp_avg, scale)

    def in_full_blocks(t: Tensor) -> Tensor:
        return torch.nn.functional.pad(t, (begin, blocks * BLOCK - begin - numel)).view(-1, BLOCK)

    largest = None if sharded is None else sharded[:1].view(torch.float32)
    codes, new_scale = encode(in_full_blocks(values), in_full_blocks(bits), form, largest)
    changed = in_full_blocks(active).any(dim=1) if sharded is None else sharded[1:] > 0
    for stored, new in ((exp_avg.view(-1, BLOCK // form.packed), codes), (scale.view(-1), new_scale)):
        target = stored[place : place + blocks]
        target.copy_(torch.where(changed.view(-1, *[1] * (target.ndim - 1)), new, target))
