"""A gradient that is not finite keeps all param groups, and all stages of a pipeline, from stepping.

DeepSpeed steps group by group, and each stage of a pipeline by itself. Where it does not look at all
gradients first, some would have stepped by the time that another turns out not to be finite.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from novoscale import NovoGrad
from novoscale.sharding.collectives import all_reduce


def stages_of(mpu: Any) -> dist.ProcessGroup | None:
    """The ranks that have the other stages of a pipeline; None if there is no pipeline.

    Args:
        mpu: what DeepSpeed's engine and wrappers have under this name; of a pipeline its grid.
    """
    if int(getattr(mpu, "pipe_parallel_size", 1)) < 2:
        return None
    stages: dist.ProcessGroup = mpu.get_pipe_parallel_group()
    return stages


def veto_groups(zero: Any, flats: Sequence[Tensor], deepspeed_checks: bool) -> None:
    """Have a wrapper of ZeRO look at the gradients of all groups and stages before it steps the first.

    Args:
        zero: the wrapper.
        flats: its flat tensors.
        deepspeed_checks: whether it does so by itself. The same on every stage, for the look is a collective.
    """
    stages = stages_of(getattr(zero, "mpu", None))
    if deepspeed_checks or (stages is None and len(flats) < 2):
        return
    step = zero.step

    @functools.wraps(step)
    def checked(*args: Any, **kwargs: Any) -> Any:
        averaged = [grad for grads in zero.averaged_gradients.values() for grad in grads or ()]
        zero.optimizer.veto(_not_finite([*averaged, *(flat.grad for flat in flats)], flats[0].device, stages))
        try:
            return step(*args, **kwargs)
        finally:
            zero.optimizer.veto(None)

    zero.step = checked


def veto_stages(optimizer: NovoGrad, stages: dist.ProcessGroup) -> None:
    """Have each step of an optimizer that no wrapper steps look at the gradients of all stages before."""

    def look(*_: Any) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.veto(_not_finite([p.grad for p in params], params[0].device, stages))

    optimizer.register_step_pre_hook(look)


def _not_finite(
    grads: Iterable[Tensor | None], device: torch.device, stages: dist.ProcessGroup | None
) -> Tensor:
    """Whether a gradient is not finite, here or on another stage; 0-dim bool, on ``device``."""
    # The largest magnitude carries NaN and infinity, and needs no memory that grows.
    largest = [torch.linalg.vector_norm(g, ord=torch.inf) for g in grads if g is not None and g.numel()]
    found = torch.zeros((), dtype=torch.int32, device=device)
    if largest:
        found = (~torch.stack(largest).isfinite().all()).to(found)
    if stages is not None:
        found = all_reduce(found, dist.ReduceOp.MAX, stages)
    return found.bool()
