"""What a plan is made of, and what it gives to the kernels: see ``plan.Plan``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from novoscale.sharding.blocks import NONE, ShardedBlocks
from novoscale.sharding.layout import Layout


@dataclass(frozen=True)
class PlacedLayout:
    """A layout with the place of its layers among all layers of a step.

    Attributes:
        layout: of a tensor.
        first: the place of its first layer.
        op: how the ranks' statistics of a layer are put together: sums of squares are added, of largest
            magnitudes the largest is taken.
        first_column: the place of its first column among all columns of factored parameters.
        first_parameter: the place of its first parameter among all parameters.
        first_block: the place of its first sharded block among all.
        sharded_blocks: of the layout, if its first moment is in blocks.
        sums: how many numbers of each of its parameters the ranks add up.
        shares: whether a number of each is added up where ranks have different layers: see ``Plan.share``.
        here: whether this rank has one: else its layers are not in the vector of the step.
        options: of its param group, by name, as they are written: what else the ranks must agree on.
    """

    layout: Layout
    first: int
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    first_column: int = 0
    first_parameter: int = 0
    first_block: int = 0
    sharded_blocks: ShardedBlocks = NONE
    sums: int = 0
    shares: bool = True
    here: bool = True
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Packing:
    """What goes from the vector of a step into the buffer of its only collective, and back.

    Attributes:
        all_reduce: completes a buffer.
        sources: int64 ``[length]``: of each number of the buffer its place in the vector, or -1: not here.
        slots: int32, as long as the vector: of each number its place in the buffer, or -1: it is complete.
        sum_of: int32 ``[parameters]``: see ``sums``; 0: every rank has all its layers; -1: the norm of the
            model is asked for, and no rank is known to have them too.
        sums: how many sums over scattered layers there are: of the parameters whose ``sum_of`` is 1, 2, ...
            They follow in the buffer after the ``length`` numbers and the ranks' verdict.
        vote: float64: what follows them; see ``exchange.Exchange``.
        expected: float64: what comes of it.
        uneven: bool ``[votes]``: where the step writes which votes differ.
        noted_uneven: the same of the last step that was skipped.
        alike: int32: the parameters whose ``sum_of`` is 0: the same on every rank, in the same order.
        ranks: how many there are; 0: the norm is not asked for. Else what each adds to it follows the votes.
    """

    all_reduce: Callable[[Tensor], Tensor]
    sources: Tensor
    slots: Tensor
    sum_of: Tensor
    sums: int
    vote: Tensor
    expected: Tensor
    uneven: Tensor
    noted_uneven: Tensor
    alike: Tensor
    ranks: int

    @property
    def length(self) -> int:
        """How many numbers of the vector are in the buffer."""
        return len(self.sources)

    @property
    def numbers(self) -> int:
        """How many numbers the buffer has."""
        return self.length + 1 + self.sums + len(self.vote) + (6 if self.ranks else 0)


@dataclass
class LayerTelemetry:
    """What the last steps have shown of each layer; written in place, for CUDA graphs.

    Attributes:
        statistic: float64 ``[layers]``: of the last step.
        bad: bool ``[layers]``: which had the last skipped step skipped.
        bad_at: int64, 0-dim: the number of that step, or -1.
    """

    statistic: Tensor
    bad: Tensor
    bad_at: Tensor
