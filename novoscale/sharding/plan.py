"""What one step needs to know of its layouts: what the ranks put together, and whether all may step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from novoscale.sharding.collectives import (
    Collective,
    agree_on_blocks,
    all_reduce,
    blocks_in_stages,
    digest,
    in_order,
)
from novoscale.sharding.exchange import SHARDED, Exchange, Tally, ballot, shares
from novoscale.sharding.layers import LayoutError
from novoscale.sharding.layout import Layout
from novoscale.sharding.placed import LayerTelemetry, Packing, PlacedLayout

# A layer's statistic is kept in float32; one that does not fit there is treated as non-finite.
FLOAT32_MAX = torch.finfo(torch.float32).max


class Plan:
    """What one step needs to know of the layouts of its tensors; built once and reused.

    The vector of a step has the statistic of each layer, then of each column of factored parameters, then
    ``numbers`` of each parameter: the first of all parameters, the second of all, ...

    Holds integers only, no parameter. Building it is a collective where layers are sharded: the ranks make
    sure once that they mean the same layers. What is put together over the ranks comes from the sharded
    tensors alone, whether or not this rank has a gradient of them: it is the same on every rank.

    Args:
        placed: the layouts.
        device: where the vector of statistics lives.
        per_parameter: whether a gradient that is not finite keeps its own parameter from a step only, and not
            all. That is one number more for each parameter, the last.
        clips: whether the norm of the model is clipped, for which the ranks say what their other layers add.
        agreed: what the ranks have agreed on before: not asked again, and added to.

    Raises:
        LayoutError: on every rank, if the ranks of a process group have different layers.
        ValueError: on every rank, if they have different options.

    Attributes:
        placed: the layouts of what is in the vector of the step.
        layers: how many layers the vector has.
        columns: how many columns.
        parameters: how many parameters.
        sums: how many numbers of each there are to be added up, without the verdict.
        per_parameter: whether each parameter has its own verdict.
        sharded_blocks: how many blocks of first moments are sharded: see :meth:`agree_on_blocks`.
        device: where the vector of statistics lives.
        noted: what the last steps have shown.
    """

    def __init__(
        self,
        placed: Sequence[PlacedLayout],
        device: torch.device,
        per_parameter: bool = False,
        clips: bool = False,
        agreed: set[Any] | None = None,
    ) -> None:
        self.placed = [p for p in placed if p.here]
        self._shards = [(p.layout.local_shards[i], p.op) for p in self.placed for i in p.layout.in_order()]
        self.layers = sum(shard.count for shard, _ in self._shards)
        self.columns = sum(shard.columns for shard, _ in self._shards)
        self.parameters = len(self._shards)
        self.sums = max((p.sums for p in self.placed), default=0)
        self.per_parameter, self._clips = per_parameter, clips
        self._verdicts = slice(self.layers + self.columns + self.sums * self.parameters, None)
        self.device = device
        self._collect(placed)
        self._number_votes(placed)
        self.sharded_blocks = sum(len(p.sharded_blocks) for p in placed)
        stages = blocks_in_stages((p.sharded_blocks, p.first_block) for p in placed)
        self._blocks = [(collective, places.to(device)) for collective, places in stages]
        self._everywhere = _index(_rows(p for p in self.placed if not p.layout.scattered), device)
        self._plain = _index(_rows(p for p in self.placed if not p.layout.reductions), device)
        shards = [shard for shard, _ in self._shards] if per_parameter else []
        self._layers_of = torch.tensor([shard.count for shard in shards], device=device)
        self._columns_of = torch.tensor([shard.columns for shard in shards], device=device)
        # See NovoGrad.layer_norms and skipped_layers.
        self.noted = LayerTelemetry(
            torch.zeros(self.layers, dtype=torch.float64, device=device),
            torch.zeros(self.layers, dtype=torch.bool, device=device),
            torch.full((), -1, dtype=torch.int64, device=device),
        )
        for exchange in self._exchanges:
            self._agree(exchange.collective, set() if agreed is None else agreed)

    def _collect(self, placed: Sequence[PlacedLayout]) -> None:
        """Find the all-reduces of a step, and what goes into each of them."""
        merged: dict[tuple[int, dist.ReduceOp.RedOpType], Collective] = {}
        shared: dict[int, Collective] = {}
        votes: dict[Any, list[tuple[int, bool]]] = {}
        of_layers: list[dict[Any, range]] = []  # of each layout, by the all-reduce: their slots
        voting = 0
        for p in placed:
            order = p.layout.numbers()
            of_layers.append({})
            for nth, reduction in enumerate(p.layout.reductions):
                key = (id(reduction.process_group), p.op)
                collective = merged.setdefault(key, Collective(reduction.process_group, p.op))
                first_slot = collective.length
                collective.add(reduction.spans, p.first, here=p.here)
                of_layers[-1][key] = range(first_slot, collective.length)
                collective.add(reduction.columns, self.layers + p.first_column, here=p.here)
                for number in (*range(p.sums), *[self.sums] * self.per_parameter):
                    first = self.layers + self.columns + number * self.parameters + p.first_parameter
                    collective.add(reduction.sharded, first, order, p.here)
                collective.note(reduction.parameters, p.options, (nth, p.sums, p.layout.votes))
                if p.layout.votes:
                    votes.setdefault(key, []).append((voting, p.here))
                if reduction.scattered and p.shares:
                    over = reduction.process_group
                    collective = shared.setdefault(id(over), Collective(over))
                    collective.add(reduction.scattered, p.first_parameter, order, p.here)
            voting += p.layout.votes
        ordered = in_order(merged, [[*slots] for slots in of_layers])
        self._exchanges = [
            Exchange(
                collective,
                _index(collective.slots, self.device),
                _index(collective.places, self.device),
                *ballot(collective, votes.get(key, ()), self.device),
            )
            for key, collective in ordered
        ]
        of_shares = in_order(shared, [[i for i, _ in slots if i in shared] for slots in of_layers])
        self._shares = [_indexed(collective, self.device) for _, collective in of_shares]
        self._scatter(placed, merged)
        if self._clips and ordered:
            self._find_totals(placed, [key for key, _ in ordered], of_layers)

    def _scatter(self, placed: Sequence[PlacedLayout], merged: Mapping[Any, Collective]) -> None:
        """Find the sums over layers of which each rank has others."""
        scattered: dict[tuple[int, ...], list[PlacedLayout]] = {}  # by the process groups
        for p in placed:
            if p.layout.scattered:
                scattered.setdefault(_groups(p.layout), []).append(p)
        for index, groups in enumerate(scattered):
            for key, collective in merged.items():
                if key in ((group, dist.ReduceOp.SUM) for group in groups):
                    collective.scattered.append(index)
        self._scattered = [
            _index(_rows(p for p in of_groups if p.here), self.device) for of_groups in scattered.values()
        ]
        self._sum_of = [
            1 + [*scattered].index(_groups(p.layout)) if p.layout.scattered else 0
            for p in self.placed
            for _ in p.layout.local_shards
        ]

    def _find_totals(
        self, placed: Sequence[PlacedLayout], keys: Sequence[Any], of_layers: Sequence[Mapping[Any, range]]
    ) -> None:
        """Find which layers each all-reduce is the last to complete: from there they count for the norm."""
        totals: list[list[range]] = [[] for _ in keys]
        completes: list[set[int]] = [set() for _ in keys]
        scattered = [*dict.fromkeys(_groups(p.layout) for p in placed if p.layout.scattered)]
        for p, slots in zip(placed, of_layers, strict=True):
            if slots:
                last = max(keys.index(key) for key in slots)
                if p.layout.scattered:
                    completes[last].add(scattered.index(_groups(p.layout)))
                else:
                    totals[last].append(slots[keys[last]])
        parts = shares([exchange.collective for exchange in self._exchanges])
        for exchange, ranges, sums, share in zip(self._exchanges, totals, completes, parts, strict=True):
            exchange.totals = _index(ranges, self.device)
            exchange.completes, exchange.share = sorted(sums), share

    def _number_votes(self, placed: Sequence[PlacedLayout]) -> None:
        """Number the tensors of which some ranks may have no gradient."""
        voting = [p for p in placed if p.layout.votes]
        self._voting = [p.layout.local_shards[0].parameter.name for p in voting]
        here = [(number, p.first_parameter) for number, p in enumerate(voting) if p.here]
        pairs = torch.tensor(here, dtype=torch.int64, device="cpu").view(-1, 2).to(self.device)
        self._votes_here, self._voting_here = pairs.unbind(1)
        # Of the present step, and of the last one that was skipped.
        self._uneven, self._noted_uneven = (
            torch.zeros(len(voting), dtype=torch.bool, device=self.device) for _ in range(2)
        )

    @property
    def numbers(self) -> int:
        """How many numbers of each parameter the vector of a step has."""
        return self.sums + self.per_parameter

    @property
    def collectives(self) -> int:
        """The number of collectives of one step, without :meth:`share`."""
        return len(self._exchanges)

    @property
    def shares(self) -> bool:
        """Whether :meth:`share` is a collective."""
        return bool(self._shares)

    @property
    def bytes_reduced(self) -> int:
        """What this rank gives to the collectives of one step, without :meth:`share`."""
        return sum(8 * exchange.numbers for exchange in self._exchanges)

    def complete(self, statistic: Tensor, veto: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Complete, in place, what is sharded; say what may be stepped, and the sum of all layers.

        One all-reduce per process group. One element of each carries the ranks' verdict, so that a non-finite
        gradient on one rank is known to all; and where each rank has other rows of a matrix, one their sum.
        Where a DTensor has a gradient on some ranks only, no rank steps: see :meth:`uneven`.

        Args:
            statistic: float64, the vector of the step: this rank's part.
            veto: 0-dim bool: this rank has another reason to skip the step.

        Returns:
            0-dim, bool: every layer of every rank is finite (in float32's range); ``per_parameter``
            ``[parameters]``, the same of each parameter. 0-dim, float64: the sum over all layers of the
            model; of the layers that this rank has, where a wrapper has sharded them, or where nothing is
            clipped.
        """
        if self.per_parameter:
            statistic[self._verdicts] = self._bad_parameters(statistic)
        sums = [statistic[rows].sum() for rows in self._scattered]
        bad = (~_fits_float32(statistic)).any().to(statistic.dtype)
        if veto is not None:
            bad = torch.maximum(bad, veto.to(bad))
        tally = self._tally(statistic[self._plain].sum())
        for exchange in self._exchanges:
            collective, length = exchange.collective, exchange.collective.length
            buffer = statistic.new_zeros(length + 1 + len(collective.scattered))
            # MAX need not carry a NaN from one rank to the others; infinity does.
            mine = statistic[exchange.places]
            if collective.op == dist.ReduceOp.MAX:
                mine = mine.nan_to_num(nan=torch.inf)
            buffer[exchange.slots] = mine
            buffer[length] = bad
            for place, index in enumerate(collective.scattered, length + 1):
                buffer[place] = sums[index]
            buffer = exchange.reduce(buffer, tally)
            statistic[exchange.places] = buffer[exchange.slots]
            bad = torch.maximum(buffer[length], (~_fits_float32(buffer[:length])).any().to(buffer.dtype))
            for place, index in enumerate(collective.scattered, length + 1):
                sums[index] = buffer[place]
            if tally.norm is not None:
                for index in exchange.completes:
                    tally.norm[SHARDED] += sums[index]
            if self.per_parameter:  # the layers that are complete now count for the next group's ranks too
                statistic[self._verdicts].index_add_(0, self._voting_here, tally.uneven[self._votes_here])
                statistic[self._verdicts] = self._bad_parameters(statistic)
        finite = statistic[self._verdicts] == 0 if self.per_parameter else bad == 0
        self._note_uneven(tally, finite.all())
        if tally.norm is not None:
            return finite, tally.norm.sum()
        # Not with the rows of this rank, for every rank has to come to the same bits.
        total = statistic[self._everywhere].sum() if sums else statistic[: self.layers].sum()
        return finite, torch.stack([total, *sums]).sum() if sums else total

    def _tally(self, plain: Tensor) -> Tally:
        """Nothing is found yet; ``plain``: 0-dim, what plain tensors add to the squared norm of the model."""
        uneven = torch.zeros(len(self._voting), dtype=torch.float64, device=self.device)
        clips = self._clips and self._exchanges
        return Tally(uneven, torch.stack((plain, torch.zeros_like(plain))) if clips else None)

    def _note_uneven(self, tally: Tally, finite: Tensor) -> None:
        """Note, in place, which gradients are missing on some ranks."""
        if self._voting:
            torch.gt(tally.uneven, 0, out=self._uneven)
            self._noted_uneven.copy_(torch.where(finite, self._noted_uneven, self._uneven))

    def uneven(self) -> list[str]:
        """The DTensors of which some ranks of their mesh had a gradient in this step, and some had none.

        Waits for the device.
        """
        return [name for name, is_so in zip(self._voting, self._uneven.tolist(), strict=True) if is_so]

    def packing(self) -> Packing | None:
        """Of a step with one collective, in which all parameters have one verdict; else None."""
        if self.per_parameter or len(self._exchanges) != 1:
            return None
        (exchange,), sums = self._exchanges, len(self._scattered)
        collective = exchange.collective
        if collective.scattered != [*range(sums)]:
            return None
        sources = torch.full((collective.length,), -1, dtype=torch.int64, device=self.device)
        of_vector = self.layers + self.columns + self.numbers * self.parameters
        back = torch.full((of_vector,), -1, dtype=torch.int32, device=self.device)
        sources[exchange.slots], back[exchange.places] = exchange.places, exchange.slots.int()
        plain = [not p.layout.reductions for p in self.placed for _ in p.layout.local_shards]
        sum_of = [-1 if self._clips and alone else of for of, alone in zip(self._sum_of, plain, strict=True)]
        numbers = torch.tensor(sum_of, dtype=torch.int32, device="cpu")
        return Packing(
            collective.all_reduce,
            sources,
            back,
            numbers.to(self.device),
            sums,
            exchange.vote,
            exchange.expected,
            self._uneven,
            self._noted_uneven,
            (numbers == 0).nonzero()[:, 0].int().to(self.device),
            exchange.ranks if self._clips else 0,
        )

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

    def _agree(self, collective: Collective, agreed: set[Any]) -> None:
        """Raise on every rank if the ranks differ, rather than add up what does not match.

        Once for the same tensors: what else is stepped with them, each rank knows alone.
        """
        known = [(p.name, p.numel, p.layers, p.number, p.factored) for p in collective.parameters]
        known_of = (self.per_parameter, self._clips, *known, *collective.notes)
        key = (collective.process_group, str(collective.op), known_of)
        if key in agreed:
            return
        options = collective.written()
        # Largest and smallest in one collective.
        written = [*map(digest, (repr(known_of), *options.values()))]
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
        agreed.add(key)

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
        """Names of the layers, and of DTensors without a gradient, that had that step skipped. Waits."""
        uneven = zip(self._voting, self._noted_uneven.tolist(), strict=True)
        of_layers = zip(self.names(), self.noted.bad.tolist(), strict=True)
        return [name for name, bad in (*of_layers, *uneven) if bad]

    def norms(self) -> dict[str, float]:
        """The norm of each layer's gradient at the last step. Waits for the device."""
        squared = (op == dist.ReduceOp.SUM for shard, op in self._shards for _ in range(shard.count))
        rows = zip(self.names(), self.noted.statistic.tolist(), squared, strict=True)
        return {name: math.sqrt(value) if is_square else value for name, value, is_square in rows}


def _groups(layout: Layout) -> tuple[int, ...]:
    """The process groups over which the layers of a tensor are completed, by id."""
    return tuple(id(reduction.process_group) for reduction in layout.reductions)


def _rows(placed: Iterable[PlacedLayout]) -> list[range]:
    """The places of the layers of some layouts."""
    return [range(p.first, p.first + p.layout.layers) for p in placed]


def _indexed(collective: Collective, device: torch.device) -> tuple[Collective, Tensor, Tensor]:
    return collective, _index(collective.slots, device), _index(collective.places, device)


def _index(ranges: Sequence[range], device: torch.device) -> Tensor:
    """The numbers in ``ranges``, int64."""
    parts = [torch.arange(r.start, r.stop, dtype=torch.int64, device="cpu") for r in ranges]
    return torch.cat([torch.empty(0, dtype=torch.int64, device="cpu"), *parts]).to(device)


def _fits_float32(statistic: Tensor) -> Tensor:
    return statistic <= FLOAT32_MAX  # false for NaN and infinity
