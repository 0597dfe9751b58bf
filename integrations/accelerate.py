"""Accelerate: NovoGrad is not replaced without a word, and every rank is counted.

With ``offload_optimizer`` in the DeepSpeed config, Accelerate replaces a client optimizer that is not Adam,
Adagrad or Lion by DeepSpeedCPUAdam, silently (accelerate 1.15, ``map_pytorch_optim_to_deepspeed``; its issues
2169 and 3255). Importing this module has it refuse to do that to a NovoGrad.

Where Accelerate finds no GPU, it leaves the process group's backend to DeepSpeed, and takes "no backend" for
"one process": DeepSpeed has all ranks, and Accelerate gives each of them the same batches (accelerate 1.15,
``PartialState``). Importing this module has it name DeepSpeed's backend. What remains is refused.

Importing ``novoscale.integrations.deepspeed`` imports this one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import accelerate.accelerator as accelerator
import accelerate.state as state
import torch

from novoscale import NovoGrad


class OptimizerReplacedError(RuntimeError):
    """Training would go on with another optimizer than the one asked for."""


class RanksNotCountedError(RuntimeError):
    """Every rank would train on the same data."""


def register() -> None:
    """Extend Accelerate. Called on import; idempotent."""
    _extend(accelerator, "map_pytorch_optim_to_deepspeed", _refuse_replacement)
    _extend(state.PartialState, "_prepare_backend", _name_backend)
    _extend(accelerator.Accelerator, "_prepare_deepspeed", _check_ranks)


def _extend(owner: Any, name: str, extension: Callable[..., Any]) -> None:
    """Have ``extension`` called instead, with the original before its arguments."""
    original = getattr(owner, name, None)
    if original is None or hasattr(original, "_novoscale"):
        return

    @functools.wraps(original)
    def extended(*args: Any, **kwargs: Any) -> Any:
        return extension(original, *args, **kwargs)

    extended._novoscale = True  # type: ignore[attr-defined]
    setattr(owner, name, extended)


def _refuse_replacement(original: Callable[..., Any], optimizer: Any) -> Any:
    if isinstance(optimizer, NovoGrad):
        raise OptimizerReplacedError(
            "Accelerate would replace NovoGrad by DeepSpeedCPUAdam, because the DeepSpeed config "
            'offloads the optimizer. Set "zero_force_ds_cpu_optimizer": false in it, or name the '
            'optimizer there: "optimizer": {"type": "NovoGrad", ...} with accelerate.utils.DummyOptim'
        )
    return original(optimizer)


def _name_backend(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    backend, kind = original(*args, **kwargs)
    # The two conditions under which Accelerate then starts DeepSpeed's process group.
    launched = int(os.environ.get("LOCAL_RANK", -1)) != -1
    if backend is None and launched and os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        from deepspeed.accelerator import get_accelerator

        backend = get_accelerator().communication_backend_name()
    return backend, kind


def _check_ranks(original: Callable[..., Any], self: Any, *args: Any) -> Any:
    prepared = original(self, *args)
    ranks = torch.distributed.get_world_size()
    if self.num_processes != ranks:
        raise RanksNotCountedError(
            f"Accelerate counts {self.num_processes} process, DeepSpeed has {ranks} ranks: every rank would "
            "train on the same data. Start the script with accelerate launch or torchrun, or set LOCAL_RANK, "
            "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT on every rank before Accelerator() is made"
        )
    return prepared


register()
