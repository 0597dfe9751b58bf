"""What each rank runs for the tests of torch.distributed.checkpoint on other ranks."""

from __future__ import annotations

from typing import Any

import fixed_gradients
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from novoscale import NovoGrad

HALF = fixed_gradients.STEPS // 2


def sharding(kind: str, options: dict[str, Any]) -> tuple[nn.Module, NovoGrad]:
    """A model in one process, under FSDP2 or HSDP, and its optimizer."""
    model = fixed_gradients.FixedGradients()
    world = dist.get_world_size()
    if kind != "one":
        shape, names = (
            ((world,), ("shard",)) if kind == "fsdp2" else ((2, world // 2), ("replicate", "shard"))
        )
        fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    return model, NovoGrad(model.named_parameters(), **{"preset": "paper", **options})


def train(model: nn.Module, optimizer: NovoGrad, first: int, stop: int) -> None:
    for step in range(first, stop):
        optimizer.zero_grad()
        model(torch.tensor(step)).backward()
        optimizer.step()


def saved(kind: str, options: dict[str, Any], form: dict[str, bool], folder: str) -> None:
    """Train half of the steps and save."""
    model, optimizer = sharding(kind, options)
    train(model, optimizer, 0, HALF)
    of_model, of_optimizer = get_state_dict(model, optimizer, options=StateDictOptions(**form))
    if not form.get("full_state_dict"):
        dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    elif dist.get_rank() == 0:
        torch.save({"model": of_model, "optimizer": of_optimizer}, f"{folder}.pt")


def resumed(kind: str, options: dict[str, Any], form: dict[str, bool], folder: str) -> Any:
    """Load, train the other half, and return what this rank holds."""
    model, optimizer = sharding(kind, options)
    chosen = StateDictOptions(**form)
    if form.get("full_state_dict"):
        found = torch.load(f"{folder}.pt", weights_only=True)
        of_model, of_optimizer = found["model"], found["optimizer"]
    else:
        of_model, of_optimizer = get_state_dict(model, optimizer, options=chosen)
        dcp.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer, options=chosen)
    train(model, optimizer, HALF, fixed_gradients.STEPS)
    return fixed_gradients.pieces(optimizer)
