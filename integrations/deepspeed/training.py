"""What a rank of ``novoscale verify`` and of ``novoscale memory`` does under DeepSpeed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from novoscale.sharding.layout import Fragment, Layout
from novoscale.verify import Setup, runs
from novoscale.verify.recording import Recorder, Where, full_tensors

from . import layouts, register

TABLES = (
    (DeepSpeedZeroOptimizer, layouts.zero_1_and_2),
    (DeepSpeedZeroOptimizer_Stage3, layouts.zero_3),
    (BF16_Optimizer, layouts.bf16),
    (FP16_UnfusedOptimizer, layouts.unfused),
)


def train(setup: Setup, folder: Path) -> None:
    """Train on this rank under ``setup.deepspeed``; record it in ``folder``."""
    model, micro_batches = runs.make_model(setup)
    params = [p for p in model.parameters() if p.requires_grad]
    arguments: dict[str, Any] = {"model_parameters": params}
    if setup.client:
        arguments = {"optimizer": runs.make_optimizer(setup, params)}
    recorder = Recorder(folder)
    engine = initialize(model, setup.deepspeed, **arguments)
    where = placed(engine, params)
    recorder.end_step(where)  # of zero gradients, as the wrapper of stage 0 with bf16 makes one
    for step in range(setup.steps):
        for batch in runs.of_this_rank(setup, micro_batches(step)):
            engine.backward(runs.loss_of(engine, batch, setup.dtype))
            engine.step()
        recorder.end_step(where)
    recorder.end(where, {name: whole(p) for name, p in engine.module.named_parameters() if p.requires_grad})


def placed(engine: Any, params: list[nn.Parameter]) -> Where:
    """Where the elements of the tensors that an engine steps lie; of a new engine's.

    Args:
        engine: of :func:`initialize`.
        params: the trained parameters of its model.
    """
    for wrapper, table in TABLES:
        if isinstance(engine.optimizer, wrapper):
            return {id(tensor): numbered(layout) for _, tensor, layout in table(engine.optimizer)}
    return full_tensors(params)


def numbered(layout: Layout) -> list[Fragment]:
    """The fragments of a layout, each with the number of its parameter among those of the model."""
    return [replace(s, parameter=layout.local_shards[s.parameter].parameter.number) for s in layout.fragments]


def initialize(model: nn.Module, config: dict[str, Any], **arguments: Any) -> Any:
    """A DeepSpeed engine that knows NovoGrad, and logs errors only."""
    register()
    deepspeed.logger.setLevel("ERROR")
    return deepspeed.initialize(model=model, config=config, **arguments)[0]


def whole(p: Any) -> Tensor:
    """A copy of a parameter of an engine, gathered from all ranks under ZeRO-3."""
    with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
        weight: Tensor = p.detach().clone()
        return weight
