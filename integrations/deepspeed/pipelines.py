"""Pipelines: stages number their parameters as one process does, and skip a step together.

The random bits for rounding depend on a parameter's number. Each stage has an optimizer of its own
parameters, and a tied weight has a copy on several stages: the copies stay the same only if they have the
same number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.pipe.module import PipelineModule
from torch import Tensor

from novoscale import NovoGrad

from . import vetoes
from .engine import extend

Key = tuple[str, int]  # of a param group: its options, and which it is of those with the same options


def register() -> None:
    """Have the engine of a pipeline look at a NovoGrad before it is wrapped. Idempotent."""
    extend("_do_optimizer_sanity_check", _prepare)


def _prepare(original: Callable[..., Any], engine: Any, optimizer: NovoGrad) -> Any:
    wrapper = original(optimizer)
    stages = vetoes.stages_of(engine.mpu)
    if stages is not None and isinstance(engine.module, PipelineModule):
        _number(optimizer, engine.module, stages)
        if wrapper is None:
            vetoes.veto_stages(optimizer, stages)
    return wrapper


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
