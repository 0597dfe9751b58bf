"""The configurations of DeepSpeed under which NovoGrad cannot work, or its training would not be exact."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer

from . import layouts


class UnsupportedConfigError(ValueError):
    """A DeepSpeed configuration under which NovoGrad's training would not be exact."""


def refuse_unsupported(wrapper: Any, arguments: dict[str, Any]) -> None:
    """Refuse a wrapper whose configuration NovoGrad does not support, before DeepSpeed has changed anything.

    Args:
        wrapper: of DeepSpeed, not constructed yet.
        arguments: of its constructor, by name.

    Raises:
        UnsupportedConfigError: with the option of the config, and what to do.
    """
    for config, (found, reason) in _unsupported(wrapper, arguments).items():
        if found:
            raise UnsupportedConfigError(
                f"NovoGrad does not support this DeepSpeed configuration: {config}: {reason}"
            )


def _unsupported(wrapper: Any, arguments: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    get = arguments.get
    offload = _device(get("offload_optimizer_config"))
    adam = "DeepSpeed implements it for its own Adam only. Remove it from the config"
    mpu = get("mpu")
    params = [p for group in arguments["init_optimizer"].param_groups for p in group["params"]]
    parallel = any(layouts.is_tensor_parallel(p) for p in params)
    bf16_master = get("bf16_master_weights_and_gradients")
    return {
        "FP16_Optimizer": (isinstance(wrapper, FP16_Optimizer), "it flattens for fused Adam"),
        '"zenflow"': (get("zenflow_config") is not None, adam),
        '"super_offload"': ("SuperOffload" in type(wrapper).__name__, adam),
        '"offload_optimizer": {"ratio": ...} below 1 (Twin-Flow)': (
            offload != "none" and get("offload_ratio", 1.0) != 1.0,
            adam,
        ),
        '"fp16_master_weights_and_grads"': (bool(get("fp16_master_weights_and_gradients")), adam),
        '"bf16_master_weights_and_grads" with offload, or without "bf16_optimizer_states"': (
            bool(bf16_master) and (offload != "none" or not get("bf16_optimizer_states")),
            adam,
        ),
        '"offload_optimizer": {"device": "nvme"}': (
            offload == "nvme" or _device(get("offload_param_config")) == "nvme",
            "its swapper takes every state for a flat partition. Use the device cpu",
        ),
        '"elastic_checkpoint": true': (
            bool(get("elastic_checkpoint")),
            "it would merge the layers' second moments as if they were elements. Remove it from the config",
        ),
        "tensor-parallel parameters without an mpu": (
            parallel and mpu is None,
            "the group over which their layers are sharded is not known. Pass mpu= to deepspeed.initialize",
        ),
        "tensor-parallel parameters in a pipeline": (
            parallel and int(getattr(mpu, "pipe_parallel_size", 1)) > 1,
            "its model-parallel group spans layers of other pipeline stages. Use one of the two",
        ),
        '"torch_autocast": {"dtype": "float16"}': (
            _autocasts_to_float16(),
            "its gradient scaler decides on each rank alone whether to step. Use bfloat16",
        ),
    }


def _device(offload: Any) -> str:
    device = getattr(offload, "device", None)
    return "none" if device is None else str(getattr(device, "value", device))


def _autocasts_to_float16() -> bool:
    try:
        from deepspeed.runtime.torch_autocast import get_autocast_dtype, is_autocast_initialized
    except ImportError:  # DeepSpeed before 0.17 has no torch_autocast
        return False
    return bool(is_autocast_initialized() and get_autocast_dtype() == torch.float16)
