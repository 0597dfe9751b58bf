"""What each rank runs for the tests of gradients that only some ranks have."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from novoscale import NovoGrad

LR = 0.05


class WithExpert(nn.Module):
    """A layer that all ranks share, and an expert that each rank has for itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.shared = nn.Linear(6, 4)
        self.expert = nn.Linear(4, 80, bias=False)

    def forward(self, x: Tensor, uses_expert: bool) -> Tensor:
        x = self.shared(x)
        return self.expert(x) if uses_expert else x


def plain_expert(options: dict[str, Any], gradients: list[list[bool]]) -> list[str]:
    """Under FSDP2, with an expert that FSDP2 ignores: the names of what is not as with torch's gradients.

    Args:
        options: of the optimizer.
        gradients: of each step and rank, whether the expert has one.
    """
    model = WithExpert()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh, ignored_params={model.expert.weight})
    optimizer = NovoGrad(model.named_parameters(), lr=LR, **{"preset": "paper", **options})
    alone = [nn.Parameter(_full(p).clone()) for p in model.parameters()]
    expected = NovoGrad([(n, p) for (n, _), p in zip(model.named_parameters(), alone, strict=True)],
                        lr=LR, **{"preset": "paper", **options})  # fmt: skip
    for step, used in enumerate(gradients):
        optimizer.zero_grad()
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        model(x, used[dist.get_rank()]).square().mean().backward()
        for p, one in zip(model.parameters(), alone, strict=True):
            one.grad = None if p.grad is None else _full(p.grad)
        optimizer.step()
        expected.step()
    both = zip(model.named_parameters(), alone, strict=True)
    return [name for (name, p), one in both if not torch.allclose(_full(p), one, rtol=1e-5, atol=1e-7)]


def _full(t: Tensor) -> Tensor:
    return t.full_tensor().detach() if isinstance(t, DTensor) else t.detach()


def missing_gradient(
    options: dict[str, Any], shape: tuple[int, ...], placements: str, missing: list[int], steps_before: int
) -> dict[str, Any]:
    """A DTensor without a gradient on some ranks: what is said, what has changed, what comes after.

    Args:
        options: of the optimizer.
        shape: of the mesh.
        placements: of the DTensor, along each dimension: a letter, "s" or "r".
        missing: the ranks without a gradient.
        steps_before: how many steps there are before.
    """
    mesh = init_device_mesh("cpu", shape)
    of_b = [Shard(0) if letter == "s" else Replicate() for letter in placements]
    torch.manual_seed(3)
    named = {
        "a": nn.Parameter(distribute_tensor(torch.randn(8, 3), mesh, [Shard(0)] * mesh.ndim)),
        "b": nn.Parameter(distribute_tensor(torch.randn(8, 5), mesh, of_b)),
        "c": nn.Parameter(torch.randn(4)),
    }
    optimizer = NovoGrad(named.items(), lr=LR, **{"preset": "paper", **options})

    def give() -> None:
        for p in named.values():
            p.grad = torch.ones_like(p)

    for _ in range(steps_before):
        give()
        optimizer.step()
    give()
    if dist.get_rank() in missing:
        named["b"].grad = None
    before = _all_of(named, optimizer)
    said = ""
    try:
        optimizer.step()
    except RuntimeError as error:
        said = str(error)
    unchanged = _same(before, _all_of(named, optimizer))
    skipped, layers = optimizer.skipped_steps, optimizer.skipped_layers()
    give()
    optimizer.step()
    after = _all_of(named, optimizer)
    changed = all(not torch.equal(before[name], after[name]) for name in named)
    return {"said": said, "unchanged": unchanged, "skipped": skipped, "layers": layers, "goes on": changed}


def _all_of(named: Mapping[str, Tensor], optimizer: NovoGrad) -> dict[str, Tensor]:
    found = dict(named)
    for name, p in named.items():
        found |= {f"{name}.{key}": t for key, t in optimizer.state.get(p, {}).items()}
    local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in found.items()}
    return {name: t.detach().clone() for name, t in local.items()}


