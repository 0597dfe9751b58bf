"""What each rank runs for the tests of DeepSpeed's pipelines: the embedding is tied to the head."""

from __future__ import annotations

from functools import partial
from typing import Any

import deepspeed
import novoscale.integrations.deepspeed  # noqa: F401
import pytest
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn

from novoscale.checkpoint.errors import CheckpointError

WORDS, WIDTH, SAMPLES, STEPS = 300, 24, 8, 6  # an embedding that is large enough for codes


class Logits(nn.Module):
    """The head: the embedding again, and what only the last stage has."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def by_embedding(embedding: nn.Embedding, x: torch.Tensor) -> torch.Tensor:
    return x @ embedding.weight.T


def loss_of(logits: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), words.flatten())


def made(ds: dict[str, Any], stages: int) -> Any:
    """An engine of a pipeline, whose weights do not depend on the number of stages."""
    deepspeed.init_distributed("gloo")  # a PipelineModule asks for it before there is an engine
    layers = [
        TiedLayerSpec("embedding", nn.Embedding, WORDS, WIDTH),
        LayerSpec(nn.Linear, WIDTH, 2 * WIDTH),
        LayerSpec(nn.Tanh),
        LayerSpec(nn.Linear, 2 * WIDTH, WIDTH),
        LayerSpec(Logits),
        TiedLayerSpec("embedding", nn.Embedding, WORDS, WIDTH, forward_fn=by_embedding),
    ]
    module = PipelineModule(
        layers, num_stages=stages, loss_fn=loss_of, seed_layers=True, partition_method="uniform"
    )
    vectors, matrices = ([p for p in module.parameters() if (p.ndim < 2) is flat] for flat in (True, False))
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices}]
    return deepspeed.initialize(model=module, config=ds, model_parameters=groups)[0]


def batches(step: int, engine: Any) -> Any:
    """The micro-batches of a step, those of this data-parallel rank."""
    words = torch.randint(WORDS, (SAMPLES, 5), generator=torch.Generator().manual_seed(step))
    count = engine.gradient_accumulation_steps() * engine.dp_world_size
    mine = words.chunk(count)[engine.mpu.get_data_parallel_rank() :: engine.dp_world_size]
    return iter([(w, w) for w in mine])


def weights(engine: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().float().clone() for name, p in engine.module.named_parameters()}


def trained(ds: dict[str, Any], stages: int) -> dict[str, torch.Tensor]:
    """The weights of this rank's stage after some steps."""
    engine = made(ds, stages)
    for step in range(STEPS):
        engine.train_batch(batches(step, engine))
    return weights(engine)


def resumed(ds: dict[str, Any], folder: str) -> bool:
    """Whether this stage ends with the same weights if it is saved and loaded on the way."""
    straight = trained(ds, 2)
    engine = made(ds, 2)
    for step in range(STEPS // 2):
        engine.train_batch(batches(step, engine))
    engine.save_checkpoint(folder)
    engine = made(ds, 2)
    engine.load_checkpoint(folder)
    for step in range(STEPS // 2, STEPS):
        engine.train_batch(batches(step, engine))
    return all(torch.equal(w, straight[name]) for name, w in weights(engine).items())


def saved(ds: dict[str, Any], stages: int, folder: str) -> None:
    engine = made(ds, stages)
    engine.train_batch(batches(0, engine))
    engine.save_checkpoint(folder)


def error_of_loading(ds: dict[str, Any], stages: int, folder: str) -> str:
    engine = made(ds, stages)
    before = weights(engine)
    with pytest.raises(CheckpointError) as error:
        engine.load_checkpoint(folder)
    assert all(torch.equal(w, before[name]) for name, w in weights(engine).items())
    return str(error.value)


def infinite_on_the_last_stage(ds: dict[str, Any]) -> tuple[bool, bool]:
    """Whether this stage changed in a step with an infinite gradient on the last stage; and in the next."""
    engine = made(ds, 2)
    engine.train_batch(batches(0, engine))
    spoilt = [p for name, p in engine.module.named_parameters() if name.endswith("scale")]
    hooks = [p.register_hook(partial(torch.full_like, fill_value=torch.inf)) for p in spoilt]
    changed = []
    for step in range(1, 3):
        before = weights(engine)
        engine.train_batch(batches(step, engine))
        changed.append(any(not torch.equal(w, before[name]) for name, w in weights(engine).items()))
        for hook in hooks:
            hook.remove()
    return changed[0], changed[1]
