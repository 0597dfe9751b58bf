"""What each rank runs for the tests of torch.distributed's ways to shard a model."""

from __future__ import annotations

import copy
import itertools
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from oracle import FactoredOracle, Oracle, RowOracle, clipped, deviation
from sharded_models import LR, Block, block_input, fsdp_model, full, loss_of, tensor_parallel_model, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from training import STEPS, OddModel

from novoscale import NovoGrad


def fsdp2(shape: tuple[int, ...], options: dict[str, Any]) -> dict[str, Any]:
    """FSDP2 over a mesh of one dimension, HSDP over one of two."""
    names = ("shard",) if len(shape) == 1 else ("replicate", "shard")
    model = fsdp_model(init_device_mesh("cpu", shape, mesh_dim_names=names))
    optimizer = NovoGrad(model.named_parameters(), lr=LR, **{"preset": "paper", **options})
    train(model, optimizer, dist.get_rank(), dist.get_world_size())
    return {n: full(p) for n, p in model.named_parameters()}


def block_reference(
    data_world: int,
    granularity: str | int = "tensor",
    normalize: str = "norm",
    preset: str = "paper",
    **adamw: Any,
) -> dict[str, Any]:
    model = Block().double()
    named = dict(model.named_parameters())
    names = sorted(named, key=lambda n: named[n].ndim <= 1)  # the matrices first
    named = {n: named[n] for n in names}
    whole = [p.detach().numpy() for p in named.values()]
    matrices = sum(p.ndim > 1 for p in named.values())
    options = {"lr": LR, "normalize": normalize}
    if preset == "adamw":
        oracles: list[Any] = [FactoredOracle(whole[:matrices], lr=LR, **adamw)]
    elif granularity == "tensor":
        oracles = [Oracle(whole[:matrices], **options)]
    else:
        splits = None if granularity == "row" else granularity
        oracles = [RowOracle(whole[:matrices], splits=splits, **options)]
    of_vectors = FactoredOracle(whole[matrices:], lr=LR, **adamw) if preset == "adamw" else None
    oracles.append(of_vectors or Oracle(whole[matrices:], **options))
    for step in range(STEPS):
        model.zero_grad()
        x = torch.cat([block_input(step, r) for r in range(data_world)]).double()
        model(x).square().mean().backward()
        grads = [p.grad.numpy() for p in named.values()]
        oracles[0].step(grads[:matrices])
        oracles[1].step(grads[matrices:])
        weights = [*oracles[0].weights, *oracles[1].weights]
        with torch.no_grad():
            for p, w in zip(named.values(), weights, strict=True):
                p.copy_(torch.from_numpy(w))
    return dict(zip(named, weights, strict=True))


def tensor_parallel(
    data_world: int, options: dict[str, Any] | None = None
) -> tuple[dict[str, float], set[str]]:
    """How far each parameter ends from one process; and what was placed how."""
    options = options or {}
    model, mesh = tensor_parallel_model(data_world)
    params = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim <= 1]
    vectors = {} if "preset" in options else {"granularity": "tensor"}  # of one dimension
    optimizer = NovoGrad(
        [{"params": params[0], **options}, {"params": params[1], **options, **vectors}], lr=LR, preset="paper"
    )
    placed = set()
    for step in range(STEPS):
        optimizer.zero_grad()
        model(block_input(step, mesh["dp"].get_local_rank())).square().mean().backward()
        placed |= {
            f"{p.placements} <- {p.grad.placements}" for p in model.parameters() if isinstance(p, DTensor)
        }
        optimizer.step()
    expected = block_reference(data_world, **options)
    return {n: deviation(full(p), expected[n]) for n, p in model.named_parameters()}, placed


def any_placement() -> float:
    """One parameter placed in every way over a 2x2 mesh, also with partial gradients, against the oracle."""
    mesh = init_device_mesh("cpu", (2, 2))
    worst = 0.0
    for placements in (
        [Shard(0), Shard(1)],
        [Shard(1), Shard(0)],
        [Shard(1), Replicate()],
        [Replicate(), Shard(1)],
        [Shard(0), Shard(0)],
        [Replicate(), Replicate()],
    ):
        torch.manual_seed(1)
        whole = torch.randn(5, 7)
        p = nn.Parameter(distribute_tensor(whole, mesh, placements))
        oracle = Oracle([whole.numpy()], lr=LR, weight_decay=0.1)
        optimizer = NovoGrad([("p", p)], lr=LR, weight_decay=0.1, preset="paper")
        for step in range(4):
            grad = torch.randn(5, 7, generator=torch.Generator().manual_seed(step))
            p.grad = distribute_tensor(grad, mesh, placements)
            if step == 2:  # half of the sum on each rank of the first dimension
                half = distribute_tensor(grad / 2, mesh, [Replicate(), Replicate()]).to_local()
                p.grad = DTensor.from_local(half, mesh, [Partial(), Replicate()])
            oracle.step([grad.numpy()])
            optimizer.step()
        worst = max(worst, deviation(full(p), oracle.weights[0]))
    return worst


