"""What each rank runs for the tests of states that are loaded into an optimizer of another kind."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import fixed_gradients
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from novoscale import NovoGrad
from novoscale.checkpoint import kinds

SHAPES = {"blocks": (40, 128), "odd": (34, 131), "small": (9,)}
FULL = {"full_state_dict": True}
# Of torch's functions: what they are given, and whether a checkpoint lies between.
WAYS: dict[str, tuple[dict[str, bool], bool]] = {
    "dcp": ({}, True),
    "dcp, flat": ({"flatten_optimizer_state_dict": True}, True),
    "dcp, full": ({"full_state_dict": True, "cpu_offload": True}, True),
    "dcp, async": ({}, True),
    "dcp, the optimizer itself": ({}, True),
    "dcp, without markers": ({}, True),
    "set": ({}, False),
    "set, flat": ({"flatten_optimizer_state_dict": True}, False),
    "set, full": (FULL, False),
    "set, full, from rank 0": ({**FULL, "broadcast_from_rank0": True}, False),
}


def make(sharding: str, options: dict[str, Any], dtype: torch.dtype) -> tuple[nn.Module, NovoGrad]:
    model = fixed_gradients.FixedGradients(SHAPES).to(dtype)
    if sharding == "tp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for name, p in list(model.named_parameters()):
            if p.ndim > 1:
                setattr(model, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(1)])))
    elif sharding != "one":
        shape = (dist.get_world_size(),) if sharding == "fsdp2" else (2, dist.get_world_size() // 2)
        names = ("replicate", "shard")[-len(shape) :]
        fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    return model, NovoGrad(model.named_parameters(), **{"preset": "paper", "lr": 0.05, **options})


def step(model: nn.Module, optimizer: NovoGrad, number: int) -> None:
    """With gradients that are the same however the parameters are sharded."""
    given = fixed_gradients.gradients(number, list(SHAPES.values()))
    for p, g in zip(model.parameters(), given, strict=True):
        g = g.to(p.dtype)
        p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g
    optimizer.step()
    optimizer.zero_grad()


def load(way: str, folder: str, first: tuple[Any, Any], second: tuple[Any, Any]) -> None:
    """Take the state of one optimizer over into another, as users do."""
    form, saves = WAYS[way]
    options = StateDictOptions(**form)
    if way == "dcp, the optimizer itself":
        step(*second, 7)
        dcp.save({"optimizer": first[1]}, checkpoint_id=folder)
        dcp.load({"optimizer": second[1]}, checkpoint_id=folder)
    elif not saves:
        gathered = StateDictOptions(**{**form, "broadcast_from_rank0": False})
        state = get_optimizer_state_dict(*first, options=gathered)
        if form.get("broadcast_from_rank0") and dist.get_rank():
            state = {}
        set_optimizer_state_dict(*second, state, options=options)
    else:
        weights, state = get_state_dict(*first, options=options)
        if way == "dcp, without markers":  # as they were before there were any
            state = kinds.unmarked(state)
        if way == "dcp, async":
            dcp.async_save({"model": weights, "optimizer": state}, checkpoint_id=folder).result()
        else:
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
        weights, state = get_state_dict(*second, options=options)
        planner = DefaultLoadPlanner(allow_partial_load=way == "dcp, without markers")
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder, planner=planner)
        set_state_dict(*second, model_state_dict=weights, optim_state_dict=state, options=options)


def held(optimizer: NovoGrad) -> list[Any]:
    """What this rank holds: first moments as numbers, second moments."""
    second = [
        [state[key].clone() for key in sorted(state) if key.startswith("exp_avg_sq")]
        for state in optimizer.state.values()
    ]
    first = optimizer.param_groups[0]["betas"][0] != 0
    return [second, [m.float() for *_, m in fixed_gradients.pieces(optimizer)] if first else []]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(
        (one.to_local() == other.to_local()).all() if isinstance(one, DTensor) else (one == other).all()
    )


def outcome(
    sharding: str, way: str, folder: str, first: Any, second: Any, dtype: torch.dtype = torch.float32
) -> str:
    """What comes of a state of an optimizer with some options in one with others."""
    before = make(sharding, first, dtype)
    for number in range(2):
        step(*before, number)
    after = make(sharding, second, dtype)
    if not WAYS[way][1] or way == "dcp":
        step(*after, 5)
    untouched = copy.deepcopy(held(after[1])) if way == "dcp" else None
    try:
        load(way, folder, before, after)
    except (Exception, CheckpointException) as error:  # which is a BaseException
        text = f"{type(error).__name__}: {error}"
        planned = untouched is not None and "Missing key" in text
        return "something was changed" if planned and not equal(untouched, held(after[1])) else text
    of_first, of_second = (tuple(o.param_groups[0]["betas"]) for o in (before[1], after[1]))
    if of_first != of_second:
        return "other betas"
    found = "the same" if equal(held(before[1]), held(after[1])) else "other values"
    step(*after, 3)
    return found


def outcomes(sharding: str, way: str, folder: str, cases: Any, dtype: str = "float32") -> list[str]:
    """Of each case what comes of it."""
    return [
        outcome(sharding, way, f"{folder}/{number}", *case, getattr(torch, dtype))
        for number, case in zip(itertools.count(), cases)
    ]
