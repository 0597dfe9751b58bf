"""What each rank runs to compare a wrapper's steps with the oracle, given the gradients that it reduced.

The gradients are DeepSpeed's own, whole, asked for between backward and step: what is tested is the optimizer
under its wrapper, also where the model's arithmetic is bfloat16.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from oracle import FactoredOracle, Oracle, deviation
from torch import nn
from training import OddModel
from zero_ranks import config, engine, train

from novoscale import NovoGrad

STEPS = 10
FP16 = {"fp16": {"enabled": True, "loss_scale": 64}}
BF16_MASTER = {
    "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
}
BF16_MASTER_BOUND = STEPS * 2**-9  # each step rounds the weight once: half a unit in the last of its 8 bits


def oracle_of(ds: dict[str, Any], weight: torch.Tensor, **options: Any) -> Any:
    """The oracle that computes what the optimizer of a DeepSpeed config does, with its options."""
    params = ds["optimizer"]["params"]
    known = {k: params[k] for k in ("clip_threshold", "scale_parameter") if k in params}
    kind = FactoredOracle if params.get("preset") == "adamw" else Oracle
    return kind([weight.double().numpy()], lr=0.02, **known, **options)


def grad_of(p: Any) -> torch.Tensor:
    return safe_get_full_grad(p) if hasattr(p, "_hp_mapping") or hasattr(p, "ds_id") else p.grad


def master_of(e: Any, p: Any) -> torch.Tensor:
    """The weight that the optimizer updates."""
    if type(e.optimizer).__name__ == "FP16_UnfusedOptimizer":
        pairs = zip(e.optimizer.fp16_groups, e.optimizer.fp32_groups, strict=True)
        return next(c for ps, cs in pairs for q, c in zip(ps, cs, strict=True) if q is p).detach()
    return safe_get_full_fp32_param(p)


def against_oracle(
    ds: dict[str, Any], dtype: torch.dtype = torch.float32, zero_init: bool = False
) -> tuple[str, dict[str, float]]:
    """The wrapper's class, and for each parameter how far it is from the oracle after STEPS steps."""
    deepspeed.init_distributed("gloo")
    if dtype == torch.float16:  # DeepSpeed asks for AVX512-FP16; torch computes it on any CPU
        get_accelerator().is_fp16_supported = lambda: True
    # To the nearest the bound is half as large. How weights are rounded: test_deepspeed_formats.py.
    ds["optimizer"]["params"]["stochastic_rounding"] = False
    with deepspeed.zero.Init(config_dict_or_path=ds) if zero_init else nullcontext():
        model = OddModel().to(dtype)
    e = engine(ds, model=model, groups=True)
    named = dict(e.module.named_parameters())
    decays = [0.05 if len(getattr(p, "ds_shape", p.shape)) > 1 else 0.0 for p in named.values()]
    oracles = [
        oracle_of(ds, master_of(e, p), weight_decay=decay)
        for p, decay in zip(named.values(), decays, strict=True)
    ]
    backward = e.backward

    def recorded(loss: torch.Tensor) -> None:
        backward(loss)
        for p, oracle in zip(named.values(), oracles, strict=True):
            grad = grad_of(p).double().numpy() / ds.get("fp16", {}).get("loss_scale", 1)
            oracle.step([grad.reshape(oracle.weights[0].shape)])

    e.backward = recorded
    train(e, STEPS, dtype=dtype)
    worst = {
        n: deviation(master_of(e, p).double().numpy(), oracle.weights[0])
        for (n, p), oracle in zip(named.items(), oracles, strict=True)
    }
    return type(e.optimizer).__name__, worst


def unchanged_by_construction(ds: dict[str, Any]) -> tuple[bool, bool]:
    """Whether DeepSpeed's dummy step has left the weights and the state alone."""
    model = OddModel().bfloat16()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    e = engine(ds, model=model, groups=True)
    same = all(torch.equal(p, before[n]) for n, p in e.module.named_parameters())
    masters = all(torch.equal(master_of(e, p), before[n].float()) for n, p in e.module.named_parameters())
    state = e.basic_optimizer.state.values()
    return same and masters, not any(t.any() for s in state for t in s.values())


# ---- mixture of experts --------------------------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self, ep_size: int, hidden: int = 9) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        torch.manual_seed(3)
        expert = nn.Sequential(nn.Linear(8, hidden), nn.Tanh(), nn.Linear(hidden, 8))
        self.inp = nn.Linear(13, 8)
        self.moe = MoE(8, expert, num_experts=2 * ep_size, ep_size=ep_size, k=1)
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, _, _ = self.moe(torch.tanh(self.inp(x)))
        return self.out(h)