def any_placement_factored(options: dict[str, Any]) -> dict[str, float]:
    """Parameters of two to four dimensions, sharded along any of them, against the oracle."""
    mesh = init_device_mesh("cpu", (2, 2))
    shapes = ((5, 7), (3, 2, 4), (5, 3, 2, 3), (9,), (1, 6), (4, 6, 2))
    found = {}
    for sharding in itertools.product([None, 0, 1, 2, 3], repeat=2):
        placements = [Replicate() if dim is None else Shard(dim) for dim in sharding]
        torch.manual_seed(1)
        full_weights = [
            torch.randn(shape)
            for shape in shapes
            if len(shape) > max((d for d in sharding if d is not None), default=0)
        ]
        params = [nn.Parameter(distribute_tensor(w, mesh, placements)) for w in full_weights]
        oracle = FactoredOracle([w.numpy() for w in full_weights], lr=LR, **options)
        optimizer = NovoGrad(params, lr=LR, preset="adamw", max_grad_norm=2.0, **options)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            grads = [torch.randn(w.shape, generator=generator) for w in full_weights]
            for g in grads if step < 2 else ():  # on some ranks all zero, at first
                g[: len(g) // 2] = 0
            for p, g in zip(params, grads, strict=True):
                p.grad = distribute_tensor(g, mesh, placements)
            oracle.step(clipped([g.double().numpy() for g in grads], 2.0))
            optimizer.step()
        rows = zip(params, oracle.weights, strict=True)
        found[str(sharding)] = max(deviation(full(p), w) for p, w in rows)
    return found


def partial_sum_where_the_gradient_was() -> float:
    """A partial gradient in the memory of an earlier one that was whole: it must be summed all the same."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.ones(6, 5), mesh, [Replicate()]))
    oracle = Oracle([torch.ones(6, 5).numpy()], lr=LR)
    optimizer = NovoGrad([("p", p)], lr=LR, preset="paper")
    memory = torch.empty(6, 5)
    for step in range(6):
        grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        partial = step % 2 == 1
        memory.copy_(grad / dist.get_world_size() if partial else grad)
        p.grad = DTensor.from_local(memory, mesh, [Partial() if partial else Replicate()])
        oracle.step([grad.numpy()])
        optimizer.step()
    return deviation(full(p), oracle.weights[0])


def fixed_gradients_bits(kind: str) -> Any:
    """Weights after steps with the same gradients, whatever the sharding."""
    world = dist.get_world_size()
    torch.manual_seed(0)
    full_weights = [torch.randn(shape) for shape in ((13, 7), (5,), (1, 3), (300, 401))]
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (world,))
        params = [nn.Parameter(distribute_tensor(w, mesh, [Shard(0)])) for w in full_weights]
    else:
        params = [nn.Parameter(w) for w in full_weights]
    optimizer = NovoGrad(params, lr=LR, weight_decay=0.1, max_grad_norm=1.0, preset="paper")
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for p, w in zip(params, full_weights, strict=True):
            grad = torch.randn(w.shape, generator=generator)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        optimizer.step()
    return [full(p) for p in params]


def collectives(kind: str) -> int:
    """How many all-reduces one step of the optimizer makes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(OddModel())
        optimizer: Any = NovoGrad(model.parameters(), lr=LR, preset="paper")
    elif kind == "zero redundancy":
        from torch.distributed.optim import ZeroRedundancyOptimizer

        model = nn.parallel.DistributedDataParallel(OddModel())
        optimizer = ZeroRedundancyOptimizer(model.parameters(), NovoGrad, lr=LR, preset="paper")
    elif kind == "fsdp2+tp":
        model, mesh = tensor_parallel_model(data_world=2)
        optimizer = NovoGrad(model.parameters(), lr=LR, preset="paper")
    else:
        shape, names = (
            ((world,), ("shard",)) if kind == "fsdp2" else ((2, world // 2), ("replicate", "shard"))
        )
        model = fsdp_model(init_device_mesh("cpu", shape, mesh_dim_names=names))
        optimizer = NovoGrad(model.parameters(), lr=LR, preset="paper")
    for step in range(2):
        optimizer.zero_grad()
        if kind == "fsdp2+tp":
            model(block_input(step, mesh["dp"].get_local_rank())).square().mean().backward()
        else:
            loss_of(model, step, rank, world).backward()
        if step == 0:  # the ranks compare their layers
            optimizer.step()
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as counted:
        optimizer.step()
    return counted.call_count


def data_parallel(kind: str) -> dict[str, Any]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(OddModel())
    if kind == "ddp":
        optimizer: Any = NovoGrad(model.parameters(), lr=LR, preset="paper")
    else:
        optimizer = ZeroRedundancyOptimizer(model.parameters(), NovoGrad, lr=LR, preset="paper")
    train(model, optimizer, dist.get_rank(), dist.get_world_size())
    return {n: full(p) for n, p in model.module.named_parameters()}


def data_parallel_bits(kind: str, options: dict[str, Any]) -> list[bytes]:
    """The bits of the weights after training with DDP, its gradients the same whoever steps what."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(OddModel())
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": matrices}, {"params": [p for p in model.parameters() if p.ndim < 2]}]
    if kind == "ddp":
        optimizer: Any = NovoGrad(groups, lr=LR, **{"preset": "paper", **options})
    else:
        optimizer = ZeroRedundancyOptimizer(groups[:1], NovoGrad, lr=LR, **{"preset": "paper", **options})
        if kind == "numbered":
            optimizer.optim.number_as(optimizer.param_groups)
        optimizer.add_param_group(groups[1])
    train(model, optimizer, dist.get_rank(), dist.get_world_size())
    return [p.detach().numpy().tobytes() for p in model.parameters()]


def nan_on_one_rank() -> dict[str, Any]:
    """A NaN in the local shard of one gradient on the last rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = fsdp_model(init_device_mesh("cpu", (world,)))
    optimizer = NovoGrad(model.named_parameters(), lr=LR, preset="paper")
    train(model, optimizer, rank, world, 2)
    before = copy.deepcopy([full(p) for p in model.parameters()])
    state = copy.deepcopy(
        [t.to_local() if isinstance(t, DTensor) else t for s in optimizer.state.values() for t in s.values()]
    )
    loss_of(model, 2, rank, world).backward()
    local = model.last.weight.grad.to_local()
    if local.numel() and rank == 1:
        local.view(-1)[0] = float("nan")
    optimizer.step()
    after = [
        t.to_local() if isinstance(t, DTensor) else t for s in optimizer.state.values() for t in s.values()
    ]
    same = all((full(p) == w).all() for p, w in zip(model.parameters(), before, strict=True))
    return {
        "weights unchanged": same,
        "state unchanged": all(torch.equal(a, b) for a, b in zip(after, state, strict=True)),
        "skipped": optimizer.skipped_steps,
        "layers": optimizer.skipped_layers(),
    }


def overflow_on_one_rank() -> bool:
    """Whether nothing changes on this rank when torch.amp.GradScaler saw an overflow on the last one only."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = fsdp_model(init_device_mesh("cpu", (world,)))
    optimizer = NovoGrad(model.parameters(), lr=LR, preset="paper")
    before = [full(p) for p in model.parameters()]
    loss_of(model, 0, rank, world).backward()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(float(rank == world - 1))
    optimizer.step()
    same = all((full(p) == w).all() for p, w in zip(model.parameters(), before, strict=True))
    return same and optimizer.skipped_steps == 1


def fsdp1() -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(OddModel(), use_orig_params=True, device_id=torch.device("cpu"))
    try:
        optimizer = NovoGrad(model.parameters(), lr=LR, preset="paper")
        train(model, optimizer, dist.get_rank(), dist.get_world_size(), 1)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "no error"


def accelerate_fsdp2(folder: str) -> dict[str, Any]:
    """Accelerator.prepare with FSDP2, which swaps the parameters in param_groups and nothing else."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator = Accelerator(cpu=True)
    # Accelerate refuses FSDP on a CPU; the path itself runs there.
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False
    )
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    rank, world = dist.get_rank(), dist.get_world_size()
    model = OddModel()
    optimizer = NovoGrad(model.named_parameters(), lr=LR, preset="paper")
    model, optimizer = accelerator.prepare(model, optimizer)
    inner = optimizer.optimizer
    for step in range(STEPS):
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, step, rank, world))
        optimizer.step()
    weights = {n: full(p) for n, p in model.named_parameters()}
    return {
        "weights": weights,
        "dtensors": all(isinstance(p, DTensor) for p in inner.state),
        "names": sorted(inner.layer_norms()),
    }
