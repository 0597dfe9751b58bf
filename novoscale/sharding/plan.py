"""What one step needs to know of its layouts: what the ranks put together, and whether all may step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from novoscale.sharding.blocks import NONE, ShardedBlocks
from novoscale.sharding.collectives import Collective, agree_on_blocks, all_reduce, blocks_in_stages, digest
from novoscale.sharding.layers import LayoutError
from novoscale.sharding.layout import Layout

# A layer's statistic is kept in float32; one that does not fit there is treated as non-finite.
FLOAT32_MAX = torch.finfo(torch.float32).max


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
    """

    layout: Layout
    first: int
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    first_column: int = 0
    first_parameter: int = 0
    first_block: int = 0
    sharded_blocks: ShardedBlocks = NONE


@dataclass
class Packing:
    """What goes from the vector of a step into the buffer of its only collective, and back.

    Attributes:
        all_reduce: completes a buffer.
        sources: int64 ``[length]``: of each number of the buffer its place in the vector, or -1: not here.
        slots: int32, as long as the vector: of each number its place in the buffer, or -1: it is complete.
        sum_of: int32 ``[parameters]``: see ``sums``; 0: every rank has all its layers.
        sums: how many sums over scattered layers there are: of the parameters whose ``sum_of`` is 1, 2, ...
            They follow in the buffer after the ``length`` numbers and the ranks' verdict.
    """

    all_reduce: Callable[[Tensor], Tensor]
    sources: Tensor
    slots: Tensor
    sum_of: Tensor
    sums: int

    @property
    def length(self) -> int:
        """How many numbers of the vector are in the buffer."""
        return len(self.sources)


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


