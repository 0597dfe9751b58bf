"""DeepSpeed: ``"optimizer": {"type": "NovoGrad"}``, with exact layer statistics under ZeRO.

Importing this module registers NovoGrad with DeepSpeed, by name and as an optimizer that ZeRO may
wrap, and has every ZeRO wrapper tell a NovoGrad which layers its flat partitions hold, when the
wrapper is constructed. It has to be imported before ``deepspeed.initialize``; importing it again does
nothing.

ZeRO replaces the parameters of a param group by one flat tensor on each rank, cut without regard to
layers. DeepSpeed's wrappers have no way to announce that, so their constructors are extended here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed.runtime.config as ds_config
import deepspeed.runtime.zero.utils as zero_utils
import torch
from deepspeed import comm as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from novoscale import NovoGrad
from novoscale.layout import Layer, Layout, LayoutError, Segment, partition

NAME = "NovoGrad"


class UnsupportedConfigError(ValueError):
    """A DeepSpeed configuration under which NovoGrad's layer statistics would not be exact."""


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
    _extend(DeepSpeedZeroOptimizer, _refuse_stage_1_and_2, _bind_stage_1_and_2)
    for wrapper, config in (
        (DeepSpeedZeroOptimizer_Stage3, '"zero_optimization": {"stage": 3}'),
        (BF16_Optimizer, '"data_types": {"grad_accum_dtype": "fp32"} with bf16 and ZeRO stage 1'),
        (FP16_UnfusedOptimizer, "fp16 or bf16 without ZeRO (stage 0)"),
        (FP16_Optimizer, "fp16 or bf16 without ZeRO (stage 0)"),
    ):
        _extend(wrapper, functools.partial(_refuse, config=config), lambda _: None)


def _extend(wrapper: type, before: Callable[[dict[str, Any]], None], after: Callable[[Any], None]) -> None:
    """Have a wrapper's constructor call ``before`` with its arguments, and ``after`` with the wrapper.

    Only where the optimizer that it wraps is a NovoGrad.
    """
    original = wrapper.__init__  # type: ignore[misc]
    if hasattr(original, "_novoscale"):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        optimizer = bound.arguments.get("init_optimizer")
        if isinstance(optimizer, NovoGrad):
            optimizer.refuse_clipping("DeepSpeed")
            before(bound.arguments)
            original(self, *args, **kwargs)
            after(self)
        else:
            original(self, *args, **kwargs)

    init._novoscale = True  # type: ignore[attr-defined]
    wrapper.__init__ = init  # type: ignore[misc]


def _refuse(_: dict[str, Any], config: str) -> None:
    raise UnsupportedConfigError(
        f"NovoGrad does not support this DeepSpeed configuration yet: {config}. Use ZeRO stage 1 or 2"
    )


# ---- ZeRO stages 1 and 2 ----------------------------------------------------------------------------


def _refuse_stage_1_and_2(arguments: dict[str, Any]) -> None:
    get = arguments.get
    offload, mpu = get("offload_optimizer_config"), get("mpu")
    params = [p for group in arguments["init_optimizer"].param_groups for p in group["params"]]
    reasons = {
        '"offload_optimizer"': offload is not None
        and str(getattr(offload.device, "value", offload.device)) != "none",
        '"zenflow"': get("zenflow_config") is not None,
        '"elastic_checkpoint": true': get("elastic_checkpoint"),
        "mixture of experts (MoE layers)": get("has_moe_layers"),
        '"fp16_master_weights_and_grads"': get("fp16_master_weights_and_gradients"),
        '"bf16_master_weights_and_grads"': get("bf16_master_weights_and_gradients"),
        "model parallelism (mpu)": mpu is not None
        and not hasattr(mpu, "initialize_sequence_parallel")
        and mpu.get_model_parallel_world_size() > 1,
        "tensor-parallel parameters": any(
            getattr(p, flag, False) for p in params for flag in ("model_parallel", "tensor_model_parallel")
        ),
        "torch_autocast with float16": _autocasts_to_float16(),
    }
    for config, found in reasons.items():
        if found:
            raise UnsupportedConfigError(
                f"NovoGrad under ZeRO stage 1 or 2 does not support this DeepSpeed configuration yet: "
                f"{config}. Remove it from the DeepSpeed config"
            )


