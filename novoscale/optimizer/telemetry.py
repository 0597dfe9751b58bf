"""What steps have shown: how many were skipped, by which layers; and the layers' norms."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from novoscale.sharding.plan import Plan


class Telemetry:
    """Counts on the device, and waits for it only when it is asked.

    Attributes:
        step: the number of the present step.
        squares: the sum of its squared gradients, as far as tensors have been stepped; None: none has.
    """

    def __init__(self) -> None:
        self.step = 0
        self.squares: Tensor | None = None
        self._skipped: dict[int, Tensor] = {}  # by id(layout) of the first tensor stepped together
        self._partly: Tensor | None = None  # the steps that left out some of the parameters
        self._left_out: Tensor | None = None  # whether the present step has

    def skipped(self, plan: Plan) -> Tensor:
        """How often the tensors of a plan were not stepped: int64, 0-dim; for the step to count on."""
        first = id(plan.placed[0].layout) if plan.placed else 0
        if first not in self._skipped:
            self._skipped[first] = torch.zeros((), dtype=torch.int64, device=plan.device)
        return self._skipped[first]

    def record(self, plan: Plan, statistic: Tensor, finite: Tensor) -> None:
        """Note the completed statistic of some tensors, and which of them may be stepped."""
        plan.record(statistic, finite, self.step)
        if plan.per_parameter:
            left_out = ~finite.all()
            if self._left_out is None:
                self._left_out = torch.zeros_like(left_out)
                self._partly = torch.zeros_like(left_out, dtype=torch.int64)
            self._left_out.logical_or_(left_out.to(self._left_out.device))
        else:
            self.skipped(plan).add_(~finite)  # in place, for CUDA graphs

    def add(self, total: Tensor) -> None:
        """Note the sum of the squared gradients of some tensors."""
        self.squares = total if self.squares is None else self.squares + total.to(self.squares.device)

    def end_step(self, by_groups: bool) -> None:
        """All tensors of a step have been noted.

        Args:
            by_groups: a wrapper's step is several of the optimizer's, skipped together.
        """
        self.step += not by_groups
        self.squares = None
        if self._partly is not None and self._left_out is not None:
            self._partly.add_(self._left_out)
            self._left_out.zero_()

    def skipped_steps(self, by_groups: bool) -> int:
        """How many steps changed nothing, or left out some parameters. Waits for the device."""
        counts = [int(count) for count in self._skipped.values()]
        partly = 0 if self._partly is None else int(self._partly)
        return (max(counts, default=0) if by_groups else sum(counts)) + partly

    @staticmethod
    def skipped_layers(plans: Collection[Plan]) -> list[str]:
        """The layers that had the last skipped step skipped. Waits for the device."""
        last = max((plan.bad_at() for plan in plans), default=-1)
        return [name for plan in plans if plan.bad_at() == last for name in plan.bad()]
