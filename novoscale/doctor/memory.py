"""The memory of each rank under a config, before and after."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from novoscale.doctor.case import Case, Running
from novoscale.memory import rules
from novoscale.memory.optimizers import novograd_rule
from novoscale.memory.planning import Plan, plan
from novoscale.memory.rules import Rule
from novoscale.tools.configs import section_of

ADAMS = ("FusedAdam", "DeepSpeedCPUAdam", "torch.optim.AdamW", "torch.optim.Adam")
# Classes whose state is known by rule, and the names by which it is said.
STATES: dict[str, Rule] = {
    **dict.fromkeys(ADAMS, rules.elementwise(2)),
    "FusedLion": rules.elementwise(1),
    "DeepSpeedCPULion": rules.elementwise(1),
    "DeepSpeedCPUAdagrad": rules.elementwise(1),
    "torch.optim.Adagrad": rules.elementwise(1),
    "torch.optim.RMSprop": rules.elementwise(1),
    "torch.optim.Adafactor": rules.factored(momentum=False, as_weights=True),
    "torch.optim.SGD": rules.elementwise(0),
}


class NotPlannedError(ValueError):
    """There is no plan for this; says why."""


@dataclass(frozen=True)
class Memory:
    """What a rank holds with one optimizer and with NovoGrad.

    Attributes:
        sharding: of ``novoscale.memory.shardings``.
        before: the name of the other optimizer.
    """

    model: str
    ranks: int
    sharding: str
    precision: str
    before: str
    before_plan: Plan
    novograd_plan: Plan

    def to_dict(self) -> dict[str, Any]:
        """For JSON; bytes."""
        plans = {"before_plan": self.before_plan, "novograd_plan": self.novograd_plan}
        sums = {k: {**asdict(p), "total": p.total, "on_device": p.on_device} for k, p in plans.items()}
        return {**asdict(self), **sums}


def memory(case: Case, now: Running, section: dict[str, Any], model: str) -> Memory:
    """Plan a model with the optimizer that will run, and with NovoGrad; for a NovoGrad against AdamW.

    Args:
        case: the config.
        now: what will run.
        section: the "optimizer" of the NovoGrad config.
        model: of ``novoscale plan``.

    Raises:
        NotPlannedError: no rule for the sharding or the optimizer, or the number of ranks is not known.
        MemoryToolError: no such model.
    """
    from novoscale.memory import models

    ranks = case.ranks or case.yaml("num_processes")
    if not isinstance(ranks, int) or ranks < 1:
        raise NotPlannedError("the config does not say how many ranks; add --ranks")
    sharding, precision = _sharding(case), _precision(case)
    runs_novograd = now.optimizer is None or now.optimizer.startswith("novoscale")
    before = "torch.optim.AdamW" if runs_novograd else str(now.optimizer)
    before_rule = _state(before, case)
    params = {k: v for k, v in section_of(section, "params").items() if v != "auto"}
    orthogonal = params.get("preset") == "muon"
    if orthogonal and sharding not in ("none", "ddp"):
        raise NotPlannedError(
            f'preset="muon" needs whole matrices on each rank, which {sharding} does not leave'
        )
    try:
        novograd = novograd_rule(params)
    except (KeyError, TypeError):
        raise NotPlannedError("the options of NovoGrad are not right, see above") from None
    built = models.build(model, "meta")
    return Memory(
        model,
        ranks,
        sharding,
        precision,
        before,
        plan(built, before_rule, sharding, ranks, precision),
        plan(built, novograd, sharding, ranks, precision, orthogonal=orthogonal),
    )


def _state(optimizer: str, case: Case) -> Rule:
    if optimizer == "torch.optim.SGD" and case.params.get("momentum"):
        return rules.elementwise(1)
    if optimizer not in STATES:
        raise NotPlannedError(f"no rule gives the state of {optimizer}; novoscale memory measures it")
    return STATES[optimizer]


def _sharding(case: Case) -> str:
    if case.deepspeed:
        if case.get("zero_optimization.offload_param.device", "none") != "none" or (
            case.stage == 3 and case.offload != "none"
        ):
            raise NotPlannedError("there is no plan for stage 3 with offload")
        if case.offload != "none":
            return "offload"
        return ("ddp", "zero1", "zero2", "zero3")[case.stage] if 0 <= case.stage <= 3 else "ddp"
    kind = str(case.yaml("distributed_type"))
    if kind == "FSDP":
        return "fsdp2"
    if kind == "NO" or kind.startswith("MULTI_"):
        return "ddp" if kind.startswith("MULTI_") else "none"
    raise NotPlannedError(f"there is no plan for distributed_type {kind}")


def _precision(case: Case) -> str:
    if case.get("bf16.bf16_master_weights_and_grads") is True:
        return "bfloat16"
    if case.get("bf16.enabled") is True or case.get("fp16.enabled") is True:
        return "bf16-mixed"
    return "bf16-mixed" if str(case.yaml("mixed_precision")) in ("bf16", "fp16") else "float32"
