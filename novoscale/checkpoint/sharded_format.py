"""A first moment in blocks in the form in which it is saved: that of the parameter, however it is sharded.

What a rank keeps of blocks is laid out for the kernels, one place for each block that it has a piece of, and
fits no other sharding. In a state dict the codes lie where their elements do, in the shape of the parameter,
and the scales by rows: so distributed checkpoints load on another number of ranks. A parameter whose rows are
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

from novoscale.sharding.blocks import BLOCK
from novoscale.sharding.collectives import all_reduce
from novoscale.sharding.dtensors import from_local, local_tensor
from novoscale.sharding.indices import finder, repeated
from novoscale.sharding.layout import Layout
from novoscale.sharding.tiles import tiles
from novoscale.state import formats, momentum
from novoscale.state.formats import Format
from novoscale.state.momentum import Stored


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


def in_sharded_format(p: Tensor, state: Mapping[str, Tensor]) -> bool:
    """Whether the first moment of a parameter is kept in the form in which it is saved."""
    return "exp_avg_scale" not in state or momentum.rows_are_blocks(p)


def saved(p: Tensor, state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The first moment of a parameter in the form in which it is saved; new tensors.

    A collective where a row is sharded, as by tensor parallelism along the last dimension: then each rank of
    the group gets the scales of full rows.

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
    form = formats.format_of(state["exp_avg"], state["exp_avg_scale"])
    (part,) = momentum.stored(layout, form.name)
    codes = formats.unpacked(local_tensor(state["exp_avg"]), form).view(torch.int8).view(-1)
    flat = torch.zeros(layout.numel, dtype=torch.int8, device=codes.device)
    for start, stop, places in _elements(part):
        flat[start:stop] = codes[places.to(codes.device)]
    width = _width(p, form)
    if form.packed > 1 and width == 1:  # one in each byte
        flat = flat.view(torch.uint8) & 15
    else:
        flat = formats.packed(flat, form).view(form.dtype)
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
    form = formats.known_format(given["exp_avg"], given.get("exp_avg_scale"))
    if form is None or not form.largest:
        return None
    rows, shape = _rows(p), local_tensor(p).shape
    width = _width(p, form)
    expected = ((*shape[:-1], shape[-1] // width), (*rows.local, rows.most))
    if momentum.rows_are_blocks(p) or (given["exp_avg"].shape, given["exp_avg_scale"].shape) != expected:
        return None
    (part,) = momentum.stored(layout, form.name)
    flat = given["exp_avg"] if width < form.packed else formats.unpacked(given["exp_avg"], form)
    flat = flat.view(torch.int8)
    codes = torch.zeros(part.length * BLOCK, dtype=torch.int8, device=flat.device)
    for start, stop, places in _elements(part):
        codes[places.to(flat.device)] = flat.reshape(-1)[start:stop]
    number, place = _blocks_of(part)
    scale = torch.zeros(part.length, dtype=torch.bfloat16, device=flat.device)
    scale[place] = given["exp_avg_scale"].reshape(-1)[rows.places(number).to(flat.device)]
    packed = formats.packed(codes, form).view(form.dtype)
    return {"exp_avg": packed.view(part.length, -1), "exp_avg_scale": scale}


def local_scale(p: DTensor, scale: Tensor) -> Tensor:
    """This rank's part of the scales of a DTensor, from all of them, if that is what is given.

    torch's ``set_optimizer_state_dict`` shards a full state as the present one is, which may have no scales.
    """
    rows = _rows(p)
    whole = momentum.rows_are_blocks(p)
    shape = (*p.shape[:-1], p.shape[-1] // BLOCK) if whole else (*p.shape[: rows.dims], rows.most)
    if tuple(scale.shape) != shape:
        return scale
    placements = p.placements if whole else _placements_of_rows(p, rows)
    local, offsets = compute_local_shape_and_global_offset(torch.Size(shape), p.device_mesh, placements)
    return scale[tuple(slice(o, o + n) for o, n in zip(offsets, local, strict=True))]


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
    sharding = momentum.sharded_dims(p) if isinstance(p, DTensor) else []
    ranks = [n for n, dim in sharding if dim == p.ndim - 1]
    if p.ndim < 2 or p.shape[-1] % BLOCK or len(ranks) > 1:
        return 1
    return form.packed if -(-p.shape[-1] // math.prod(ranks)) % form.packed == 0 else 1


def _elements(part: Stored) -> Iterator[tuple[int, int, Tensor]]:
    """The elements start..stop of a tensor, and the places of their codes; some at a time."""
    for s, (first, each) in zip(part.fragments, part.places, strict=True):
        for tile in tiles([s]):
            places = (first + tile.runs * each) * BLOCK + tile.offsets % BLOCK + tile.within
            yield tile.start, tile.stop, places.view(-1)


def _blocks_of(part: Stored) -> tuple[Tensor, Tensor]:
    """The number in its parameter of each block that a rank has a piece of, and its place."""
    found = []
    for s, (first, each) in zip(part.fragments, part.places, strict=True):
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
    """The scales of full rows: of a block, all ranks that have a piece of it have the same."""
    if isinstance(p, DTensor):
        for dim, placement in enumerate(p.placements):
            shards_rows = not placement.is_replicate() and cast(Shard, placement).dim >= rows.dims
            if shards_rows and p.device_mesh.size(dim) > 1:
                bits = all_reduce(bits, dist.ReduceOp.MAX, p.device_mesh.get_group(dim))
    return bits.to(torch.int16).view(torch.bfloat16)
