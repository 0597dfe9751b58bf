"""What the ranks tell each other in a step: the layers that are cut, and whether all may step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from novoscale.layout import Layout, LayoutError, Parameter

# A layer's statistic is kept in float32; one that does not fit there is treated as non-finite.
FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Placed:
    """A layout with the place of its layers in the vector of all layers of a step.

    ``op`` is how the ranks' statistics of a layer are put together: sums of squares are added, of
    largest magnitudes the largest is taken.
    """

    layout: Layout
    first: int
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM


@dataclass
class _Reduction:
    process_group: dist.ProcessGroup | None
    op: dist.ReduceOp.RedOpType
    length: int = 0
    slots: list[range] = field(default_factory=list)  # places in the buffer of the layers held here
    places: list[range] = field(default_factory=list)  # their places in the vector of all layers
    scattered: list[int] = field(default_factory=list)  # of Plan._scattered, those that it adds up
    parameters: list[Parameter] = field(default_factory=list)  # what the ranks must agree on
    device: torch.device | None = None  # of the collective


class Plan:
    """What one step needs to know of the layouts of its tensors; built once and reused.

    Holds integers only, no parameter. Building it is a collective where layers are cut: the ranks make
    sure once that they mean the same layers.

    Raises:
        LayoutError: on every rank, if the ranks of a process group have different layers.

    Attributes:
        layers: how many layers the vector has.
        device: where the vector of statistics lives.
    """

    def __init__(self, placed: Sequence[Placed], device: torch.device) -> None:
        self._held = [(h, p.op) for p in placed for h in p.layout.held]
        self.layers = sum(h.count for h, _ in self._held)
        self.device = device
        merged: dict[tuple[int, dist.ReduceOp.RedOpType], _Reduction] = {}
        scattered: dict[tuple[int, ...], list[range]] = {}  # by the process groups
        for p in placed:
            if p.layout.scattered:
                groups = tuple(id(completion.process_group) for completion in p.layout.completions)
                scattered.setdefault(groups, []).append(range(p.first, p.first + p.layout.layers))
            for completion in p.layout.completions:
                key = (id(completion.process_group), p.op)
                reduction = merged.setdefault(key, _Reduction(completion.process_group, p.op))
                for span in completion.spans:
                    if span.place is not None:
                        place = p.first + span.place
                        reduction.slots.append(range(reduction.length, reduction.length + span.count))
                        reduction.places.append(range(place, place + span.count))
                    reduction.length += span.count
                reduction.parameters += completion.parameters
        self._reductions = [(r, _index(r.slots, device), _index(r.places, device)) for r in merged.values()]
        for index, groups in enumerate(scattered):
            for key, reduction in merged.items():
                if key in ((group, dist.ReduceOp.SUM) for group in groups):
                    reduction.scattered.append(index)
        self._scattered = [_index(ranges, device) for ranges in scattered.values()]
        alike = [range(p.first, p.first + p.layout.layers) for p in placed if not p.layout.scattered]
        self._everywhere = _index(alike, device)
        # What the last steps have shown: see NovoGrad.layer_norms and skipped_layers.
        self._statistic = torch.zeros(self.layers, dtype=torch.float64, device=device)
        self._bad = torch.zeros(self.layers, dtype=torch.bool, device=device)
        for reduction, _, _ in self._reductions:
            self._agree(reduction)

    @property
    def reductions(self) -> int:
        """The number of collectives of one step."""
        return len(self._reductions)

    def complete(self, statistic: Tensor, veto: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Complete, in place, the layers that are cut; say whether all ranks may step, and the sum of all.

        One all-reduce per process group. One element of each carries the ranks' verdict, so that a non-finite
        gradient on one rank is known to all; and where each rank has other rows of a matrix, one their sum.

        Args:
            statistic: float64, one element per layer: this rank's part.
            veto: 0-dim bool: this rank has another reason to skip the step.

        Returns:
            0-dim, bool: every layer of every rank is finite (in float32's range). 0-dim, float64: the sum
            over all layers of the model; of the layers that this rank has, where a wrapper has cut them.
        """
        sums = [statistic[rows].sum() for rows in self._scattered]
        bad = (~_fits_float32(statistic)).any().to(statistic.dtype)
        if veto is not None:
            bad = torch.maximum(bad, veto.to(bad))
        for reduction, slots, places in self._reductions:
            length = reduction.length
            buffer = statistic.new_zeros(length + 1 + len(reduction.scattered))
            # MAX need not carry a NaN from one rank to the others; infinity does.
            held = statistic[places]
            if reduction.op == dist.ReduceOp.MAX:
                held = held.nan_to_num(nan=torch.inf)
            buffer[slots] = held
            buffer[length] = bad
            for place, index in enumerate(reduction.scattered, length + 1):
                buffer[place] = sums[index]
            buffer = self._all_reduce(reduction, buffer)
            statistic[places] = buffer[slots]
            bad = torch.maximum(buffer[length], (~_fits_float32(buffer[:length])).any().to(buffer.dtype))
            for place, index in enumerate(reduction.scattered, length + 1):
                sums[index] = buffer[place]
        # Not with the rows of this rank, for every rank has to come to the same bits.
        total = statistic[self._everywhere].sum() if sums else statistic.sum()
        return bad == 0, torch.stack([total, *sums]).sum() if sums else total

    def _agree(self, reduction: _Reduction) -> None:
        """Raise on every rank if the ranks have different layers, rather than add up what does not match."""
        layers = repr([(p.name, p.numel, p.layers, p.number) for p in reduction.parameters]).encode()
        # 48 bits of a hash, which a float64 holds exactly; largest and smallest in one collective.
        digest = float(int.from_bytes(hashlib.sha256(layers).digest()[:6], "big"))
        verdict = torch.tensor([digest, -digest], dtype=torch.float64, device=self.device)
        verdict = self._all_reduce(_Reduction(reduction.process_group, dist.ReduceOp.MAX), verdict)
        if verdict[0] != -verdict[1]:
            raise LayoutError(
                "the ranks have different layers, in number, name, size or order; this rank has "
                f"{sum(p.layers for p in reduction.parameters)}, from {reduction.parameters[0].name} to "
                f"{reduction.parameters[-1].name}. Build the same model and param groups on every rank"
                if reduction.parameters
                else "the ranks have different layers; this rank has none"
            )

    def _all_reduce(self, reduction: _Reduction, buffer: Tensor) -> Tensor:
        if reduction.device is None:
            reduction.device = _collective_device(reduction.process_group, buffer.device)
        moved = buffer.to(reduction.device)
        dist.all_reduce(moved, op=reduction.op, group=reduction.process_group)
        return moved.to(buffer.device)

    def record(self, statistic: Tensor, finite: Tensor) -> None:
        """Note the completed statistic of a step, and which layers had it skipped."""
        # In place: a CUDA graph replays into the same tensors.
        self._statistic.copy_(statistic)
        self._bad.copy_(torch.where(finite, self._bad, ~_fits_float32(statistic)))

    def names(self) -> Iterator[str]:
        """The name of each layer in the vector."""
        for held, _ in self._held:
            yield from map(held.parameter.layer_name, range(held.first, held.stop))

    def bad(self) -> list[str]:
        """Names of the layers that had the last skipped step skipped. Waits for the device."""
        return [name for name, bad in zip(self.names(), self._bad.tolist(), strict=True) if bad]

    def norms(self) -> dict[str, float]:
        """The norm of each layer's gradient at the last step. Waits for the device."""
        squared = (op == dist.ReduceOp.SUM for held, op in self._held for _ in range(held.count))
        rows = zip(self.names(), self._statistic.tolist(), squared, strict=True)
        return {name: math.sqrt(value) if is_square else value for name, value, is_square in rows}


def _index(ranges: Sequence[range], device: torch.device) -> Tensor:
    """The numbers in ``ranges``, int64."""
    parts = [torch.arange(r.start, r.stop, dtype=torch.int64, device="cpu") for r in ranges]
    return torch.cat([torch.empty(0, dtype=torch.int64, device="cpu"), *parts]).to(device)


def _collective_device(process_group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """``device``, or the device that the group's backend serves (states offloaded to the CPU, NCCL)."""
    served = [entry.split(":")[0] for entry in dist.get_backend_config(process_group).split(",")]
    if device.type in served:
        return device
    return torch.device(served[0], torch.get_device_module(served[0]).current_device())


def _fits_float32(statistic: Tensor) -> Tensor:
    return statistic <= FLOAT32_MAX  # false for NaN and infinity
