"""DTensors, which say themselves how they are sharded: FSDP2, HSDP, tensor parallelism."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from novoscale.sharding import blocks
from novoscale.sharding.blocks import BLOCK, ShardedBlocks
from novoscale.sharding.indices import repeated
from novoscale.sharding.layers import LayoutError, Parameter
from novoscale.sharding.layout import Fragment, Layout, LocalShard, Reduction, Span


def sharded(parameter: Parameter, tensor: DTensor) -> Layout:
    """The layout of this rank's part of a DTensor parameter.

    A parameter that is one layer, or a few, has their second moments on every rank of its mesh. One whose
    layers are the rows has those of the rows that this rank holds: they are sharded by the placements of the
    other dimensions only.

    Raises:
        LayoutError: if the parameter is a partial sum.
    """
    local, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    rows = by_rows(tensor, parameter)
    shard = LocalShard(parameter, 0, parameter.layers)
    if rows:  # where nothing is held, the offset is the end
        each = parameter.layers // tensor.shape[0]
        shard = LocalShard(parameter, offsets[0] * each, (offsets[0] + local[0]) * each)
    scattered = rows and any(map(shards_rows, tensor.placements))
    reductions = []
    for dim, placement in enumerate(tensor.placements):
        if placement.is_partial():
            raise LayoutError(
                f"{parameter.name} is a DTensor with the placement {placement}: each rank holds a part of a "
                "sum, not a part of the parameter. Redistribute it to Shard or Replicate"
            )
        if not placement.is_replicate():
            reductions.append(
                Reduction(
                    tensor.device_mesh.get_group(dim),
                    () if rows and shards_rows(placement) else (Span(0, shard.count),),
                    (parameter,),
                    (Span(0, shard.columns),) if parameter.factored else (),
                    (Span(0, 1),),
                    (Span(0, 1),) if scattered else (),
                )
            )
    fragments = tuple(_box(tensor.shape, local, offsets)) if math.prod(local) else ()
    sharded_blocks = partial(
        _sharded_blocks, parameter.name, tuple(tensor.shape), tensor.device_mesh, tensor.placements
    )
    numel, votes = math.prod(local), bool(reductions)
    return Layout(numel, (shard,), fragments, tuple(reductions), scattered, sharded_blocks, votes)


def by_rows(tensor: Tensor, parameter: Parameter) -> bool:
    """Whether the layers of a parameter are its rows: sharded along its first dimension, none is split.

    Of a factored one, a row may be an index of several dimensions.
    """
    return parameter.layers > 1 and parameter.layers % tensor.shape[0] == 0


def shards_rows(placement: Placement) -> bool:
    """Whether a placement of a DTensor shards it along its first dimension."""
    return not placement.is_replicate() and cast(Shard, placement).dim == 0


def _box(shape: Sequence[int], local: Sequence[int], offsets: Sequence[int]) -> Iterator[Fragment]:
    """The fragments of a tensor of shape ``local`` that lies at ``offsets`` in a parameter."""
    sharded = [d for d in range(len(shape)) if local[d] != shape[d]]
    last = sharded[-1] if sharded else 0  # within its elements the order is that of the parameter
    run, stride = math.prod(local[last:]), math.prod(shape[last:])
    steps = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    begin = sum(o * s for o, s in zip(offsets, steps, strict=True))
    count = local[last - 1] if last > 0 else 1  # runs that are `stride` apart
    start = 0
    for index in product(*(range(n) for n in local[: max(last - 1, 0)])):
        offset = begin + sum(i * s for i, s in zip(index, steps, strict=False))
        stop = start + count * run
        yield Fragment(start, stop, 0, offset, *((run, stride) if count > 1 else ()))
        start = stop


def _sharded_blocks(
    name: str, shape: tuple[int, ...], mesh: DeviceMesh, placements: Sequence[Placement]
) -> ShardedBlocks:
    """The blocks of a DTensor's parameter that are sharded.

    Raises:
        LayoutError: it is sharded in a way that is not known here.
    """
    sharded = [dim for dim, x in enumerate(placements) if not x.is_replicate() and mesh.size(dim) > 1]
    numel = math.prod(shape)
    if numel < blocks.SMALL or not sharded or _shards_between_blocks(shape, mesh, placements, sharded):
        return blocks.NONE
    mine = [mesh.get_local_rank(dim) for dim in sharded]
    own = _part_at(shape, mesh, placements, sharded, mine)
    if own[0] != list(compute_local_shape_and_global_offset(torch.Size(shape), mesh, placements)[0]):
        raise LayoutError(
            f"{name} is a DTensor with the placements {tuple(placements)}, of which the blocks of its first "
            'moment are not known. Use momentum_dtype="float32" or "bfloat16" for it'
        )
    runs, coordinates = [], []
    for coordinate in product(*(range(mesh.size(dim)) for dim in sharded)):
        local, offsets = _part_at(shape, mesh, placements, sharded, coordinate)
        for s in _box(shape, local, offsets) if math.prod(local) else ():
            runs.append((s.offset, s.stride, s.run or s.numel, s.numel // (s.run or s.numel)))
            coordinates.append(coordinate)
    offset, stride, length, count = torch.tensor(runs, dtype=torch.int64, device="cpu").unbind(1)
    fragment, nth = repeated(count)
    number, run = blocks.sharded_at_ends(
        offset[fragment] + nth * stride[fragment], length[fragment], torch.full_like(fragment, numel)
    )
    places = torch.tensor(coordinates, dtype=torch.int64, device="cpu")[fragment[run]]
    return blocks.of_mesh(number, places, mine, [mesh.get_group(dim) for dim in sharded])


def _part_at(
    shape: Sequence[int],
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    sharded: Sequence[int],
    coordinate: Sequence[int],
) -> tuple[list[int], list[int]]:
    """The local shape at a place of a mesh, along its dimensions ``sharded``, and its offsets."""
    local, offsets = list(shape), [0] * len(shape)
    # FSDP shards what tensor parallelism has sharded, though its dimension of the mesh is before:
    # _StridedShard.
    strided = sorted(
        zip(sharded, coordinate, strict=True), key=lambda at: hasattr(placements[at[0]], "split_factor")
    )
    for mesh_dim, index in strided:
        dim = cast(Shard, placements[mesh_dim]).dim
        each = -(-local[dim] // mesh.size(mesh_dim))
        first = min(each * index, local[dim])
        offsets[dim] += first
        local[dim] = min(each, local[dim] - first)
    return local, offsets


def _shards_between_blocks(
    shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement], sharded: Sequence[int]
) -> bool:
    """Whether the sizes alone say that no block is sharded: the usual case, for a thousand ranks too."""
    last = max(cast(Shard, placements[dim]).dim for dim in sharded)
    inner = math.prod(shape[last + 1 :])
    sharding = [dim for dim in sharded if cast(Shard, placements[dim]).dim == last]
    if len(sharding) == 1:
        inner *= -(-shape[last] // mesh.size(sharding[0]))
    return inner % BLOCK == 0 and (last == 0 or math.prod(shape[last:]) % BLOCK == 0)


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    # Not to_local(), which makes a view of it: for a thousand tensors that is most of a step's time.
    local = tensor._local_tensor
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def has_dtensors(tensors: Sequence[Any]) -> bool:
    """Whether any of them is one. By type: there may be a thousand."""
    return any(issubclass(kind, DTensor) for kind in set(map(type, tensors)))


def local_tensors(tensors: list[Any]) -> list[Tensor]:
    """Of each :func:`local_tensor`: at each step, of which it would be the most for 1,000 layers."""
    if not has_dtensors(tensors):
        return tensors
    if set(map(type, tensors)) == {DTensor}:
        local = [*map(attrgetter("_local_tensor"), tensors)]
        if AsyncCollectiveTensor not in set(map(type, local)):
            return local
    return [*map(local_tensor, tensors)]


def from_local(local: Tensor, p: DTensor, shape: Sequence[int], placements: Sequence[Placement]) -> DTensor:
    """A DTensor of another shape on the mesh of ``p``, of which ``local`` is this rank's part."""
    stride = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
    return DTensor.from_local(
        local, p.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def local_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """This rank's part of the gradient of each parameter: see :func:`local_gradient`."""
    gradients: list[Any] = [p.grad for p in params]
    if not has_dtensors(params):
        return gradients
    placements = [[getattr(t, "placements", None) for t in tensors] for tensors in (params, gradients)]
    return local_tensors(gradients) if placements[0] == placements[1] else [*map(local_gradient, params)]


def local_gradient(p: Tensor) -> Tensor:
    """This rank's part of a parameter's gradient, placed as the parameter is. A collective, if it is not.

    A gradient that is placed otherwise (a partial sum, under tensor parallelism) is redistributed.
    """
    grad = p.grad
    assert grad is not None
    if isinstance(p, DTensor) and isinstance(grad, DTensor) and grad.placements != p.placements:
        grad = grad.redistribute(placements=p.placements)
    return local_tensor(grad)
