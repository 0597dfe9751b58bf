"""What a rank of ``novoscale verify`` and of ``novoscale memory`` does under DeepSpeed."""

from __future__ import annotations

from typing import Any

import deepspeed
from torch import Tensor, nn

from novoscale.verify import Setup, runs

from . import deepspeed as integration


def train(setup: Setup) -> dict[str, Tensor]:
    """Train on this rank under ``setup.deepspeed``; the whole model's weights."""
    model, micro_batches = runs.make_model(setup)
    params = [p for p in model.parameters() if p.requires_grad]
    arguments: dict[str, Any] = {"model_parameters": params}
    if setup.client:
        arguments = {"optimizer": runs.make_optimizer(setup, params)}
    engine = initialize(model, setup.deepspeed, **arguments)
    for step in range(setup.steps):
        for batch in runs.mine(setup, micro_batches(step)):
            engine.backward(runs.loss_of(engine, batch, setup.dtype))
            engine.step()
    return {name: whole(p) for name, p in engine.module.named_parameters() if p.requires_grad}


def initialize(model: nn.Module, config: dict[str, Any], **arguments: Any) -> Any:
    """A DeepSpeed engine that knows NovoGrad, and logs errors only."""
    integration.register()
    deepspeed.logger.setLevel("ERROR")
    return deepspeed.initialize(model=model, config=config, **arguments)[0]


def whole(p: Any) -> Tensor:
    """A copy of a parameter of an engine, gathered from all ranks under ZeRO-3."""
    with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
        weight: Tensor = p.detach().clone()
        return weight
