"""Accelerate: a NovoGrad is not replaced by another optimizer without a word.

With ``offload_optimizer`` in the DeepSpeed config, Accelerate replaces a client optimizer that is not Adam,
Adagrad or Lion by DeepSpeedCPUAdam, silently (accelerate 1.15, ``map_pytorch_optim_to_deepspeed``; its issues
2169 and 3255). Importing this module has it refuse to do that to a NovoGrad. Importing
``novoscale.integrations.deepspeed`` imports this one.
"""

from __future__ import annotations

import functools
from typing import Any

import accelerate.accelerator as accelerator

from novoscale import NovoGrad


class OptimizerReplacedError(RuntimeError):
    """Training would go on with another optimizer than the one asked for."""


def register() -> None:
    """Guard Accelerate's replacement of optimizers. Called on import; idempotent."""
    original = getattr(accelerator, "map_pytorch_optim_to_deepspeed", None)
    if original is None or hasattr(original, "_novoscale"):
        return

    @functools.wraps(original)
    def guarded(optimizer: Any) -> Any:
        if isinstance(optimizer, NovoGrad):
            raise OptimizerReplacedError(
                "Accelerate would replace NovoGrad by DeepSpeedCPUAdam, because the DeepSpeed config "
                'offloads the optimizer. Set "zero_force_ds_cpu_optimizer": false in it, or name the '
                'optimizer there: "optimizer": {"type": "NovoGrad", ...} with accelerate.utils.DummyOptim'
            )
        return original(optimizer)

    guarded._novoscale = True  # type: ignore[attr-defined]
    accelerator.map_pytorch_optim_to_deepspeed = guarded


register()
