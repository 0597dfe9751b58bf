"""How a model is sharded over ranks, and in which precision it trains: one set-up for each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from novoscale.memory.accounting import AliveGradients
from novoscale.memory.optimizers import Candidate
from novoscale.optimizer.release import release_gradients
from novoscale.verify import runs

# name: the ZeRO section of a DeepSpeed config; None: torch's own
SHARDINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "ddp": None,
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "fsdp2": None,
}
TITLES = {
    "none": "one process",
    "ddp": "DDP",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "offload": "ZeRO-2, offload",
    "fsdp2": "FSDP2",
}
# Its own default, 5e8 elements, is a buffer larger than the models that are measured here.
BUCKET = 1 << 20

# name: of the model as it is computed with; whether the optimizer updates float32 copies
PRECISIONS = ("float32", "bf16-mixed", "bfloat16")


@dataclass(frozen=True)
class Training:
    """A sharded model with its optimizer; ready to take steps.

    Attributes:
        model: what ``account`` takes: the module or the engine.
        optimizer: the optimizer, with its wrappers if there are some.
        gathered: gives the full weight of a parameter, from the shards of all ranks.
        alive: counts the gradients that are alive at once; None unless they are released.
    """

    model: Any
    optimizer: Any
    forward: Callable[[dict[str, Tensor]], Tensor]
    backward: Callable[[Tensor], Any]
    step: Callable[[], Any]
    gathered: Callable[[Any], Tensor]
    alive: AliveGradients | None = None


def set_up(
    model: nn.Module, optimizer: Candidate, sharding: str, precision: str, release: bool = False
) -> Training:
    """Shard a float32 model over the ranks of the process group.

    Args:
        model: on the device on which it trains.
        optimizer: of the catalogue.
        sharding: of ``SHARDINGS``.
        precision: "float32"; "bf16-mixed": computed in bfloat16, updated in float32 (DeepSpeed's ``bf16``,
            FSDP2's mixed precision, autocast); or "bfloat16" throughout.
        release: with ``release_gradients``, where ``releasing.why_not`` has nothing against it.
    """
    section = SHARDINGS[sharding]
    if section is None:
        return _torch(model, optimizer, sharding, precision, release)
    training = importlib.import_module("novoscale.integrations.deepspeed.training")
    config = deepspeed_config(section, precision)
    if precision != "float32":
        model = model.bfloat16()
    engine = training.initialize(model, config, optimizer=optimizer.make(model))
    return Training(
        engine,
        engine.optimizer,
        lambda batch: runs.loss_of(engine, batch, torch.float32),
        engine.backward,
        engine.step,
        training.whole,
    )


def deepspeed_config(section: dict[str, Any], precision: str) -> dict[str, Any]:
    """The DeepSpeed config of a ZeRO section and a precision."""
    bf16: dict[str, Any] = {"enabled": precision != "float32"}
    if precision == "bfloat16":
        bf16.update(bf16_master_weights_and_grads=True, bf16_optimizer_states=True)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET, **section},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": bf16,
    }


def _torch(model: nn.Module, candidate: Candidate, sharding: str, precision: str, release: bool) -> Training:
    if precision == "bfloat16":
        model = model.bfloat16()
    mixed = precision == "bf16-mixed"
    policy = (
        {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
        if mixed and sharding == "fsdp2"
        else {}
    )
    device = next(model.parameters()).device.type
    trained = runs.shard(model, sharding, **policy)
    optimizer = candidate.make(model)
    alive = AliveGradients(trained.parameters()) if release else None  # before what frees them
    if release:
        release_gradients(trained, optimizer)

    def forward(batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=mixed and sharding != "fsdp2"):
            return runs.loss_of(trained, batch, torch.float32)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def backward(loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    return Training(trained, optimizer, forward, backward, step, runs.gathered, alive)
