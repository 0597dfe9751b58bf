"""What each rank runs for the tests of DeepSpeed's tools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import fixed_gradients
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import Tensor
from zero_ranks import engine

State = dict[str, Tensor]
# Of the largest number, what rounding to the nearest changes at most.
HALF_A_CODE = {"float32": 0.0, "bfloat16": 2**-8, "int8": 1 / 254, "int4": 1 / 14}


def made(ds: dict[str, Any], groups: bool = False, steps: int = 3) -> Any:
    """An engine that has stepped with gradients that do not depend on the weights."""
    model = fixed_gradients.FixedGradients()
    if ds.get("bf16", {}).get("enabled"):
        model = model.bfloat16()
    params = list(model.parameters())
    members = [{"params": params[::2]}, {"params": params[1::2]}] if groups else params
    e = engine(ds, model=model, model_parameters=members)
    stepped(e, range(steps))
    return e


def stepped(e: Any, steps: range) -> None:
    for step in steps:
        e.backward(e(torch.tensor(step)))
        e.step()


def full(e: Any, key: str) -> State:
    return {n: safe_get_full_optimizer_state(p, key) for n, p in e.module.named_parameters()}


def states(ds: dict[str, Any], groups: bool) -> tuple[State, State, State]:
    """exp_avg, exp_avg_sq and the weights of every parameter."""
    e = made(ds, groups)
    named = e.module.named_parameters()
    return full(e, "exp_avg"), full(e, "exp_avg_sq"), {n: safe_get_full_fp32_param(p) for n, p in named}


def local_states(ds: dict[str, Any], key: str) -> tuple[State, State]:
    """This rank's parts under stage 3, and what they are by the whole."""
    e = made(ds)
    rank, found, expected = torch.distributed.get_rank(), {}, {}
    whole = full(e, key)
    for n, p in e.module.named_parameters():
        found[n] = safe_get_local_optimizer_state(p, key)
        length = len(found[n])
        padded = torch.zeros(length * torch.distributed.get_world_size())
        padded[: p.ds_numel] = whole[n].view(-1)
        expected[n] = padded[length * rank : length * (rank + 1)]
    return found, expected


def new_moments(shape: Any) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(11)) * 0.01


def moments_set(ds: dict[str, Any], groups: bool) -> tuple[State, list[fixed_gradients.Piece]]:
    """Every exp_avg after it has been set, and what the ranks hold then and after another step."""
    e = made(ds, groups)
    for n, p in e.module.named_parameters():
        safe_set_full_optimizer_state(p, new_moments(fixed_gradients.SHAPES[n]), "exp_avg")
    found = full(e, "exp_avg")
    stepped(e, range(3, 4))
    return found, fixed_gradients.pieces(e.basic_optimizer)


def exchanged(ds: dict[str, Any], groups: bool, key: str) -> bool:
    """Whether a state that is read and written back leaves a training's bits what they were."""
    e = made(ds, groups)
    before = [{k: t.clone() for k, t in s.items()} for s in e.basic_optimizer.state.values()]
    for p in e.module.parameters():
        safe_set_full_optimizer_state(p, safe_get_full_optimizer_state(p, key), key)
    after = list(e.basic_optimizer.state.values())
    same = torch.equal if key == "exp_avg" else torch.allclose
    return all(same(t, b[k]) for s, b in zip(after, before, strict=True) for k, t in s.items())


def local_moments_set(ds: dict[str, Any]) -> dict[str, bool | str]:
    """For each parameter whether this rank's part is what it has been set to, or why it cannot be."""
    e, found = made(ds), {}
    form = e.basic_optimizer.defaults["momentum_dtype"]
    for n, p in e.module.named_parameters():
        value = new_moments(len(safe_get_local_optimizer_state(p, "exp_avg")))
        real = max(min(len(value), p.ds_numel - torch.distributed.get_rank() * len(value)), 0)
        try:
            safe_set_local_optimizer_state(p, value, "exp_avg")
        except ValueError as error:
            found[n] = str(error)
        else:
            now = safe_get_local_optimizer_state(p, "exp_avg")
            off = (now - value)[:real].abs().max() if real else torch.zeros(())
            found[n] = bool(off <= 1.01 * HALF_A_CODE[form] * value.abs().max())
    return found


def second_moments_set(ds: dict[str, Any], value: float) -> State:
    e = made(ds)
    for n, p in e.module.named_parameters():
        safe_set_full_optimizer_state(p, torch.full(fixed_gradients.SHAPES[n], value), "exp_avg_sq")
    return full(e, "exp_avg_sq")


