"""Models that ranks train sharded: FSDP2, HSDP, tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from training import STEPS, OddModel, data

LR = 0.02


def full(p: torch.Tensor) -> Any:
    p = p.detach()
    return (p.full_tensor() if isinstance(p, DTensor) else p).double().numpy()


def loss_of(model: nn.Module, step: int, data_rank: int, data_world: int) -> torch.Tensor:
    x, y = (t.float().chunk(data_world)[data_rank] for t in data(step))
    return nn.functional.mse_loss(model(x), y)


def train(
    model: nn.Module, optimizer: Any, data_rank: int, data_world: int, steps: int = STEPS, first: int = 0
) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, step, data_rank, data_world).backward()
        optimizer.step()


def fsdp_model(mesh: Any) -> nn.Module:
    model = OddModel()
    fully_shard(model.first, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Block(nn.Module):
    """For tensor parallelism: a column-wise and a row-wise matrix, and a norm under sequence parallelism."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 24)
        self.down = nn.Linear(24, 12)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.3 * torch.randn_like(p))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(self.norm(x))))


def block_input(step: int, rank: int = 0) -> torch.Tensor:
    return torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(100 * step + rank))


PLAN = {
    "norm": SequenceParallel(),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Replicate()),
}


def tensor_parallel_model(data_world: int) -> tuple[nn.Module, Any]:
    """A block under tensor parallelism, with FSDP2 over the other dimension of the mesh if there is one."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (data_world, world // data_world), mesh_dim_names=("dp", "tp"))
    model = Block()
    parallelize_module(model, mesh["tp"], PLAN)
    PrepareModuleInput(
        input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True
    )._apply(model, mesh["tp"])
    if data_world > 1:
        fully_shard(model, mesh=mesh["dp"])
    return model, mesh