def _autocasts_to_float16() -> bool:
    try:
        from deepspeed.runtime.torch_autocast import get_autocast_dtype, is_autocast_initialized
    except ImportError:  # DeepSpeed before 0.17 has no torch_autocast
        return False
    return bool(is_autocast_initialized() and get_autocast_dtype() == torch.float16)


def _bind_stage_1_and_2(zero: DeepSpeedZeroOptimizer) -> None:
    stage = 2 if zero.partition_gradients else 1
    zero.optimizer.bind(f"DeepSpeed ZeRO stage {stage}", list(_layouts_stage_1_and_2(zero)))
    if len(zero.bit16_groups) > 1 and not _checks_all_gradients(zero):
        _veto_step(zero)


def _layouts_stage_1_and_2(zero: DeepSpeedZeroOptimizer) -> Iterator[tuple[Tensor, Layout]]:
    """The flat tensor of each param group, with its layout.

    Read from the tables by which DeepSpeed copies gradients into the partitions. (``_hp_mapping`` is
    wrong with ``round_robin_gradients``: DeepSpeed 0.19.8, ``link_hp_params``.)
    """
    for i, params in enumerate(zero.bit16_groups):
        process_group = zero.real_dp_process_group[i]
        pieces: list[list[Segment]] = [[] for _ in range(dist.get_world_size(group=process_group))]
        for layer, p in enumerate(params):
            key = zero.get_param_id(p)
            for holder in zero.param_to_partition_ids[i][key]:
                start = zero.grad_partition_insertion_offset[i][holder][key]
                offset = zero.grad_start_offset[i][holder][key]
                stop = min(start + p.numel() - offset, zero.partition_size[i])
                pieces[holder].append(Segment(start, stop, layer, offset))
        rank = dist.get_rank(group=process_group)
        flat = zero.single_partition_of_fp32_groups[i]
        _check_weights(flat, params, pieces[rank])
        layers = [
            Layer(zero.param_names.get(p, f"parameter {n} of param group {i}"), p.numel())
            for n, p in enumerate(params)
        ]
        yield flat, partition(layers, pieces, rank=rank, numel=flat.numel(), process_group=process_group)


def _check_weights(flat: Tensor, params: list[Tensor], segments: list[Segment]) -> None:
    """The flat tensor must hold the weights that the layout says it holds, or DeepSpeed has changed."""
    for s in segments:
        weight = params[s.layer].detach().reshape(-1)[s.offset : s.offset + s.numel].to(flat)
        held = flat.detach()[s.start : s.stop]
        if not bool(((held == weight) | weight.isnan()).all()):
            raise LayoutError(
                "DeepSpeed's flat partition does not hold the weights that its tables say it holds: this "
                "version of DeepSpeed is not supported"
            )


def _checks_all_gradients(zero: DeepSpeedZeroOptimizer) -> bool:
    """Whether DeepSpeed itself skips a step in which any group's gradient is not finite."""
    return getattr(zero, "compute_grad_norm", False) and (
        zero.dtype != torch.bfloat16 or zero.check_grad_overflow
    )


def _veto_step(zero: DeepSpeedZeroOptimizer) -> None:
    """Have a non-finite gradient in any group keep all groups from stepping.

    DeepSpeed steps group by group; where it does not look at all gradients first, the first group
    would have changed by the time that the second turns out not to be finite.
    """
    step = zero.step

    @functools.wraps(step)
    def checked(*args: Any, **kwargs: Any) -> Any:
        # The largest magnitude carries NaN and infinity, and needs no memory that grows.
        largest = [
            torch.linalg.vector_norm(grad, ord=torch.inf)
            for grads in zero.averaged_gradients.values()
            for grad in grads or ()
            if grad is not None and grad.numel()
        ]
        zero.optimizer.veto(~torch.stack(largest).isfinite().all() if largest else None)
        try:
            return step(*args, **kwargs)
        finally:
            zero.optimizer.veto(None)

    zero.step = checked


register()
