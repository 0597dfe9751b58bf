"""DeepSpeed: ``"optimizer": {"type": "NovoGrad"}``, with exact layer statistics under every wrapper.

Importing this module registers NovoGrad with DeepSpeed, by name and as an optimizer that ZeRO may
wrap, and has every wrapper tell a NovoGrad which layers its flat partitions hold, when the wrapper is
constructed. It has to be imported before ``deepspeed.initialize``; importing it again does nothing.

ZeRO replaces the parameters of a param group by one flat tensor on each rank, sharded without regard to
layers. DeepSpeed's wrappers have no way to announce that, so ``wrappers`` extends their constructors.
"""

from __future__ import annotations

import importlib
import importlib.util

import deepspeed.runtime.config as ds_config
import deepspeed.runtime.zero.utils as zero_utils
import torch

from novoscale import NovoGrad
from novoscale.optimizer.by_name import NAME, not_registered

from . import pipelines, saving, tools, universal, wrappers
from .refusals import UnsupportedConfigError

__all__ = ["NAME", "UnsupportedConfigError", "register"]


def register() -> None:
    """Make DeepSpeed know NovoGrad. Called on import; idempotent.

    Raises:
        RuntimeError: if torch or another package already has an optimizer of this name.
    """
    present = getattr(torch.optim, NAME, NovoGrad)
    if present not in (NovoGrad, not_registered):
        raise RuntimeError(
            f"torch.optim.{NAME} is already {present.__module__}.{present.__qualname__}: DeepSpeed would "
            "find that one by name. Do not import both"
        )
    # DeepSpeed looks a name up in torch.optim, after lower-casing those it lists: with both, any
    # capitalisation works, as it does for DeepSpeed's own optimizers.
    setattr(torch.optim, NAME, NovoGrad)
    setattr(torch.optim, NAME.lower(), NovoGrad)
    if NAME.lower() not in ds_config.DEEPSPEED_OPTIMIZERS:
        ds_config.DEEPSPEED_OPTIMIZERS.append(NAME.lower())
    if NovoGrad not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
        zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(NovoGrad)
    wrappers.register()
    pipelines.register()
    tools.register()
    saving.register()
    universal.register()
    for framework in ("accelerate", "transformers"):
        if importlib.util.find_spec(framework) is not None:
            importlib.import_module(f"novoscale.integrations.{framework}")


register()
