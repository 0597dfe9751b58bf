"""What each rank runs for the tests of faults that would be silent."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from novoscale import NovoGrad

FORM = {"lr": 0.01, "momentum_dtype": "int8"}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(70, 72, bias=False) for _ in range(3))).bfloat16()


def thawed() -> dict[str, bool]:
    """Whether each weight has the bits of one process, where all but the first were frozen for two steps."""
    plain, sharded = model(), model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for m in (plain, sharded):
        m[1:].requires_grad_(False)
    fully_shard(sharded, mesh=mesh)
    optimizers = [NovoGrad(m.parameters(), **{"preset": "paper", **FORM}) for m in (plain, sharded)]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        grad = torch.randn(72, 70, generator=generator).bfloat16()  # the same for all
        for m, optimizer in zip((plain, sharded), optimizers, strict=True):
            m[1:].requires_grad_(step > 1)
            for p in m.parameters():
                if p.requires_grad:
                    p.grad = grad if m is plain else distribute_tensor(grad, mesh, p.placements)
            optimizer.step()
    pairs = zip(plain.named_parameters(), sharded.parameters(), strict=True)
    return {name: torch.equal(p, q.full_tensor()) for (name, p), q in pairs}


def made_before_fully_shard() -> list[str]:
    """What is said in three steps."""
    m = model()
    optimizer = NovoGrad(m.parameters(), **{"preset": "paper", **FORM})
    fully_shard(m, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            for p in m.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
    return [str(w.message) for w in said if "NovoGrad" in str(w.message)]


def other_options_under_ddp() -> bool:
    """Whether a step is made where the learning rates of the ranks differ."""
    m = DistributedDataParallel(nn.Linear(3, 2))
    optimizer = NovoGrad(m.parameters(), lr=0.1 * (1 + dist.get_rank()), preset="paper")
    m(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    weights = [torch.empty(2, 3) for _ in range(dist.get_world_size())]
    dist.all_gather(weights, m.module.weight.detach())
    return not torch.equal(*weights)
