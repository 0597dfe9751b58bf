"""Steps of which some ranks have gradients and others have none."""

from __future__ import annotations

import torch
from torch import Tensor

from novoscale.optimizer.telemetry import Telemetry
from novoscale.sharding.plan import Plan


def step_of_others(plan: Plan, veto: Tensor | None, telemetry: Telemetry) -> None:
    """Take part in the collectives of a step in which this rank has no gradient.

    Args:
        plan: of the step.
        veto: see ``plan.Plan.complete``.
        telemetry: of the optimizer.
    """
    empty = torch.zeros(0, dtype=torch.float64, device=plan.device)
    finite, total = plan.complete(empty, veto)
    telemetry.record(plan, empty, finite)
    telemetry.add(total)
    plan.share(empty)
    plan.agree_on_blocks(torch.zeros((2, plan.sharded_blocks), dtype=torch.int32, device=plan.device))
    refuse(plan)


def refuse(plan: Plan) -> None:
    """Raise RuntimeError on every rank of its mesh if a DTensor has a gradient on some of them only.

    At the end of a step that has changed nothing, when no rank waits for another any more. Not on a GPU, for
    which this would wait: there the step counts as skipped, as one whose gradients are not finite.
    """
    if plan.device.type != "cpu":
        return
    names = plan.uneven()
    if names:
        others = f" and {len(names) - 1} others" if len(names) > 1 else ""
        raise RuntimeError(
            f"{names[0]}{others}: some ranks of its mesh have a gradient, and others have none. It has not "
            "been stepped on any of them. Give it a zero gradient on the ranks that have not used it "
            "(p.grad = torch.zeros_like(p)), or no gradient on any"
        )
