"""DeepSpeed's wrappers: once constructed, each tells a NovoGrad which layers its flat tensors hold."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed.runtime.zero.stage3 as zero_3
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from novoscale import NovoGrad

from . import layouts, tools, universal, vetoes
from .refusals import refuse_unsupported


def register() -> None:
    """Extend the constructors of all wrappers. Idempotent."""
    _extend(DeepSpeedZeroOptimizer, _bind_zero_1_and_2)
    _extend(zero_3.DeepSpeedZeroOptimizer_Stage3, _bind_zero_3)
    _extend(BF16_Optimizer, _bind_bf16)
    _extend(FP16_Optimizer, lambda _: None)
    # Its constructor ends with a step on zero gradients, which must already find the layout.
    _extend(FP16_UnfusedOptimizer, lambda _: None)
    _extend_dummy_step(FP16_UnfusedOptimizer)


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
        params = [p for group in getattr(optimizer, "param_groups", ()) for p in group["params"]]
        tools.detach(params)
        # Before the wrapper replaces the parameters.
        setattr(self, layouts.NUMBERS, _numbers(optimizer, params))
        if not isinstance(optimizer, NovoGrad):
            original(self, *args, **kwargs)
            return
        optimizer.refuse_clipping("DeepSpeed")
        refuse_unsupported(self, bound.arguments)
        original(self, *args, **kwargs)
        bind(self)

    init._novoscale = True  # type: ignore[attr-defined]
    wrapper.__init__ = init


def _numbers(optimizer: Any, params: list[Tensor]) -> dict[int, int]:
    """The number of each parameter, by id: its place, or what a pipeline has told a NovoGrad."""
    if isinstance(optimizer, NovoGrad):
        return optimizer.parameter_numbers()
    return {id(p): number for number, p in enumerate(params)}


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
    tools.attach(zero, bound, zero.bit16_groups, zero.real_dp_process_group)
    checks = getattr(zero, "compute_grad_norm", False) and (
        zero.dtype != torch.bfloat16 or zero.check_grad_overflow
    )
    vetoes.veto_groups(zero, zero.single_partition_of_fp32_groups, checks)


def _bind_bf16(wrapper: Any) -> None:
    bound = _bind(wrapper, "DeepSpeed BF16_Optimizer", layouts.bf16)
    tools.attach(wrapper, bound, wrapper.bf16_groups, wrapper.real_dp_process_group)


def _bind_zero_3(zero: Any) -> None:
    bound = _bind(zero, "DeepSpeed ZeRO stage 3", layouts.zero_3)
    over = [layouts.process_group_of_sub_group(zero, i) for i in range(len(zero.fp16_groups))]
    tools.attach(zero, bound, zero.fp16_groups, over)
    vetoes.veto_groups(zero, zero.fp32_partitioned_groups_flat, hasattr(zero_3, "is_invalid_grad_norm"))