class Plan:
    """What one step needs to know of the layouts of its tensors; built once and reused.

    The vector of a step has the statistic of each layer, then of each column of factored parameters, then
    ``numbers`` of each parameter: the first of all parameters, the second of all, ...

    Holds integers only, no parameter. Building it is a collective where layers are sharded: the ranks make
    sure once that they mean the same layers.

    Args:
        placed: the layouts.
        device: where the vector of statistics lives.
        sums: how many numbers of each parameter are added up over the ranks that have parts of it.
        per_parameter: whether a gradient that is not finite keeps its own parameter from a step only, and not
            all. That is one number more for each parameter, the last.
        options: of the optimizer, by name, as they are written: what else the ranks must agree on.

    Raises:
        LayoutError: on every rank, if the ranks of a process group have different layers.
        ValueError: on every rank, if they have different options.

    Attributes:
        placed: the layouts.
        layers: how many layers the vector has.
        columns: how many columns.
        parameters: how many parameters.
        sums: how many numbers of each are added up, without the verdict.
        per_parameter: whether each parameter has its own verdict.
        sharded_blocks: how many blocks of first moments are sharded: see :meth:`agree_on_blocks`.
        device: where the vector of statistics lives.
        noted: what the last steps have shown.
    """

    def __init__(
        self,
        placed: Sequence[PlacedLayout],
        device: torch.device,
        sums: int = 0,
        per_parameter: bool = False,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self.placed = placed
        self._shards = [(p.layout.local_shards[i], p.op) for p in placed for i in p.layout.in_order()]
        self.layers = sum(shard.count for shard, _ in self._shards)
        self.columns = sum(shard.columns for shard, _ in self._shards)
        self.parameters = len(self._shards)
        self.sums = sums
        self.per_parameter = per_parameter
        self._verdicts = slice(self.layers + self.columns + sums * self.parameters, None)
        self.device = device
        merged: dict[tuple[int, dist.ReduceOp.RedOpType], Collective] = {}
        shares: dict[int, Collective] = {}
        scattered: dict[tuple[int, ...], list[range]] = {}  # by the process groups
        for p in placed:
            if p.layout.scattered:
                scattered.setdefault(_groups(p.layout), []).append(range(p.first, p.first + p.layout.layers))
            order = p.layout.numbers()
            for reduction in p.layout.reductions:
                key = (id(reduction.process_group), p.op)
                collective = merged.setdefault(key, Collective(reduction.process_group, p.op))
                collective.add(reduction.spans, p.first)
                collective.add(reduction.columns, self.layers + p.first_column)
                for nth in range(self.numbers):
                    first = self.layers + self.columns + nth * self.parameters + p.first_parameter
                    collective.add(reduction.sharded, first, order)
                collective.parameters += reduction.parameters
                if reduction.scattered:
                    over = reduction.process_group
                    shared = shares.setdefault(id(over), Collective(over))
                    shared.add(reduction.scattered, p.first_parameter, order)
        self._collectives = [_indexed(collective, device) for collective in merged.values()]
        self._shares = [_indexed(collective, device) for collective in shares.values()]
        self.sharded_blocks = sum(len(p.sharded_blocks) for p in placed)
        stages = blocks_in_stages((p.sharded_blocks, p.first_block) for p in placed)
        self._blocks = [(collective, places.to(device)) for collective, places in stages]
        for index, groups in enumerate(scattered):
            for key, collective in merged.items():
                if key in ((group, dist.ReduceOp.SUM) for group in groups):
                    collective.scattered.append(index)
        self._scattered = [_index(ranges, device) for ranges in scattered.values()]
        self._sum_of = [
            1 + [*scattered].index(_groups(p.layout)) if p.layout.scattered else 0
            for p in placed
            for _ in p.layout.local_shards
        ]
        alike = [range(p.first, p.first + p.layout.layers) for p in placed if not p.layout.scattered]
        self._everywhere = _index(alike, device)
        shards = [shard for shard, _ in self._shards] if per_parameter else []
        self._layers_of = torch.tensor([shard.count for shard in shards], device=device)
        self._columns_of = torch.tensor([shard.columns for shard in shards], device=device)
        # See NovoGrad.layer_norms and skipped_layers.
        self.noted = LayerTelemetry(
            torch.zeros(self.layers, dtype=torch.float64, device=device),
            torch.zeros(self.layers, dtype=torch.bool, device=device),
            torch.full((), -1, dtype=torch.int64, device=device),
        )
        for collective, _, _ in self._collectives:
            self._agree(collective, options or {})

    @property
    def numbers(self) -> int:
        """How many numbers of each parameter the vector of a step has."""
        return self.sums + self.per_parameter

    @property
    def collectives(self) -> int:
        """The number of collectives of one step, without :meth:`share`."""
        return len(self._collectives)

    @property
    def bytes_reduced(self) -> int:
        """What this rank gives to the collectives of one step, without :meth:`share`."""
        return sum(8 * (c.length + 1 + len(c.scattered)) for c, _, _ in self._collectives)

    def complete(self, statistic: Tensor, veto: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Complete, in place, what is sharded; say what may be stepped, and the sum of all layers.

        One all-reduce per process group. One element of each carries the ranks' verdict, so that a non-finite
        gradient on one rank is known to all; and where each rank has other rows of a matrix, one their sum.

        Args:
            statistic: float64, the vector of the step: this rank's part.
            veto: 0-dim bool: this rank has another reason to skip the step.

        Returns:
            0-dim, bool: every layer of every rank is finite (in float32's range); ``per_parameter``
            ``[parameters]``, the same of each parameter. 0-dim, float64: the sum over all layers of the
            model; of the layers that this rank has, where a wrapper has sharded them.
        """
        if self.per_parameter:
            statistic[self._verdicts] = self._bad_parameters(statistic)
        sums = [statistic[rows].sum() for rows in self._scattered]
        bad = (~_fits_float32(statistic)).any().to(statistic.dtype)
        if veto is not None:
            bad = torch.maximum(bad, veto.to(bad))
        for collective, slots, places in self._collectives:
            length = collective.length
            buffer = statistic.new_zeros(length + 1 + len(collective.scattered))
            # MAX need not carry a NaN from one rank to the others; infinity does.
            mine = statistic[places]
            if collective.op == dist.ReduceOp.MAX:
                mine = mine.nan_to_num(nan=torch.inf)
            buffer[slots] = mine
            buffer[length] = bad
            for place, index in enumerate(collective.scattered, length + 1):
                buffer[place] = sums[index]
            buffer = collective.all_reduce(buffer)
            statistic[places] = buffer[slots]
            bad = torch.maximum(buffer[length], (~_fits_float32(buffer[:length])).any().to(buffer.dtype))
            for place, index in enumerate(collective.scattered, length + 1):
                sums[index] = buffer[place]
            if self.per_parameter:  # the layers that are complete now count for the next group's ranks too
                statistic[self._verdicts] = self._bad_parameters(statistic)
        # Not with the rows of this rank, for every rank has to come to the same bits.
        total = statistic[self._everywhere].sum() if sums else statistic[: self.layers].sum()
        finite = statistic[self._verdicts] == 0 if self.per_parameter else bad == 0
        return finite, torch.stack([total, *sums]).sum() if sums else total

    def packing(self) -> Packing | None:
        """Of a step with one collective, in which all parameters have one verdict; else None."""
        if self.per_parameter or len(self._collectives) != 1:
            return None
        collective, slots, places = self._collectives[0]
        if collective.scattered != [*range(len(self._scattered))]:
            return None
        sources = torch.full((collective.length,), -1, dtype=torch.int64, device=self.device)
        of_vector = self.layers + self.columns + self.numbers * self.parameters
        back = torch.full((of_vector,), -1, dtype=torch.int32, device=self.device)
        sources[slots], back[places] = places, slots.int()
        sum_of = torch.tensor(self._sum_of, dtype=torch.int32, device="cpu").to(self.device)
        return Packing(collective.all_reduce, sources, back, sum_of, len(self._scattered))

    def _bad_parameters(self, statistic: Tensor) -> Tensor:
        """1 for each parameter that is not finite, as far as it is known here, else 0: float64."""
        sizes = [self.layers, self.columns, self.numbers * self.parameters]
        of_layers, of_columns, numbers = torch.split(statistic, sizes)
        parts = ((of_layers, self._layers_of), (of_columns, self._columns_of))
        # None is negative: what is not finite, or too large, shows in the sum.
        sums = [torch.segment_reduce(x, "sum", lengths=n, unsafe=True) for x, n in parts if len(x)]
        sums.append(numbers.view(self.numbers, self.parameters).sum(0))
        known = statistic[self._verdicts] > 0
        return (known | ~_fits_float32(torch.stack(sums).sum(0))).double()

    def share(self, sums: Tensor) -> Tensor:
        """Add up a number of each parameter over the ranks that have different layers of it.

        Args:
            sums: float64 ``[parameters]``: this rank's part; of a parameter that is not scattered, all of it.
        """
        for collective, slots, places in self._shares:
            buffer = sums.new_zeros(collective.length)
            buffer[slots] = sums[places]
            sums = sums.index_copy(0, places, collective.all_reduce(buffer)[slots])
        return sums

    def agree_on_blocks(self, largest: Tensor) -> Tensor:
        """See ``collectives.agree_on_blocks``: of all tensors of the step."""
        return agree_on_blocks(largest, self._blocks)

    @property
    def bytes_of_blocks(self) -> int:
        """What this rank gives to the collectives of :meth:`agree_on_blocks`."""
        return sum(8 * len(places) for _, places in self._blocks)

    def _agree(self, collective: Collective, options: Mapping[str, str]) -> None:
        """Raise on every rank if the ranks differ, rather than add up what does not match."""
        known = [(p.name, p.numel, p.layers, p.number, p.factored) for p in collective.parameters]
        # Largest and smallest in one collective.
        written = [*map(digest, (repr(known), *options.values()))]
        digests = torch.tensor(written, dtype=torch.float64, device="cpu")
        verdict = torch.stack((digests, -digests)).to(self.device)
        largest, smallest = all_reduce(verdict, dist.ReduceOp.MAX, collective.process_group).tolist()
        layers, *others = [high != -low for high, low in zip(largest, smallest, strict=True)]
        if layers:
            raise LayoutError(
                "the ranks have different layers, in number, name, size or order; this rank has "
                f"{sum(p.layers for p in collective.parameters)}, from {collective.parameters[0].name} to "
                f"{collective.parameters[-1].name}. Build the same model and param groups on every rank"
                if collective.parameters
                else "the ranks have different layers; this rank has none"
            )
        if any(others):
            different = [f"{n}={options[n]}" for n, differs in zip(options, others, strict=True) if differs]
            raise ValueError(
                f"the ranks have different options of NovoGrad; this rank has {', '.join(different)}. Give "
                "them alike on every rank"
            )

    def record(self, statistic: Tensor, finite: Tensor, step: int) -> None:
        """Note the completed statistic of a step, and which layers had it skipped.

        Args:
            statistic: the vector of the step.
            finite: see :meth:`complete`.
            step: the number of the step.
        """
        of_layers = statistic[: self.layers]
        finite = finite.all() if finite.ndim else finite
        self.noted.statistic.copy_(of_layers)
        self.noted.bad.copy_(torch.where(finite, self.noted.bad, ~_fits_float32(of_layers)))
        self.noted.bad_at.copy_(torch.where(finite, self.noted.bad_at, step))

    def names(self) -> Iterator[str]:
        """The name of each layer in the vector."""
        for shard, _ in self._shards:
            yield from map(shard.parameter.layer_name, range(shard.first, shard.stop))

    def bad_at(self) -> int:
        """The number of the last step that was skipped, -1 if there was none. Waits for the device."""
        return int(self.noted.bad_at)

    def bad(self) -> list[str]:
        """Names of the layers that had that step skipped. Waits for the device."""
        return [name for name, bad in zip(self.names(), self.noted.bad.tolist(), strict=True) if bad]

    def norms(self) -> dict[str, float]:
        """The norm of each layer's gradient at the last step. Waits for the device."""
        squared = (op == dist.ReduceOp.SUM for shard, op in self._shards for _ in range(shard.count))
        rows = zip(self.names(), self.noted.statistic.tolist(), squared, strict=True)
        return {name: math.sqrt(value) if is_square else value for name, value, is_square in rows}


def _groups(layout: Layout) -> tuple[int, ...]:
    """The process groups over which the layers of a tensor are completed, by id."""
    return tuple(id(reduction.process_group) for reduction in layout.reductions)


def _indexed(collective: Collective, device: torch.device) -> tuple[Collective, Tensor, Tensor]:
    return collective, _index(collective.slots, device), _index(collective.places, device)


def _index(ranges: Sequence[range], device: torch.device) -> Tensor:
    """The numbers in ``ranges``, int64."""
    parts = [torch.arange(r.start, r.stop, dtype=torch.int64, device="cpu") for r in ranges]
    return torch.cat([torch.empty(0, dtype=torch.int64, device="cpu"), *parts]).to(device)


def _fits_float32(statistic: Tensor) -> Tensor:
    return statistic <= FLOAT32_MAX  # false for NaN and infinity
