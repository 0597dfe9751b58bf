"""DTensors, which say themselves how they are cut: FSDP2, HSDP, tensor parallelism."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from novoscale import blocks
from novoscale.blocks import BLOCK, CutBlocks
from novoscale.layout import (
    Completion,
    Held,
    Layout,
    LayoutError,
    Parameter,
    Segment,
    Span,
    has_dtensors,
    local_tensor,
    local_tensors,
    repeated,
)


def sharded(parameter: Parameter, tensor: DTensor) -> Layout:
    """The layout of this rank's part of a DTensor parameter.

    A parameter that is one layer, or a few, has their second moments on every rank of its mesh. One whose
    layers are the rows has those of the rows that this rank holds: they are cut by the placements of the
    other dimensions only.

    Raises:
        LayoutError: if the parameter is a partial sum.
    """
    local, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    rows = by_rows(tensor, parameter)
    held = Held(parameter, 0, parameter.layers)
    if rows:  # where nothing is held, the offset is the end
        each = parameter.layers // tensor.shape[0]
        held = Held(parameter, offsets[0] * each, (offsets[0] + local[0]) * each)
    scattered = rows and any(map(cuts_rows, tensor.placements))
    completions = []
    for dim, placement in enumerate(tensor.placements):
        if placement.is_partial():
            raise LayoutError(
                f"{parameter.name} is a DTensor with the placement {placement}: each rank holds a part of a "
                "sum, not a part of the parameter. Redistribute it to Shard or Replicate"
            )
        if not placement.is_replicate():
            completions.append(
                Completion(
                    tensor.device_mesh.get_group(dim),
                    () if rows and cuts_rows(placement) else (Span(0, held.count),),
                    (parameter,),
                    (Span(0, held.columns),) if parameter.factored else (),
                    (Span(0, 1),),
                    (Span(0, 1),) if scattered else (),
                )
            )
    segments = tuple(_box(tensor.shape, local, offsets)) if math.prod(local) else ()
    cut_blocks = partial(
        _cut_blocks, parameter.name, tuple(tensor.shape), tensor.device_mesh, tensor.placements
    )
    return Layout(math.prod(local), (held,), segments, tuple(completions), scattered, cut_blocks)


def by_rows(tensor: Tensor, parameter: Parameter) -> bool:
    """Whether the layers of a parameter are its rows, so that one cut along its first dimension cuts none.

    Of a factored one, a row may be an index of several dimensions.
    """
    return parameter.layers > 1 and parameter.layers % tensor.shape[0] == 0


def cuts_rows(placement: Placement) -> bool:
    """Whether a placement of a DTensor cuts it along its first dimension."""
    return not placement.is_replicate() and cast(Shard, placement).dim == 0


def _box(shape: Sequence[int], local: Sequence[int], offsets: Sequence[int]) -> Iterator[Segment]:
    """The segments of a tensor of shape ``local`` that lies at ``offsets`` in a parameter."""
    cut = [d for d in range(len(shape)) if local[d] != shape[d]]
    last = cut[-1] if cut else 0  # within its elements the order is that of the parameter
    run, stride = math.prod(local[last:]), math.prod(shape[last:])
    steps = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    begin = sum(o * s for o, s in zip(offsets, steps, strict=True))
    count = local[last - 1] if last > 0 else 1  # runs that are `stride` apart
    start = 0
    for index in product(*(range(n) for n in local[: max(last - 1, 0)])):
        offset = begin + sum(i * s for i, s in zip(index, steps, strict=False))
        stop = start + count * run
        yield Segment(start, stop, 0, offset, *((run, stride) if count > 1 else ()))
        start = stop


def _cut_blocks(
    name: str, shape: tuple[int, ...], mesh: DeviceMesh, placements: Sequence[Placement]
) -> CutBlocks:
    """The blocks of a DTensor's parameter that are cut.

    Raises:
        LayoutError: it is cut in a way that is not known here.
    """
    cut = [dim for dim, x in enumerate(placements) if not x.is_replicate() and mesh.size(dim) > 1]
    numel = math.prod(shape)
    if numel < blocks.SMALL or not cut or _cuts_between_blocks(shape, mesh, placements, cut):
        return blocks.NONE
    mine = [mesh.get_local_rank(dim) for dim in cut]
    own = _part_at(shape, mesh, placements, cut, mine)
    if own[0] != list(compute_local_shape_and_global_offset(torch.Size(shape), mesh, placements)[0]):
        raise LayoutError(
            f"{name} is a DTensor with the placements {tuple(placements)}, of which the blocks of its first "
            'moment are not known. Use momentum_dtype="float32" or "bfloat16" for it'
        )
    runs, coordinates = [], []
    for coordinate in product(*(range(mesh.size(dim)) for dim in cut)):
        local, offsets = _part_at(shape, mesh, placements, cut, coordinate)
        for s in _box(shape, local, offsets) if math.prod(local) else ():
            runs.append((s.offset, s.stride, s.run or s.numel, s.numel // (s.run or s.numel)))
            coordinates.append(coordinate)
    offset, stride, length, count = torch.tensor(runs, dtype=torch.int64, device="cpu").unbind(1)
    segment, nth = repeated(count)
    number, run = blocks.cut_at_ends(
        offset[segment] + nth * stride[segment], length[segment], torch.full_like(segment, numel)
    )
    places = torch.tensor(coordinates, dtype=torch.int64, device="cpu")[segment[run]]
    return blocks.of_mesh(number, places, mine, [mesh.get_group(dim) for dim in cut])


def _part_at(
    shape: Sequence[int],
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    cut: Sequence[int],
    coordinate: Sequence[int],
) -> tuple[list[int], list[int]]:
    """The local shape at a place of a mesh, along its dimensions ``cut``, and its offsets."""
    local, offsets = list(shape), [0] * len(shape)
    # FSDP cuts what tensor parallelism has cut, though its dimension of the mesh is before: _StridedShard.
    strided = sorted(
        zip(cut, coordinate, strict=True), key=lambda at: hasattr(placements[at[0]], "split_factor")
    )
    for mesh_dim, index in strided:
        dim = cast(Shard, placements[mesh_dim]).dim
        each = -(-local[dim] // mesh.size(mesh_dim))
        first = min(each * index, local[dim])
        offsets[dim] += first
        local[dim] = min(each, local[dim] - first)
    return local, offsets


def _cuts_between_blocks(
    shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement], cut: Sequence[int]
) -> bool:
    """Whether it is plain from the sizes that no block is cut: the usual case, for a thousand ranks too."""
    last = max(cast(Shard, placements[dim]).dim for dim in cut)
    inner = math.prod(shape[last + 1 :])
    cutting = [dim for dim in cut if cast(Shard, placements[dim]).dim == last]
    if len(cutting) == 1:
        inner *= -(-shape[last] // mesh.size(cutting[0]))
    return inner % BLOCK == 0 and (last == 0 or math.prod(shape[last:]) % BLOCK == 0)


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
