"""What a rank does in the tests of sharded blocks: DTensors in any placement, against one process."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import fixed_gradients
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from novoscale import NovoGrad

# Rows of no whole blocks, several rows in a block, one dimension, three; whole blocks on two ranks and not on
# three.
SHAPES = {"a": (96, 130), "b": (5000,), "c": (17, 5, 61), "d": (64, 9, 9), "e": (3, 1500), "f": (40, 256)}
STEPS = 4


def in_any_placement(options: dict[str, Any], mesh_shape: tuple[int, ...]) -> dict[str, list[str]]:
    """For each way to place parameters over a mesh, those that do not end with the bits of one process."""
    mesh = init_device_mesh("cpu", mesh_shape)
    found = {}
    for sharding in itertools.product([None, 0, 1, 2], repeat=len(mesh_shape)):
        needed = max((dim for dim in sharding if dim is not None), default=0)
        shapes = {name: shape for name, shape in SHAPES.items() if len(shape) > needed}
        placements = [Replicate() if dim is None else Shard(dim) for dim in sharding]
        params = {n: distribute_tensor(w, mesh, placements) for n, w in weights(shapes).items()}
        found[str(sharding)] = differing(params, options, shapes)
    return {sharding: names for sharding, names in found.items() if names}


def under_tensor_parallelism(options: dict[str, Any], data_world: int) -> list[str]:
    """The same of two layers, sharded along rows and along columns, with FSDP2 over the rest of the mesh."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (data_world, world // data_world), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(61, 150), nn.Linear(150, 61))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights(shapes).values(), strict=True):
            p.copy_(w)
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    if data_world > 1:
        fully_shard(model, mesh=mesh["dp"])
    return differing(dict(model.named_parameters()), options, shapes)


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(len(name) + sum(shape)))
        for name, shape in shapes.items()
    }


def differing(
    params: dict[str, Tensor], options: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> list[str]:
    """The parameters of which this rank has another bit than one process, of weights or first moments."""
    expected = {name: (w, m) for name, _, w, m in trained(weights(shapes), options)}
    found = set()
    for name, position, *values in trained(params, options):
        rows = zip(values, expected[name], strict=True)
        if not all(torch.equal(mine, whole[position : position + len(mine)]) for mine, whole in rows):
            found.add(name)
    return sorted(found)


def trained(tensors: dict[str, Tensor], options: dict[str, Any]) -> list[fixed_gradients.Piece]:
    params = {name: nn.Parameter(t.detach().clone()) for name, t in tensors.items()}
    optimizer = NovoGrad([*params.items()], **{"preset": "paper", **options})
    train([*params.values()], optimizer)
    return fixed_gradients.pieces(optimizer)


def train(params: Sequence[Tensor], optimizer: NovoGrad, steps: Iterable[int] = range(STEPS)) -> None:
    for step in steps:
        grads = fixed_gradients.gradients(step, [p.shape for p in params])
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
            if isinstance(p, DTensor):
                p.grad = placed_as(p, grad)
        optimizer.step()


def placed_as(p: DTensor, whole: Tensor) -> DTensor:
    """``whole`` sharded as a parameter; ``distribute_tensor`` takes no uneven _StridedShard."""
    local, mesh = whole, p.device_mesh
    strided = any(hasattr(x, "split_factor") for x in p.placements)
    for dim in reversed(range(mesh.ndim)) if strided else range(mesh.ndim):
        if not p.placements[dim].is_replicate():
            rank, size, along = mesh.get_local_rank(dim), mesh.size(dim), p.placements[dim].dim
            each = -(-local.shape[along] // size)
            first = min(rank * each, local.shape[along])
            local = local.narrow(along, first, min(each, local.shape[along] - first))
    return DTensor.from_local(
        local.contiguous(), mesh, p.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


# ---- checkpoints ---------------------------------------------------------------------------------------

PLAN = {"0": ColwiseParallel(), "1": RowwiseParallel(), "2": RowwiseParallel(), "3": ColwiseParallel()}
MORE = 2  # steps after a checkpoint


def resumed(options: dict[str, Any], folder: str, sharding: tuple[int, ...] | None, save: bool) -> set[str]:
    """Train and save under one sharding, or load and go on under another: the parameters with other bits
    then.

    ``sharding``: None: not at all; ``(n,)``: FSDP2; ``(1, n)``: tensor parallelism; ``(m, n)``: both.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = wrapped(sharding)
    optimizer = NovoGrad(model.named_parameters(), **{"preset": "paper", **options})
    if save:
        train([*model.parameters()], optimizer)
    model_state, state = get_state_dict(model, optimizer)
    both = {"model": model_state, "optimizer": state}
    if save:
        dcp.save(both, checkpoint_id=folder)
        return set()
    dcp.load(both, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=state)
    train([*model.parameters()], optimizer, range(STEPS, STEPS + MORE))
    whole = wrapped(None)
    uninterrupted = NovoGrad(whole.named_parameters(), **{"preset": "paper", **options})
    train([*whole.parameters()], uninterrupted, range(STEPS + MORE))
    expected = {name: (w, m) for name, _, w, m in fixed_gradients.pieces(uninterrupted)}
    return {
        name
        for name, position, *values in fixed_gradients.pieces(optimizer)
        for mine, its in zip(values, expected[name], strict=True)
        if not torch.equal(mine, its[position : position + len(mine)])
    }


def rounded_when_loaded(
    options: dict[str, Any], sharding: tuple[int, ...] | None
) -> list[fixed_gradients.Piece]:
    """Weights, and first moments that were float32 and are in blocks since they were loaded."""
    model = wrapped(sharding)
    exact = NovoGrad(model.named_parameters(), **{"preset": "paper", **options, "momentum_dtype": "float32"})
    train([*model.parameters()], exact)
    optimizer = NovoGrad(model.named_parameters(), allow_lossy_load=True, **{"preset": "paper", **options})
    optimizer.load_state_dict(exact.state_dict())
    return fixed_gradients.pieces(optimizer)


def wrapped(sharding: tuple[int, ...] | None) -> nn.Module:
    torch.manual_seed(3)
    layers = [nn.Linear(61, 150), nn.Linear(150, 61), nn.Linear(256, 40), nn.Linear(2, 4500)]
    model = nn.Sequential(*layers)
    if sharding is None:
        return model
    if len(sharding) == 1:
        return fully_shard(model, mesh=init_device_mesh("cpu", sharding))
    mesh = init_device_mesh("cpu", sharding, mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], PLAN)
    return fully_shard(model, mesh=mesh["dp"]) if sharding[0] > 1 else model