def refusals(ds: dict[str, Any], groups: bool) -> dict[str, str]:
    """The errors of calls that cannot be answered, on this rank; and whether the state is what it was."""
    e = made(ds, groups)
    rank = torch.distributed.get_rank()
    p = e.module.wide
    shape = fixed_gradients.SHAPES["wide"]
    before = [{k: t.clone() for k, t in s.items()} for s in e.basic_optimizer.state.values()]
    wrong_on_one = torch.ones((3, 3) if rank == 1 else shape)
    nan_on_one = torch.full(shape, float("nan") if rank == 1 else 1.0)
    calls: dict[str, Callable[[], Any]] = {
        "step": lambda: safe_get_full_optimizer_state(p, "step"),
        "shape": lambda: safe_set_full_optimizer_state(p, wrong_on_one, "exp_avg"),
        "nan": lambda: safe_set_full_optimizer_state(p, nan_on_one, "exp_avg"),
        "negative": lambda: safe_set_full_optimizer_state(p, -torch.ones(shape), "exp_avg_sq"),
        "uneven": lambda: safe_set_full_optimizer_state(p, torch.rand(shape), "exp_avg_sq"),
        "keys": lambda: safe_get_full_optimizer_state(p, ("exp_avg", "exp_avg_sq")[rank == 1]),
        "parameters": lambda: safe_get_full_optimizer_state((p, e.module.blocks)[rank == 1], "exp_avg"),
    }
    if hasattr(p, "ds_id"):
        calls["local v"] = lambda: safe_set_local_optimizer_state(p, torch.ones(1), "exp_avg_sq")
    found = {name: error_of(call) for name, call in calls.items()}
    after = list(e.basic_optimizer.state.values())
    same = all(torch.equal(t, b[k]) for s, b in zip(after, before, strict=True) for k, t in s.items())
    return {**found, "unchanged": str(same)}


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def without_first_moment(ds: dict[str, Any]) -> str:
    e = made(ds)
    return error_of(lambda: safe_get_full_optimizer_state(e.module.wide, "exp_avg"))


def taken_over(ds: dict[str, Any]) -> list[bool]:
    """Whether a model that Adam steps next is asked of Adam's state."""
    e = made(ds)
    model = e.module
    e.destroy()
    after = {**ds, "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    other = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=after)[0]
    stepped(other, range(1))
    found = [safe_get_full_optimizer_state(p, "exp_avg_sq") for p in model.parameters()]
    return [bool((v > 0).any()) and len(v.unique()) > 1 for v in found if v.numel() > 9]


def moved_away(ds: dict[str, Any]) -> bool:
    """Whether a training goes on to the same bits after its states have been moved away and back."""
    found = []
    for away in (False, True):
        e = made(ds)
        if away:
            e.offload_states()
            e.reload_states()
        stepped(e, range(3, 5))
        found.append(fixed_gradients.pieces(e.basic_optimizer))
    return same_pieces(*found)


def same_pieces(a: list[fixed_gradients.Piece], b: list[fixed_gradients.Piece]) -> bool:
    return all(
        x[:2] == y[:2] and torch.equal(x[2], y[2]) and torch.equal(x[3], y[3])
        for x, y in zip(a, b, strict=True)
    )


def weights_alone_loaded(ds: dict[str, Any], folder: str, how: dict[str, bool]) -> bool:
    """Whether loading the weights of a checkpoint alone goes on as a new training from them."""
    e = made(ds)
    e.save_checkpoint(folder)
    weights = {n: safe_get_full_fp32_param(p).clone() for n, p in e.module.named_parameters()}
    loaded = made(ds, steps=0)
    loaded.load_checkpoint(folder, **how)
    new = fixed_gradients.FixedGradients()
    new.load_state_dict(weights)
    new = engine(ds, model=new)
    for other in (loaded, new):
        stepped(other, range(3, 5))
    return same_pieces(*(fixed_gradients.pieces(x.basic_optimizer) for x in (loaded, new)))


def consolidated(ds: dict[str, Any], folder: str) -> tuple[State, State]:
    """The weights that DeepSpeed's converter makes of a checkpoint, and those of the training."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    e = made(ds)
    e.save_checkpoint(folder)
    torch.distributed.barrier()
    found = get_fp32_state_dict_from_zero_checkpoint(folder)
    return dict(found), {n: safe_get_full_fp32_param(p) for n, p in e.module.named_parameters()}


def saved(ds: dict[str, Any], folder: str, count: int) -> None:
    """A checkpoint after each of some steps."""
    e = made(ds, steps=0)
    for step in range(count):
        stepped(e, range(step, step + 1))
        e.save_checkpoint(folder)


def saved_distributed(folder: str, count: int) -> None:
    """The same of FSDP2, by torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from novoscale import NovoGrad

    model = fixed_gradients.FixedGradients()
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    optimizer = NovoGrad(model.parameters(), momentum_dtype="int8", preset="paper")
    for step in range(count):
        optimizer.zero_grad()
        model(torch.tensor(step)).backward()
        optimizer.step()
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/step{step + 1}")