def _same(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """Whether nothing has changed; what is new is zero."""
    return all(torch.equal(t, before.get(name, torch.zeros_like(t))) for name, t in after.items())


OPTIONS: list[dict[str, Any]] = [
    {"preset": "paper"},
    {"preset": "paper", "max_grad_norm": 1.0},
    {"preset": "paper", "norm_type": 0},
    {"preset": "adamw", "clip_threshold": 0.5},
    {"preset": "adamw", "max_grad_norm": 0.5, "scale_parameter": True},
    {"preset": "paper", "granularity": "row", "normalize": "rms", "max_grad_norm": 0.5},
    {"preset": "paper", "momentum_dtype": "int8", "stochastic_rounding": False},
]
SHARED = ((7, 3), (4, 6), (5000,))
OF_EXPERTS = ((5, 4), (3, 2))
EXPERT_RANKS = ((0, 1), (2, 3))


def any_gradients(cases: int) -> list[str]:
    """Parameters on all of 4 ranks, on two meshes of experts, and on each rank alone; any gradients."""
    meshes = [DeviceMesh("cpu", [0, 1, 2, 3]), *(DeviceMesh("cpu", [*ranks]) for ranks in EXPERT_RANKS)]
    found = []
    for case in range(cases):
        found += [f"case {case}: {what}" for what in _one_case(random.Random(case), meshes)]
    return found


def _one_case(rng: random.Random, meshes: Sequence[DeviceMesh]) -> list[str]:
    rank = dist.get_rank()
    options = rng.choice(OPTIONS)
    # Of each tensor: name, shape, the ranks that have it, its mesh; None: it is plain.
    tensors: list[tuple[str, tuple[int, ...], tuple[int, ...], DeviceMesh | None]] = [
        (f"shared{i}", shape, (0, 1, 2, 3), meshes[0]) for i, shape in enumerate(SHARED)
    ]
    for ranks, mesh in zip(EXPERT_RANKS, meshes[1:], strict=True):
        tensors += [(f"expert{ranks[0]}{i}", s, ranks, mesh) for i, s in enumerate(OF_EXPERTS)]
    tensors += [(f"plain{r}", (3, 3), (r,), None) for r in range(4)]
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    whole = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape, _, _ in tensors}
    mine = {
        name: nn.Parameter(_part(whole[name].detach(), ranks, mesh))
        for name, _, ranks, mesh in tensors
        if rank in ranks
    }
    optimizer, expected = (
        NovoGrad(n.items(), lr=LR, **{"preset": "paper", **options}) for n in (mine, whole)
    )
    found = []
    for step in range(3):
        uneven: set[int] = set()
        for name, shape, ranks, mesh in tensors:
            gradient = torch.randn(shape, generator=generator)
            has = [kind == "all" or (kind == "some" and rng.random() < 0.5)
                   for kind in rng.choices(["all", "none", "some"], [12, 6, 1]) for _ in ranks]  # fmt: skip
            whole[name].grad = gradient if all(has) else None
            uneven |= {*ranks} if any(has) and not all(has) else set()
            if rank in ranks:
                mine[name].grad = _part(gradient, ranks, mesh) if has[ranks.index(rank)] else None
        said = ""
        try:
            optimizer.step()
        except RuntimeError as error:
            said = str(error)
        if bool(said) != (rank in uneven):
            found.append(f"step {step}: said {said!r}, and ranks {uneven} have uneven gradients")
        if not uneven:
            expected.step()
        for name, _, ranks, mesh in tensors:
            if rank in ranks:
                local = mine[name].to_local() if mesh else mine[name]
                part = _part(whole[name].detach(), ranks, mesh)
                if not torch.allclose(local, part.to_local() if mesh else part, rtol=1e-4, atol=1e-5):
                    found.append(f"step {step}: {name} with {options}")
    return found


def _part(full: Tensor, ranks: Sequence[int], mesh: DeviceMesh | None) -> Any:
    """This rank's part of a tensor, along its first dimension."""
    if mesh is None:
        return full.clone()
    each = -(-len(full) // len(ranks))
    first = min(each * ranks.index(dist.get_rank()), len(full))
    local = full[first : first + each].clone()
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride()
    )


def clipped_with_plain(kind: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """A DTensor of equal weights and gradients, clipped with a plain tensor: this rank's step, and the norm.

    Args:
        kind: of the plain tensor: "replicas", "experts" (of another gradient on each rank) or "on rank 0".
        shape: of the mesh, over which the DTensor is sharded.
    """
    mesh, rank = init_device_mesh("cpu", shape), dist.get_rank()
    sharded = nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [Shard(d) for d in range(len(shape))]))
    params: list[tuple[str, Tensor]] = [("sharded", sharded)]
    sharded.grad = torch.ones_like(sharded)
    squares = 32.0
    if kind != "on rank 0" or rank == 0:
        plain = nn.Parameter(torch.ones(3))
        plain.grad = torch.full((3,), 1.0 + rank if kind == "experts" else 2.0)
        params.append(("plain", plain))
    of_rank = [3 * (1.0 + r) ** 2 for r in range(math.prod(shape))]
    squares += sum(of_rank) if kind == "experts" else 12.0
    optimizer = NovoGrad(params, preset="paper", lr=1.0, betas=(0.0, 0.0), max_grad_norm=1.0, eps=1.0)
    optimizer.step()
    # w - g / (sqrt(sum(g**2)) + 1) with the clipped gradient.
    clip = 1 / (math.sqrt(squares) + 1e-6)
    moved = 1 - sharded.to_local()
    assert (moved == moved.flatten()[0]).all()
    return float(moved.flatten()[0]), clip / (clip * math.sqrt(32.0) + 1)
