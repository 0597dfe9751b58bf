"""Pipelines: stages number their parameters as one process does, and skip a step together.

The random bits for rounding depend on a parameter's number. Each stage has an optimizer of its own
parameters, and a tied weight has a copy on several stages: the copies stay the same only if they have the
same number.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.module import PipelineModule
from torch import Tensor

from novoscale import NovoGrad

Key = tuple[str, int]  # of a param group: its options, and which it is of those with the same options


def register() -> None:
    """Have an engine of a pipeline look at a NovoGrad before it is wrapped. Idempotent."""
    original = DeepSpeedEngine._do_optimizer_sanity_check
    if hasattr(original, "_novoscale"):
        return

    @functools.wraps(original)
    def check(self: Any, basic_optimizer: Any) -> Any:
        wrapper = original(self, basic_optimizer)
        if isinstance(basic_optimizer, NovoGrad) and isinstance(self.module, PipelineModule):
            stages = self.mpu.get_pipe_parallel_group()
            _number(basic_optimizer, self.module, stages)
            if wrapper is None:  # DeepSpeed's wrappers look at the gradients of all stages
                _skip_together(basic_optimizer, stages)
        return wrapper

    check._novoscale = True  # type: ignore[attr-defined]
    DeepSpeedEngine._do_optimizer_sanity_check = check


def _number(optimizer: NovoGrad, module: PipelineModule, stages: dist.ProcessGroup) -> None:
    """Number a stage's parameters as an optimizer of the whole model does. A collective of the stages."""
    names = {id(p): name for name, p in module.named_parameters()}
    mine: dict[Key, dict[str, Any]] = {}  # of each group the parameters, by name
    for key, group in _groups(optimizer):
        unnamed = f"stage {module.stage_id}, {key}: "
        mine[key] = {names.get(id(p), unnamed + str(n)): p for n, p in enumerate(group)}
    gathered: list[Any] = [None] * dist.get_world_size(stages)
    dist.all_gather_object(gathered, {key: list(group) for key, group in mine.items()}, group=stages)

    params = {name: p for group in mine.values() for name, p in group.items()}
    of_all: dict[Key, list[str]] = {}
    for groups in gathered:
        for key, found in groups.items():
            of_all.setdefault(key, []).extend(found)
    once = dict.fromkeys(name for group in of_all.values() for name in sorted(group, key=_is_not_tied))
    # What is of another stage only takes up a number.
    optimizer.number_as([{"params": [params.get(name, name) for name in once]}])


def _is_not_tied(name: str) -> bool:
    """Whether a parameter comes after the tied modules, which a PipelineModule has first."""
    return not name.startswith("tied_modules.")


def _groups(optimizer: NovoGrad) -> Iterator[tuple[Key, list[Tensor]]]:
    """The param groups, each with a key that other stages have for theirs, which may lack some groups."""
    alike: Counter[str] = Counter()
    for group in optimizer.param_groups:
        options = repr([(k, v) for k, v in sorted(group.items()) if k not in ("params", "param_names")])
        yield (options, alike[options]), group["params"]
        alike[options] += 1


def _skip_together(optimizer: NovoGrad, stages: dist.ProcessGroup) -> None:
    """Have a gradient that is not finite keep all stages from stepping. Each step is a collective of them."""

    def agree(*_: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        device = optimizer.param_groups[0]["params"][0].device
        # The largest magnitude carries NaN and infinity, and needs no memory that grows.
        largest = [torch.linalg.vector_norm(g, ord=torch.inf) for g in grads if g.numel()]
        skip = torch.zeros((), dtype=torch.int32, device=device)
        if largest:
            skip += ~torch.stack(largest).isfinite().all()
        dist.all_reduce(skip, dist.ReduceOp.MAX, group=stages)
        optimizer.veto(skip.bool())

    optimizer.register_step_pre_hook(agree)
