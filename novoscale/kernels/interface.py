"""What every implementation of the kernels has: said once for ``reference``, ``cpu`` and ``triton``.

A step makes two passes over the elements (:class:`ElementKernels`), and between them one over the layers
(:class:`LayerKernels`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from novoscale.kernels.layers import LayerTable, OptionTable
from novoscale.kernels.shards import Coefficients, Shard, ShardTensors
from novoscale.sharding.placed import LayerTelemetry, Packing


@dataclass(frozen=True, slots=True)
class VectorSizes:
    """How long the vectors of a step are.

    Attributes:
        layers: how many layers there are.
        columns: how many columns of factored parameters.
        sharded_blocks: how many blocks of first moments are sharded.
    """

    layers: int
    columns: int = 0
    sharded_blocks: int = 0


class ElementKernels(ABC):
    """Both passes over the elements of the tensors of a step.

    Args:
        shards: the tensors.
        device: of the vectors that have one element per layer.
        sizes: of those vectors.
    """

    @abstractmethod
    def __init__(self, shards: Sequence[Shard], device: torch.device, sizes: VectorSizes) -> None: ...

    @abstractmethod
    def move_gradients(self, addresses: Sequence[int]) -> None:
        """Go on with gradients at other addresses: one for each shard."""

    @abstractmethod
    def move_params(self, addresses: Sequence[int]) -> None:
        """Go on with weights at other addresses: one for each shard."""

    @abstractmethod
    def hold(self, tensors: Callable[[int], ShardTensors]) -> None:
        """Take the tensors of each shard, by its index, for one step, unless their addresses are known."""

    @abstractmethod
    def release(self) -> None:
        """Free the tensors that :meth:`hold` took."""

    @abstractmethod
    def sum_of_squares(self, more: int = 0) -> Tensor:
        """This rank's part of each layer's statistic, and of each column's of factored parameters.

        Args:
            more: how many zeros are to follow.

        Returns:
            float64 ``[layers + columns + more]``: the sum of g**2 (``norm_type`` 2) or the largest abs(g)
            (``norm_type`` 0).
        """

    @abstractmethod
    def largest(self, coefficients: Coefficients) -> Tensor:
        """What the ranks have to agree on before :meth:`update`: the largest magnitudes of sharded blocks.

        Args:
            coefficients: as for the update.

        Returns:
            int32 ``[2, sharded_blocks]``: of this rank's elements of each the largest magnitude of the first
            moment after the step, as the bits of a float32, which order as integers with NaN above all; and 1
            where any of them is active, else 0.
        """

    @abstractmethod
    def update(self, coefficients: Coefficients) -> None:
        """Change the first moment and the weight of every active layer, in place."""


class States(NamedTuple):
    """The state of the tensors of a step, in their order: this rank's parts.

    Attributes:
        v: float32: the second moments of the layers of each.
        columns: float32: those of columns.
        steps: float32: the counts of steps.
    """

    v: Sequence[Tensor]
    columns: Sequence[Tensor]
    steps: Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class AdvanceInputs:
    """What :meth:`LayerKernels.advance` is given.

    Attributes:
        options: of the param groups.
        statistic: the vector of the step (``plan.Plan``), complete: summed over the ranks.
        finite: bool: whether there is a step at all; 0-dim, or one for each parameter.
        total: float64, 0-dim: the sum of squares of the gradients of the model.
        scale: 0-dim: the gradients are so many times too large; None: 1.
        share: adds up a number of each parameter over the ranks that have different layers of it.
    """

    options: OptionTable
    statistic: Tensor
    finite: Tensor
    total: Tensor
    scale: Tensor | None
    share: Callable[[Tensor], Tensor]


class LayerKernels(ABC):
    """The pass over the layers.

    Args:
        table: the layers.
        device: of the vectors that have one element per layer.

    Attributes:
        completes: whether it has :meth:`complete`, which does the work of ``plan.Plan.complete``.
    """

    completes = False

    @abstractmethod
    def __init__(self, table: LayerTable, device: torch.device) -> None: ...

    @abstractmethod
    def hold(self, states: Callable[[], States]) -> None:
        """Take the state of the tensors for one step, unless its addresses are known."""

    @abstractmethod
    def release(self) -> None:
        """Free what :meth:`hold` took."""

    @abstractmethod
    def begin(self, options: OptionTable, statistic: Tensor, scale: Tensor | None) -> None:
        """Divide the gradients' statistic by a loss scale, and add up what the ranks have to know, in place.

        The ranks learn the mean of the second moments after the step from the same all-reduce as the
        statistic. For it each parameter adds FRESH, what the statistic adds to the sum of the second moments,
        before it is divided by the elements of a row; and KEPT, what remains of those there are.

        Args:
            options: of the param groups.
            statistic: the vector of the step (``plan.Plan``): this rank's part.
            scale: 0-dim: the gradients are so many times too large; None: 1.
        """

    def complete(
        self,
        options: OptionTable,
        statistic: Tensor,
        veto: Tensor | None,
        packing: Packing | None,
        noted: LayerTelemetry,
        skipped: Tensor,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        """Do what ``plan.Plan.complete`` and ``record`` do, where there is one collective or none.

        Args:
            options: of the param groups.
            statistic: the vector of the step: this rank's part; changed in place.
            veto: see ``plan.Plan.complete``.
            packing: what the collective needs; None where there is none.
            noted: where :meth:`advance` writes what the step shows of each layer.
            skipped: int64, 0-dim: how many steps were skipped.
            step: the number of the step.

        Returns:
            See ``plan.Plan.complete``.
        """
        raise NotImplementedError("only where `completes` is true")

    @abstractmethod
    def advance(self, given: AdvanceInputs) -> Coefficients:
        """Average the statistic into the second moments, in place, and count the steps.

        Returns:
            What the update of m and w needs to know.
        """


class ByAddress:
    """The part of both interfaces that takes tensors, for kernels that know addresses: they take none.

    Such kernels keep no tensor alive.
    """

    def hold(self, tensors: Callable[..., Any]) -> None:
        """Take nothing."""

    def release(self) -> None:
        """Free nothing."""
