"""What each rank runs for the tests of a change from AdamW to NovoGrad under torch.distributed."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.distributed as dist
from sharded_models import LR, Block, block_input, fsdp_model, full, tensor_parallel_model, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from training import OddModel, data

from novoscale import NovoGrad

BEFORE, AFTER = 6, 4
BETAS = (0.9, 0.95)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.named_parameters(), lr=LR, betas=BETAS, weight_decay=0.0)


def novograd(model: nn.Module, options: dict[str, Any]) -> NovoGrad:
    return NovoGrad(model.named_parameters(), lr=LR, allow_lossy_load=True, **{"preset": "paper", **options})


def take_over(model: nn.Module, optimizer: NovoGrad, before: Any, how: str) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if how == "state_dict":
            optimizer.load_state_dict(before.state_dict())
        elif how in ("local tensors", "whole tensors"):
            plain = DTensor.to_local if how == "local tensors" else DTensor.full_tensor
            saved = before.state_dict()
            for state in saved["state"].values():
                for key, value in state.items():
                    state[key] = plain(value) if isinstance(value, DTensor) else value
            optimizer.load_state_dict(saved)
        elif how == "full state dict":  # with the parameters' names for keys
            whole = StateDictOptions(full_state_dict=True)
            optimizer.load_state_dict(get_optimizer_state_dict(model, before, options=whole))
        else:
            set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, before))
    lines = [str(w.message) for w in said if "has taken over" in str(w.message)]
    assert len(lines) == (dist.get_rank() == 0 if dist.is_initialized() else 1), lines


def changed_over(options: dict[str, Any]) -> dict[str, Any]:
    """The weights of the same in one process, in float64."""
    model = OddModel().double()
    before = adamw(model)
    for steps, first in ((BEFORE, 0), (AFTER, BEFORE)):
        optimizer: Any = before
        if first:
            optimizer = novograd(model, options)
            take_over(model, optimizer, before, "state_dict")
        for step in range(first, first + steps):
            x, y = data(step)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    return {n: full(p) for n, p in model.named_parameters()}


def fsdp2(shape: tuple[int, ...], options: dict[str, Any], how: str) -> dict[str, Any]:
    names = ("shard",) if len(shape) == 1 else ("replicate", "shard")
    model = fsdp_model(init_device_mesh("cpu", shape, mesh_dim_names=names))
    before = adamw(model)
    train(model, before, dist.get_rank(), dist.get_world_size(), BEFORE)
    optimizer = novograd(model, options)
    take_over(model, optimizer, before, how)
    train(model, optimizer, dist.get_rank(), dist.get_world_size(), AFTER, BEFORE)
    return {n: full(p) for n, p in model.named_parameters()}


def checkpointed(folder: str, options: dict[str, Any], save: bool) -> dict[str, Any]:
    """AdamW's steps and a distributed checkpoint; or loading it, on any number of ranks, into NovoGrad."""
    import torch.distributed.checkpoint as dcp

    model = fsdp_model(init_device_mesh("cpu", (dist.get_world_size(),)))
    before = adamw(model)
    if save:
        train(model, before, dist.get_rank(), dist.get_world_size(), BEFORE)
    m, o = get_state_dict(model, before)
    if save:
        dcp.save({"model": m, "optimizer": o}, checkpoint_id=folder)
        return {}
    dcp.load({"model": m, "optimizer": o}, checkpoint_id=folder)
    set_state_dict(model, before, model_state_dict=m, optim_state_dict=o)
    optimizer = novograd(model, options)
    take_over(model, optimizer, before, "state_dict")
    train(model, optimizer, dist.get_rank(), dist.get_world_size(), AFTER, BEFORE)
    return {n: full(p) for n, p in model.named_parameters()}


def tensor_parallel(data_world: int, options: dict[str, Any]) -> dict[str, Any]:
    """The state that NovoGrad has after the change, whole; of ``data_world`` 0 in one process."""
    model, mesh = tensor_parallel_model(data_world)
    rank = mesh.get_local_rank("dp")
    before = adamw(model)
    for step in range(BEFORE):
        before.zero_grad()
        model(block_input(step, rank)).square().mean().backward()
        before.step()
    optimizer = novograd(model, options)
    take_over(model, optimizer, before, "state_dict")
    return whole_state(model, optimizer) | {"weights": {n: full(p) for n, p in model.named_parameters()}}


def one_process(data_world: int, options: dict[str, Any]) -> dict[str, Any]:
    model = Block().double()
    before = adamw(model)
    for step in range(BEFORE):
        before.zero_grad()
        x = torch.cat([block_input(step, r) for r in range(data_world)]).double()
        model(x).square().mean().backward()
        before.step()
    optimizer = novograd(model, options)
    take_over(model, optimizer, before, "state_dict")
    return whole_state(model, optimizer)


def whole_state(model: nn.Module, optimizer: NovoGrad) -> dict[str, Any]:
    return {
        f"{name}: {key}": full(value).reshape(-1)
        for name, p in model.named_parameters()
        for key, value in optimizer.state[p].items()
    }


def refused(options: dict[str, Any]) -> str:
    """What each rank says where one of them has a state that cannot be used."""
    model = fsdp_model(init_device_mesh("cpu", (dist.get_world_size(),)))
    before = adamw(model)
    train(model, before, dist.get_rank(), dist.get_world_size(), 2)
    saved = before.state_dict()
    if dist.get_rank() == 0:
        index = [n for n, _ in model.named_parameters()].index("first.weight")
        state = saved["state"][index]
        saved["state"][index] = {**state, "exp_avg": state["exp_avg"].to_local()[:1]}
    optimizer = novograd(model, options)
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        assert not optimizer.state
        return str(error)
    return "nothing"


def not_finite(options: dict[str, Any]) -> str:
    model = fsdp_model(init_device_mesh("cpu", (dist.get_world_size(),)))
    before = adamw(model)
    train(model, before, dist.get_rank(), dist.get_world_size(), 2)
    if dist.get_rank() == 0:
        before.state[model.first.weight]["exp_avg_sq"].to_local()[0, 0] = math.nan
    optimizer = novograd(model, options)
    try:
        optimizer.load_state_dict(before.state_dict())
    except ValueError as error:
        assert not optimizer.state
        return str(error)
    return "nothing"


def in_blocks(momentum_dtype: str) -> dict[str, Any]:
    """The first moment in blocks that the ranks' boundaries splits, as it is saved; whole."""
    torch.manual_seed(3)
    model: nn.Module = nn.Linear(131, 70)
    if dist.is_initialized():
        model = fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    before = adamw(model)
    generator = torch.Generator().manual_seed(8)
    for _ in range(4):
        for p in model.parameters():
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = (
                distribute_tensor(gradient, p.device_mesh, p.placements)
                if isinstance(p, DTensor)
                else gradient
            )
        before.step()
    optimizer = novograd(model, {"preset": "adamw", "momentum_dtype": momentum_dtype})
    take_over(model, optimizer, before, "state_dict")
    saved = optimizer.state_dict()["state"][0]
    return {key: full(value) for key, value in saved.items()}