def experts_against_oracle(ds: dict[str, Any]) -> dict[str, float]:
    deepspeed.init_distributed("gloo")
    e = engine(ds, model=Experts(ep_size=2 if dist.get_world_size() % 2 == 0 else 3))
    named = dict(e.module.named_parameters())
    oracles = {n: oracle_of(ds, safe_get_full_fp32_param(p)) for n, p in named.items()}
    backward = e.backward

    def recorded(loss: torch.Tensor) -> None:
        backward(loss)
        for n, p in named.items():
            oracles[n].step([safe_get_full_grad(p).double().numpy()])

    e.backward = recorded
    train(e, STEPS)
    return {
        n: deviation(safe_get_full_fp32_param(p).double().numpy(), oracles[n].weights[0])
        for n, p in named.items()
    }


def experts_with_other_bits(ds: dict[str, Any]) -> list[str]:
    """Parameters that do not end with the bits of unsharded ones that were given the same gradients."""
    deepspeed.init_distributed("gloo")
    e = engine(ds, model=Experts(2 if dist.get_world_size() % 2 == 0 else 3, hidden=601))  # matrices of 4808
    names = {p: name for name, p in e.module.named_parameters()}
    ordered = [p for group in e.optimizer.bit16_groups for p in group]  # as the optimizer numbers them
    unsharded = {p: nn.Parameter(safe_get_full_fp32_param(p).clone()) for p in ordered}
    optimizer = NovoGrad(
        [(names[p], w) for p, w in unsharded.items()], **{"preset": "paper", **ds["optimizer"]["params"]}
    )
    backward = e.backward

    def recorded(loss: torch.Tensor) -> None:
        backward(loss)
        for p, w in unsharded.items():
            w.grad = safe_get_full_grad(p).clone()
        optimizer.step()

    e.backward = recorded
    train(e, STEPS)
    return [names[p] for p, w in unsharded.items() if not torch.equal(safe_get_full_fp32_param(p), w)]


# ---- tensor parallelism --------------------------------------------------------------------------------


class ModelParallel:
    """An mpu: ``size`` ranks that share a model, side by side; the rest is data-parallel."""

    def __init__(self, size: int) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        self.size = size
        self.model, self.data = (
            next(group for ranks, group in groups if rank in ranks)
            for groups in (
                [(r, dist.new_group(r)) for r in (list(range(i, i + size)) for i in range(0, world, size))],
                [(r, dist.new_group(r)) for r in (list(range(i, world, size)) for i in range(size))],
            )
        )

    def get_model_parallel_group(self) -> Any:
        return self.model

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.model)

    def get_model_parallel_world_size(self) -> int:
        return self.size

    def get_data_parallel_group(self) -> Any:
        return self.data

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size() // self.size


class Sharded(nn.Module):
    """One rank's part of two matrices that are sharded over the model-parallel group, and a replicated bias.

    ``rows`` is sharded along its rows; ``columns``, if it is there, along its columns.
    """

    def __init__(self, part: int, parts: int, columns: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.rows = nn.Parameter(torch.randn(6, 13).chunk(parts)[part].clone())
        self.rows.tensor_model_parallel, self.rows.partition_dim = True, 0
        self.bias = nn.Parameter(torch.randn(2))
        if columns:
            self.columns = nn.Parameter(torch.randn(3, 6).chunk(parts, dim=1)[part].clone())
            self.columns.tensor_model_parallel, self.columns.partition_dim = True, 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x @ self.rows.t() + (self.bias * x[:, :2]).sum(1, keepdim=True)
        return h @ self.columns.t() if hasattr(self, "columns") else h


def tensor_parallel_config(stage: int, world_size: int) -> dict[str, Any]:
    data_world = 2 if world_size == 4 else 1
    sizes = {"train_batch_size": 8 * data_world, "train_micro_batch_size_per_gpu": 8}
    return {**config(stage, world_size), **sizes}


def tensor_parallel_against_oracle(ds: dict[str, Any]) -> dict[str, float]:
    size = 3 if dist.get_world_size() == 3 else 2
    mpu = ModelParallel(size)
    part = mpu.get_model_parallel_rank()
    model = Sharded(part, size, columns=ds["optimizer"]["params"]["preset"] == "adamw")
    e = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=ds, mpu=mpu)[0]

    def whole(p: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if not hasattr(p, "partition_dim"):
            return t
        parts = [torch.empty_like(t) for _ in range(size)]
        dist.all_gather(parts, t.contiguous(), group=mpu.model)
        return torch.cat(parts, dim=p.partition_dim)

    named = dict(e.module.named_parameters())
    oracles = {n: oracle_of(ds, whole(p, safe_get_full_fp32_param(p))) for n, p in named.items()}
    for step in range(STEPS):
        x = torch.randn(8, 13, generator=torch.Generator().manual_seed(step * 2 + dist.get_rank(mpu.data)))
        e.backward((e(x) ** 2).mean())
        for n, p in named.items():
            oracles[n].step([whole(p, safe_get_full_grad(p)).double().numpy()])
        e.step()
    return {
        n: deviation(whole(p, safe_get_full_fp32_param(p)).double().numpy(), oracles[n].weights[0])
        for n, p in named.items()
    }
