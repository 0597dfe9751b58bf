"""What each rank runs for the tests of states and distributed checkpoints of sharded models."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import fixed_gradients
import torch
import torch.distributed as dist
from sharded_models import LR, fsdp_model, full, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from novoscale import NovoGrad


def fixed_pieces(options: dict[str, Any], shape: tuple[int, ...], bfloat16: bool) -> Any:
    """What this rank holds after steps with gradients that do not depend on the weights."""
    names = ("shard",) if len(shape) == 1 else ("replicate", "shard")
    model = fixed_gradients.FixedGradients().to(torch.bfloat16 if bfloat16 else torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    optimizer = NovoGrad(model.named_parameters(), **{"preset": "paper", **options})
    for step in range(fixed_gradients.STEPS):
        optimizer.zero_grad()
        model(torch.tensor(step)).backward()
        optimizer.step()
    return fixed_gradients.pieces(optimizer)


WHOLE_BLOCKS = {"a": (36, 256), "b": (33,), "c": (7, 8, 128), "d": (40, 128), "e": (3, 1536)}
OTHERS = {"a": (37, 130), "b": (33,), "c": (5000,)}


def fixed_checkpoint(
    options: dict[str, Any], folder: str, what: str, shapes: dict[str, tuple[int, ...]] = WHOLE_BLOCKS
) -> Any:
    """First moments saved as a distributed checkpoint, or loaded from it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = fixed_gradients.FixedGradients(shapes)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = NovoGrad(model.named_parameters(), lr=LR, **{"preset": "paper", **options})
    for step in range(2 if what == "save" else 0):
        optimizer.zero_grad()
        model(torch.tensor(step)).backward()
        optimizer.step()
    m, o = get_state_dict(model, optimizer)
    if what == "save":
        dcp.save({"model": m, "optimizer": o}, checkpoint_id=folder)
    else:
        dcp.load({"model": m, "optimizer": o}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=m, optim_state_dict=o)
    return fixed_gradients.pieces(optimizer)


def carried(options: dict[str, Any], folder: str) -> dict[str, bool]:
    """Whether a state dict survives what users do with it, and the training goes on to the same bits."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    rank, world = dist.get_rank(), dist.get_world_size()

    def made() -> tuple[nn.Module, Any]:
        model = fsdp_model(init_device_mesh("cpu", (world,)))
        return model, NovoGrad(model.named_parameters(), lr=LR, **{"preset": "paper", **options})

    model, optimizer = made()
    train(model, optimizer, rank, world, 2)
    weights = copy.deepcopy(model.state_dict())
    saved = optimizer.state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    carriers = {
        "deepcopy": copy.deepcopy(saved),
        "pickle": pickle.loads(pickle.dumps(saved)),
        "torch.save": torch.load(file, weights_only=False),
    }
    dcp.async_save(get_optimizer_state_dict(model, optimizer), checkpoint_id=folder).result()
    train(model, optimizer, rank, world, 2, first=2)
    found = {}
    for name, state in carriers.items():
        other, fresh = made()
        other.load_state_dict(weights)
        fresh.load_state_dict(state)
        train(other, fresh, rank, world, 2, first=2)
        rows = zip(model.parameters(), other.parameters(), strict=True)
        found[name] = all((full(p) == full(q)).all() for p, q in rows)
    return found


def second_moments(options: dict[str, Any], folder: str, save: bool) -> dict[str, Any]:
    """Every second moment, whole, saved as a distributed checkpoint or loaded from it on any mesh."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    shapes = {"a": (36, 256), "b": (33,), "c": (7, 8, 128), "d": (5, 3, 2, 3)}
    model = fixed_gradients.FixedGradients(shapes)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = NovoGrad(model.named_parameters(), lr=LR, **{"preset": "paper", **options})
    for step in range(2 if save else 0):
        optimizer.zero_grad()
        model(torch.tensor(step)).backward()
        optimizer.step()
    m, o = get_state_dict(model, optimizer)
    if save:
        dcp.save({"model": m, "optimizer": o}, checkpoint_id=folder)
    else:
        dcp.load({"model": m, "optimizer": o}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=m, optim_state_dict=o)
    return {
        f"{name}.{key}": full(value)
        for name, p in model.named_parameters()
        for key, value in optimizer.state[p].items()
        if key.startswith("exp_avg_sq") or key == "step"
    }


def reshard(folder: str, save: bool) -> dict[str, Any]:
    """Three steps and a distributed checkpoint; or loading it, on any number of ranks, and three more."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    rank, world = dist.get_rank(), dist.get_world_size()
    model = fsdp_model(init_device_mesh("cpu", (world,)))
    optimizer = NovoGrad(model.parameters(), lr=LR, preset="paper")
    if save:
        train(model, optimizer, rank, world, 3)
        m, o = get_state_dict(model, optimizer)
        dcp.save({"model": m, "optimizer": o}, checkpoint_id=folder)
    else:
        m, o = get_state_dict(model, optimizer)
        dcp.load({"model": m, "optimizer": o}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=m, optim_state_dict=o)
    train(model, optimizer, rank, world, 3, first=3)
    return {n: full(p) for n, p in model.named_parameters()}
