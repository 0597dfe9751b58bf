"""What a rank of ``novoscale verify`` does under DeepSpeed."""

from __future__ import annotations

from typing import Any

import deepspeed
from torch import Tensor

from novoscale.verify import Setup, runs

from . import deepspeed as integration


def train(setup: Setup) -> dict[str, Tensor]:
    """Train on this rank under ``setup.deepspeed``; the whole model's weights."""
    integration.register()
    deepspeed.logger.setLevel("ERROR")
    model, micro_batches = runs.make_model(setup)
    params = [p for p in model.parameters() if p.requires_grad]
    arguments: dict[str, Any] = {"model_parameters": params}
    if setup.client:
        arguments = {"optimizer": runs.make_optimizer(setup, params)}
    engine = deepspeed.initialize(model=model, config=setup.deepspeed, **arguments)[0]
    for step in range(setup.steps):
        for batch in runs.mine(setup, micro_batches(step)):
            engine.backward(runs.loss_of(engine, batch, setup.dtype))
            engine.step()
    return {name: _whole(p) for name, p in engine.module.named_parameters() if p.requires_grad}


def _whole(p: Any) -> Tensor:
    with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
        weight: Tensor = p.detach().clone()
        return weight
