"""What each rank runs for the tests of DeepSpeed's wrappers."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import nn
from training import SAMPLES, STEPS, OddModel, data, two_groups

import novoscale.integrations.deepspeed  # noqa: F401


def config(stage: int, world_size: int, *, accumulate: int = 1, clip: float = 0.0, **zero: Any) -> dict[str, Any]:
    return {
        "train_batch_size": SAMPLES,
        "gradient_accumulation_steps": accumulate,
        "train_micro_batch_size_per_gpu": SAMPLES // (world_size * accumulate),
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 200, "allgather_bucket_size": 200, **zero},
        "optimizer": {"type": "NovoGrad", "params": {"lr": 0.02}},
    }


def engine(ds: dict[str, Any], *, groups: bool = False, model: nn.Module | None = None, **kwargs: Any) -> Any:
    model = model or OddModel()
    if "optimizer" not in kwargs:
        kwargs["model_parameters"] = two_groups(model) if groups else list(model.parameters())
    return deepspeed.initialize(model=model, config=ds, **kwargs)[0]


def train(engine: Any, steps: int = STEPS, first: int = 0, dtype: torch.dtype = torch.float32) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for step in range(first, first + steps):
        x, y = (t.to(dtype) for t in data(step))
        accumulate = engine.gradient_accumulation_steps()
        for xs, ys in zip(x.chunk(accumulate * world)[rank::world], y.chunk(accumulate * world)[rank::world], strict=True):
            engine.backward(nn.functional.mse_loss(engine(xs), ys))
            engine.step()


def weights(engine: Any) -> dict[str, Any]:
    return {n: p.detach().float().cpu().double().numpy() for n, p in engine.module.named_parameters()}


def trained(ds: dict[str, Any], groups: bool) -> dict[str, Any]:
    e = engine(ds, groups=groups)
    train(e)
    return weights(e)
