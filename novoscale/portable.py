"""A first moment in blocks in the form in which it is saved: that of the parameter, however it is cut.

What a rank keeps of blocks is laid out for the kernels, one place for each block that it has a piece of, and
fits no other cut. In a state dict the codes lie where their elements do, in the shape of the parameter, and
the scales by rows: so distributed checkpoints load on another number of ranks. A parameter whose rows are
whole blocks on every rank is kept in that form from the start, see ``momentum.allocate``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from novoscale import momentum
from novoscale.blocks import BLOCK, finder
from novoscale.collectives import all_reduce
from novoscale.dtensors import from_local
from novoscale.layout import Layout, local_tensor, repeated
from novoscale.momentum import Format, Stored

TILE = 1 << 20  # elements whose places are computed at once, of 8 bytes each


@dataclass(frozen=True)
class _Rows:
    """How the scales of a parameter are saved: for each of its rows those of all blocks that it is in.

    A row is an index of the first dimension; of all dimensions but the last, where that is whole blocks; a
    vector is one row.

    Attributes:
        shape: of the parameter.
        dims: of how many dimensions a row is an index.
        local: the shape of this rank's rows.
        offsets: where they begin.
    """

    shape: tuple[int, ...]
    dims: int
    local: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def length(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[self.dims :])

    @property
    def most(self) -> int:
        """At least as many blocks as any row is in."""
        if self.length % BLOCK == 0 or self.dims == 0:
            return -(-self.length // BLOCK)
        return (self.length + BLOCK - 2) // BLOCK + 1

    def blocks(self) -> Tensor:
        """The blocks of this rank's rows, int64 ``[rows, most]``; -1: there is no other."""
        rows = torch.zeros(1, dtype=torch.int64, device="cpu")
        for d in range(self.dims):
            rows = rows[:, None] * self.shape[d] + self.offsets[d] + torch.arange(self.local[d], device="cpu")
            rows = rows.view(-1)
        found = rows[:, None] * self.length // BLOCK + torch.arange(self.most, device="cpu")
        return torch.where(found * BLOCK < (rows[:, None] + 1) * self.length, found, -1)

    def places(self, blocks: Tensor) -> Tensor:
        """Where among the scales of this rank's rows that of each of some blocks is. They are of its rows."""
        first = sum(o * math.prod(self.shape[d + 1 : self.dims]) for d, o in enumerate(self.offsets))
        row = (blocks * BLOCK // self.length).clamp(min=first)
        place, rest = torch.zeros_like(row), row
        for d in range(self.dims):
            step = math.prod(self.shape[d + 1 : self.dims])
            place = place * self.local[d] + rest // step - self.offsets[d]
            rest = rest % step
        return place * self.most + blocks - row * self.length // BLOCK


def is_portable(p: Tensor, state: Mapping[str, Tensor]) -> bool:
    """Whether the first moment of a parameter is kept in the form in which it is saved."""
    return "exp_avg_scale" not in state or momentum.rows_are_blocks(p)


def saved(p: Tensor, state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The first moment of a parameter in the form in which it is saved; new tensors.

    A collective where a row is cut, as by tensor parallelism along the last dimension: then each rank of the
    group gets the scales of whole rows.

    Args:
        p: the parameter.
        state: its state.
        layout: its layout; it is one parameter.

    Returns:
        ``exp_avg``: codes, int8, or uint8 with a code of int4 in the lower half of each, in the shape of the
        parameter; two in each uint8 where the last dimension is whole blocks, and no rank ends within one.
        ``exp_avg_scale``: bfloat16, the dimensions of ``_Rows`` and the blocks of a row. DTensors where the
        parameter is one.
    """
    form = momentum.format_of(state["exp_avg"], state["exp_avg_scale"])
    (part,) = momentum.stored(layout, form.name)
    codes = momentum.unpacked(local_tensor(state["exp_avg"]), form).view(-1)
    flat = torch.zeros(layout.numel, dtype=torch.int8, device=codes.device)
    for start, stop, places in _elements(part):
        flat[start:stop] = codes[places.to(codes.device)]
    width = _width(p, form)
    if form.packed > 1:  # one in each byte, or as they are kept
        flat = flat.view(torch.uint8) & 15 if width == 1 else momentum.packed(flat, form)
    rows = _rows(p)
    scale = _gathered(p, rows, _of_rows(rows, part, local_tensor(state["exp_avg_scale"])))
    found = {
        "exp_avg": flat.view(*local_tensor(p).shape[:-1], local_tensor(p).shape[-1] // width),
        "exp_avg_scale": scale.view(*rows.local, rows.most),
    }
    if not isinstance(p, DTensor):
        return found
    shapes = ((*p.shape[:-1], p.shape[-1] // width), (*p.shape[: rows.dims], rows.most))
    placements = (p.placements, _placements_of_rows(p, rows))
    given = zip(found.items(), shapes, placements, strict=True)
    return {key: from_local(t, p, shape, at) for (key, t), shape, at in given}


def loaded(p: Tensor, given: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor] | None:
    """What :func:`saved` was made of, from local tensors; None if they are not in that form."""
    if "exp_avg_scale" not in given or given["exp_avg"].dtype not in (torch.int8, torch.uint8):
        return None
    form = momentum.format_of(given["exp_avg"], given["exp_avg_scale"])
    rows, shape = _rows(p), local_tensor(p).shape
    width = _width(p, form)
    expected = ((*shape[:-1], shape[-1] // width), (*rows.local, rows.most))
    if momentum.rows_are_blocks(p) or (given["exp_avg"].shape, given["exp_avg_scale"].shape) != expected:
        return None
    (part,) = momentum.stored(layout, form.name)
    flat = given["exp_avg"].view(torch.int8)
    if width == form.packed:
        flat = momentum.unpacked(given["exp_avg"], form)
    codes = torch.zeros(part.length * BLOCK, dtype=torch.int8, device=flat.device)
    for start, stop, places in _elements(part):
        codes[places.to(flat.device)] = flat.reshape(-1)[start:stop]
    number, place = _blocks_of(part)
    scale = torch.zeros(part.length, dtype=torch.bfloat16, device=flat.device)
    scale[place] = given["exp_avg_scale"].reshape(-1)[rows.places(number).to(flat.device)]
    return {"exp_avg": momentum.packed(codes, form).view(part.length, -1), "exp_avg_scale": scale}


def _rows(p: Tensor) -> _Rows:
    shape = tuple(p.shape)
    dims = 0 if p.ndim < 2 else p.ndim - 1 if shape[-1] % BLOCK == 0 else 1
    if not isinstance(p, DTensor):
        return _Rows(shape, dims, shape[:dims], (0,) * dims)
    local, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    # Where nothing is held, the offset is the end.
    return _Rows(shape, dims, tuple(local[:dims]), tuple(offsets[:dims]))


def _placements_of_rows(p: DTensor, rows: _Rows) -> list[Placement]:
    """A rank that has a part of a row has all of its scales."""
    return [
        x if not x.is_replicate() and cast(Shard, x).dim < rows.dims else Replicate() for x in p.placements
    ]


def _width(p: Tensor, form: Format) -> int:
    """How many codes are in an element: of int4 two only where no rank's rows end within one."""
    cutting = momentum.cuts(p) if isinstance(p, DTensor) else []
    ranks = [n for n, dim in cutting if dim == p.ndim - 1]
    if p.ndim < 2 or p.shape[-1] % BLOCK or len(ranks) > 1:
        return 1
    return form.packed if -(-p.shape[-1] // math.prod(ranks)) % form.packed == 0 else 1


def _elements(part: Stored) -> Iterator[tuple[int, int, Tensor]]:
    """The elements start..stop of a tensor, and the places of their codes; some at a time."""
    for s, (first, each) in zip(part.segments, part.places, strict=True):
        run = s.run or s.numel
        runs = max(TILE // run, 1)
        for nth in range(0, s.numel // run, runs):
            number = torch.arange(nth, min(nth + runs, s.numel // run), device="cpu")[:, None]
            for left in range(0, run, TILE):
                within = torch.arange(left, min(left + TILE, run), device="cpu")
                place = (first + number * each) * BLOCK + (s.offset + number * s.stride) % BLOCK + within
                start = s.start + nth * run + left
                yield start, start + place.numel(), place.view(-1)


def _blocks_of(part: Stored) -> tuple[Tensor, Tensor]:
    """The number in its parameter of each block that a rank has a piece of, and its place."""
    found = []
    for s, (first, each) in zip(part.segments, part.places, strict=True):
        run = s.run or s.numel
        nth = torch.arange(s.numel // run, device="cpu")
        position = s.offset + nth * s.stride
        begin = position // BLOCK
        index, block = repeated((position + run - 1) // BLOCK + 1 - begin)
        found.append(torch.stack((begin[index] + block, first + nth[index] * each + block)))
    number, place = torch.cat([torch.empty((2, 0), dtype=torch.int64, device="cpu"), *found], dim=1)
    return number, place


def _of_rows(rows: _Rows, part: Stored, scale: Tensor) -> Tensor:
    """The scales of this rank's rows, as bits; 0 of blocks that it has no piece of."""
    number, place = _blocks_of(part)
    wanted = rows.blocks()
    if not len(number):
        return torch.zeros(wanted.shape, dtype=torch.int32, device=scale.device)
    at = finder(number)(wanted)
    bits = scale.view(torch.int16).int()[place[at].to(scale.device)]
    return torch.where((at >= 0).to(scale.device), bits, 0)


def _gathered(p: Tensor, rows: _Rows, bits: Tensor) -> Tensor:
    """The scales of whole rows: of a block, all ranks that have a piece of it have the same."""
    if isinstance(p, DTensor):
        for dim, placement in enumerate(p.placements):
            cuts = not placement.is_replicate() and cast(Shard, placement).dim >= rows.dims
            if cuts and p.device_mesh.size(dim) > 1:
                bits = all_reduce(bits, dist.ReduceOp.MAX, p.device_mesh.get_group(dim))
    return bits.to(torch.int16).view(torch.bfloat16)
