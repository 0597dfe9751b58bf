"""DeepSpeed: ``"optimizer": {"type": "NovoGrad"}``, with exact layer statistics under every wrapper.

Importing this module registers NovoGrad with DeepSpeed, by name and as an optimizer that ZeRO may
wrap, and has every wrapper tell a NovoGrad which layers its flat partitions hold, when the wrapper is
constructed. It has to be imported before ``deepspeed.initialize``; importing it again does nothing.

ZeRO replaces the parameters of a param group by one flat tensor on each rank, cut without regard to
layers. DeepSpeed's wrappers have no way to announce that, so their constructors are extended here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import deepspeed.runtime.config as ds_config
import deepspeed.runtime.zero.stage3 as zero_3
import deepspeed.runtime.zero.utils as zero_utils
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from novoscale import NovoGrad

from . import deepspeed_layouts as layouts
from . import deepspeed_saving as saving
from . import deepspeed_tools as tools
from . import deepspeed_universal as universal

NAME = "NovoGrad"


class UnsupportedConfigError(ValueError):
    """A DeepSpeed configuration under which NovoGrad's training would not be exact."""


def register() -> None:
    """Make DeepSpeed know NovoGrad. Called on import; idempotent.

    Raises:
        RuntimeError: if torch or another package already has an optimizer of this name.
    """
    present = getattr(torch.optim, NAME, NovoGrad)
    if present is not NovoGrad:
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
    _extend(DeepSpeedZeroOptimizer, _bind_zero_1_and_2)
    _extend(zero_3.DeepSpeedZeroOptimizer_Stage3, _bind_zero_3)
    _extend(BF16_Optimizer, _bind_bf16)
    _extend(FP16_Optimizer, lambda _: None)
    # Its constructor ends with a step on zero gradients, which must already find the layout.
    _extend(FP16_UnfusedOptimizer, lambda _: None)
    _extend_dummy_step(FP16_UnfusedOptimizer)
    tools.register()
    saving.register()
    universal.register()
    for framework in ("accelerate", "transformers"):
        if importlib.util.find_spec(framework) is not None:
            importlib.import_module(f"novoscale.integrations.{framework}")


def _extend(wrapper: Any, bind: Callable[[Any], None]) -> None:
    """Have a wrapper's constructor refuse what cannot work, and ``bind`` the wrapper when it is made.

    Only where the optimizer that it wraps is a NovoGrad.
    """
    original = wrapper.__init__
    if hasattr(original, "_novoscale"):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        optimizer = bound.arguments.get("init_optimizer")
        tools.detach(p for group in getattr(optimizer, "param_groups", ()) for p in group["params"])
        if not isinstance(optimizer, NovoGrad):
            original(self, *args, **kwargs)
            return
        optimizer.refuse_clipping("DeepSpeed")
        _refuse(self, bound.arguments)
        original(self, *args, **kwargs)
        bind(self)

    init._novoscale = True  # type: ignore[attr-defined]
    wrapper.__init__ = init


def _extend_dummy_step(wrapper: Any) -> None:
    original = wrapper.initialize_optimizer_states
    if hasattr(original, "_novoscale"):
        return

    @functools.wraps(original)
    def initialize(self: Any) -> None:
        if isinstance(self.optimizer, NovoGrad):
            _bind(self, "DeepSpeed FP16_UnfusedOptimizer", layouts.unfused)
        original(self)

    initialize._novoscale = True  # type: ignore[attr-defined]
    wrapper.initialize_optimizer_states = initialize


# ---- what is bound -----------------------------------------------------------------------------------


def _bind(wrapper: Any, name: str, tensors: Callable[[Any], Iterator[layouts.Bound]]) -> list[layouts.Bound]:
    bound = list(tensors(wrapper))
    wrapper.optimizer.bind(name, bound)
    if hasattr(wrapper, "_load_universal_checkpoint"):
        universal.load_universal(wrapper, bound)
    return bound


def _bind_zero_1_and_2(zero: Any) -> None:
    stage = 2 if zero.partition_gradients else 1
    bound = _bind(zero, f"DeepSpeed ZeRO stage {stage}", layouts.zero_1_and_2)
    tools.attach(zero.optimizer, bound, zero.bit16_groups, zero.real_dp_process_group)
    checks = getattr(zero, "compute_grad_norm", False) and (
        zero.dtype != torch.bfloat16 or zero.check_grad_overflow
    )
    _veto_step(zero, zero.single_partition_of_fp32_groups, checks)


def _bind_bf16(wrapper: Any) -> None:
    bound = _bind(wrapper, "DeepSpeed BF16_Optimizer", layouts.bf16)
    tools.attach(wrapper.optimizer, bound, wrapper.bf16_groups, wrapper.real_dp_process_group)


def _bind_zero_3(zero: Any) -> None:
    bound = _bind(zero, "DeepSpeed ZeRO stage 3", layouts.zero_3)
    over = [layouts.process_group_of_sub_group(zero, i) for i in range(len(zero.fp16_groups))]
    tools.attach(zero.optimizer, bound, zero.fp16_groups, over)
    _veto_step(zero, zero.fp32_partitioned_groups_flat, hasattr(zero_3, "is_invalid_grad_norm"))


def _veto_step(zero: Any, flats: Iterable[Tensor], deepspeed_checks: bool) -> None:
    """Have a non-finite gradient in any group keep all groups from stepping.

    DeepSpeed steps group by group. Where it does not look at all gradients first, the first group would
    have changed by the time that the second turns out not to be finite.
    """
    flats = list(flats)
    if deepspeed_checks or len(flats) < 2:
        return
    step = zero.step

    @functools.wraps(step)
    def checked(*args: Any, **kwargs: Any) -> Any:
        averaged = [grad for grads in zero.averaged_gradients.values() for grad in grads or ()]
        grads = [g for g in (*averaged, *(flat.grad for flat in flats)) if g is not None and g.numel()]
        # The largest magnitude carries NaN and infinity, and needs no memory that grows.
        largest = [torch.linalg.vector_norm(g, ord=torch.inf) for g in grads]
        zero.optimizer.veto(~torch.stack(largest).isfinite().all() if largest else None)
        try:
            return step(*args, **kwargs)
        finally:
            zero.optimizer.veto(None)

    zero.step = checked


# ---- what is refused ---------------------------------------------------------------------------------


def _refuse(wrapper: Any, arguments: dict[str, Any]) -> None:
    """Raise UnsupportedConfigError, before DeepSpeed has changed anything, where NovoGrad cannot work."""
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
            "the group over which their layers are cut is not known. Pass mpu= to deepspeed.initialize",
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


register()
