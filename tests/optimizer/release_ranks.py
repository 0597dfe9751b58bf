"""What each rank runs for the tests of gradients that are released under torch.distributed."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from novoscale import NovoGrad, param_groups, release_gradients

LR, STEPS = 0.02, 4
NARROW, WIDE = 72, 90  # 6480 elements, in rows of no whole blocks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(NARROW)
        self.up = nn.Linear(NARROW, WIDE)
        self.down = nn.Linear(WIDE, NARROW, bias=False)
        self.unused = nn.Linear(3, 2)
        self.frozen = nn.Linear(3, 2).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, checkpoints: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(11, NARROW)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.last = nn.Linear(NARROW, 5)
        self.checkpoints = checkpoints

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            if self.checkpoints:
                x = checkpoint(block, x, use_reentrant=self.checkpoints == "reentrant")
            else:
                x = block(x)
        return self.last(x)


def inputs(step: int, rank: int) -> torch.Tensor:
    return torch.randn(6, 11, generator=torch.Generator().manual_seed(100 * step + rank))


def shard_model(kind: str, checkpoints: str = "") -> tuple[nn.Module, int]:
    """A model that is sharded, and which part of the data this rank has."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model: nn.Module = Stack(checkpoints)
    if kind in ("tp", "fsdp2+tp"):
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        for block in model.blocks:  # type: ignore[union-attr]
            parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if kind == "tp":
            return model, 0
        whole, part = mesh["dp"], mesh["dp"].get_local_rank()
    else:
        shape = (2, world // 2) if kind == "hsdp" else (world,)
        names = ("replicate", "shard")[-len(shape) :]
        whole, part = init_device_mesh("cpu", shape, mesh_dim_names=names), rank
    options: dict[str, Any] = {}
    if kind == "bfloat16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if kind == "kept":
        options["reshard_after_forward"] = False
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=whole, **options)
    return fully_shard(model, mesh=whole, **options), part


def optimizer_of(model: nn.Module, options: dict[str, Any]) -> NovoGrad:
    options = {"lr": LR, **options}
    preset = options.pop("preset", None)
    return NovoGrad(param_groups(model, weight_decay=0.1, preset=preset), **{"preset": "paper", **options})


def same_training(
    kind: str, options: dict[str, Any], checkpoints: str = "", micro_batches: int = 1
) -> list[str]:
    """The names of what differs from the training without release, on this rank."""
    found = [_trained(kind, options, checkpoints, micro_batches, release) for release in (False, True)]
    return [name for name, t in found[0].items() if not torch.equal(t, found[1][name])]


def _trained(
    kind: str, options: dict[str, Any], checkpoints: str, micro_batches: int, release: bool
) -> dict[str, torch.Tensor]:
    model, part = shard_model(kind, checkpoints)
    optimizer = optimizer_of(model, options)
    handle = release_gradients(model, optimizer) if release else None
    for step in range(STEPS):
        for micro in range(micro_batches):
            last = micro == micro_batches - 1
            with nullcontext() if last or handle is None else handle.accumulate():
                model(inputs(step * micro_batches + micro, part)).square().mean().backward()
        if handle is not None and kind not in ("tp", "fsdp2+tp"):
            assert all(p.grad is None for p in model.parameters()), "a gradient is left"
        optimizer.step()
        optimizer.zero_grad()
    tensors = dict(model.named_parameters())
    for name, p in model.named_parameters():
        tensors |= {f"{name}.{key}": t for key, t in optimizer.state.get(p, {}).items()}
    return {name: (t.to_local() if isinstance(t, DTensor) else t).detach() for name, t in tensors.items()}


def collectives(kind: str, preset: str) -> tuple[list[int], int]:
    """The lengths of what the optimizer's all-reduces reduce in a step, and the number of FSDP units."""
    model, part = shard_model(kind)
    optimizer = optimizer_of(model, {"preset": preset})
    handle = release_gradients(model, optimizer)
    for step in range(3):
        with mock.patch("novoscale.sharding.collectives.dist.all_reduce", wraps=dist.all_reduce) as counted:
            loss = model(inputs(step, part)).square().mean()
            loss.backward()
            optimizer.step()
        # FSDP's own are of float32 gradients.
        sent = [call.args[0] for call in counted.call_args_list]
    handle.remove()
    return [t.numel() for t in sent if t.dtype == torch.float64], 1 + len(model.blocks)  # type: ignore[arg-type]


def nan_on_one_rank(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """One element of one gradient is NaN on one rank: what is left as it was."""
    model, part = shard_model(kind)
    optimizer = optimizer_of(model, options)
    release_gradients(model, optimizer)

    def step(number: int) -> None:
        model(inputs(number, part)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    before = {name: _local(p).clone() for name, p in model.named_parameters()}
    weight = model.blocks[1].up.weight  # type: ignore[index, union-attr]

    def poison(p: torch.Tensor) -> None:
        local = _local(p.grad)  # type: ignore[arg-type]
        if dist.get_rank() % 2 == 1 and local.numel():  # of HSDP the same shard in both replicas
            local.view(-1)[-1] = math.nan

    weight.register_post_accumulate_grad_hook(poison)
    weight._post_accumulate_grad_hooks.move_to_end(list(weight._post_accumulate_grad_hooks)[-1], last=False)
    step(1)
    kept = {n for n, p in model.named_parameters() if torch.equal(_local(p), before[n]) and _local(p).numel()}
    return {
        "kept": sorted(n for n in kept if "unused" not in n and "frozen" not in n),
        "skipped": optimizer.skipped_steps,
        "layers": optimizer.skipped_layers(),
    }


def _local(t: torch.Tensor) -> torch.Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def refused_ddp(wrapped_first: bool) -> str:
    """What DDP is refused with; nothing has been changed then."""
    model = Stack("")
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = NovoGrad(model.parameters(), lr=LR, preset="paper")
    try:
        if wrapped_first:
            release_gradients(nn.parallel.DistributedDataParallel(model), optimizer)
        else:
            release_gradients(nn.ModuleList([model]), optimizer)
            wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
            wrapped(inputs(0, dist.get_rank())).sum().backward()
    except ValueError as error:
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
        return str(error)
    return "not refused"
