"""What ranks do in tests of orthogonal directions."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from novoscale import NovoGrad, param_groups

STEPS = 4


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(13, 66), nn.Linear(66, 70), nn.Tanh(), nn.Linear(70, 13))


def batch(step: int, samples: slice) -> Tensor:
    return torch.randint(13, (8, 3), generator=torch.Generator().manual_seed(step))[samples]


def optimizer_of(net: nn.Module, **options: Any) -> NovoGrad:
    return NovoGrad(param_groups(net, preset="muon", weight_decay=0.1), lr=0.01, **options)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, samples: slice) -> None:
    for step in range(STEPS):
        tokens = batch(step, samples)
        nn.functional.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def alone(**options: Any) -> list[Tensor]:
    net = model()
    train(net, optimizer_of(net, **options), slice(None))
    return [p.detach() for p in net.parameters()]


def ddp(zero_redundancy: bool, options: dict[str, Any]) -> list[Tensor]:
    """Trained on half of each batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    net = model()
    wrapped = DistributedDataParallel(net)
    optimizer: torch.optim.Optimizer = optimizer_of(net, **options)
    if zero_redundancy:
        groups = [
            {k: v for k, v in g.items() if k != "param_names"} for g in param_groups(net, preset="muon")
        ]
        sharded = ZeroRedundancyOptimizer(
            groups, NovoGrad, lr=0.01, weight_decay=0.1, preset="muon", **options
        )
        sharded.optim.number_as(sharded.param_groups)
        optimizer = sharded
    train(wrapped, optimizer, slice(rank * 8 // world, (rank + 1) * 8 // world))
    return [p.detach() for p in net.parameters()]


def refusals() -> dict[str, str]:
    """What is said of matrices that are sharded, and that nothing has changed."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    said = {}
    net = model()
    for layer in (net[1], net[3]):
        fully_shard(layer, mesh=mesh)
    said["made from DTensors"] = _error(lambda: optimizer_of(net))
    whole = nn.Parameter(torch.ones(6, 4))
    optimizer = NovoGrad([("up", whole)], lr=0.1, preset="muon", orthogonalize=True)
    cut = nn.Parameter(distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)]))
    cut.grad = distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)])
    optimizer.param_groups[0]["params"] = [cut]  # as Accelerate does it
    said["put in place of a parameter"] = _error(optimizer.step)
    assert torch.equal(cut.full_tensor(), torch.ones(6, 4))
    return said


def replicated() -> bool:
    """A DTensor that each rank has whole is stepped as any other."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weights, grads = (torch.randn(6, 4, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    plain = nn.Parameter(weights.clone())
    everywhere = nn.Parameter(distribute_tensor(weights, mesh, [Replicate()]))
    for p, g in ((plain, grads), (everywhere, distribute_tensor(grads, mesh, [Replicate()]))):
        p.grad = g
        NovoGrad([p], lr=0.1, preset="muon", orthogonalize=True).step()
    return torch.equal(everywhere.full_tensor(), plain)


def _error(run: Any) -> str:
    try:
        run()
    except ValueError as error:
        return str(error)
    return ""


def under_deepspeed(stage: int) -> str:
    import deepspeed
    import novoscale.integrations.deepspeed  # noqa: F401  registers NovoGrad

    net = model()
    config = {
        "train_batch_size": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    groups = [dict(g) for g in param_groups(net, preset="muon")]
    return _error(lambda: deepspeed.initialize(model=net, optimizer=NovoGrad(groups, lr=0.01), config=config))


def sharded_over_one_rank() -> bool:
    """Whether FSDP2 on one rank, which has every matrix whole, ends with the bits of no wrapper."""
    net = model()
    fully_shard(net)
    train(net, optimizer_of(net, momentum_dtype="int8"), slice(None))
    expected = alone(momentum_dtype="int8")
    return all(torch.equal(p.full_tensor(), e) for p, e in zip(net.parameters(), expected, strict=True))
