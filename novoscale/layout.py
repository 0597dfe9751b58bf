"""Layers, and where their elements lie.

A *layer* is what shares one second moment. A *segment* says that some elements of a tensor are
elements of a layer. A *layout* lists the segments of one tensor, and the process groups over which
the layers that are cut between ranks have to be completed.

Everything NovoGrad keeps is either element-wise, which may be cut anywhere, or one scalar per layer,
which one small all-reduce completes. Nothing here knows a framework: ``novoscale.integrations``
turns what each framework has into a :class:`Layout`.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

# A layer's statistic is kept in float32; one that does not fit there is treated as non-finite.
FLOAT32_MAX = torch.finfo(torch.float32).max


class LayoutError(ValueError):
    """The elements of a tensor cannot be assigned to layers."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What shares one second moment: by default one parameter.

    ``numel`` counts the elements of the whole layer, on every rank that holds some of it.
    """

    name: str
    numel: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements ``start..stop`` of a tensor (row-major) are the elements from ``offset`` on of a layer.

    ``layer`` is an index into the list of layers that comes with the segment.
    """

    start: int
    stop: int
    layer: int
    offset: int = 0

    @property
    def numel(self) -> int:
        """The number of elements."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Completion:
    """The layers that are cut over one process group.

    ``slots`` has one entry for each of them, in the same order on every rank of the group: the
    layer's index in ``Layout.layers``, or None where this rank holds nothing of it. ``layers`` are they,
    on every rank the same: see ``Plan``.
    """

    process_group: dist.ProcessGroup | None
    slots: tuple[int | None, ...]
    layers: tuple[Layer, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Which layers the elements of one tensor belong to.

    Elements in no segment are padding: they are never read for a statistic and never changed.

    Attributes:
        numel: elements of the tensor on this rank, padding included.
        layers: the layers of which this rank holds at least one element.
        segments: where they lie; ``Segment.layer`` indexes ``layers``.
        completions: the process groups that complete the layers that are cut, in order.
    """

    numel: int
    layers: tuple[Layer, ...]
    segments: tuple[Segment, ...]
    completions: tuple[Completion, ...] = ()


def whole(name: str, numel: int, *, splits: int = 1) -> Layout:
    """The layout of a tensor that lies whole on this rank.

    Args:
        name: the parameter's name.
        numel: its number of elements.
        splits: cut it along dimension 0 into so many layers of equal size (a fused QKV weight is
            three layers).

    Raises:
        LayoutError: if ``splits`` does not divide ``numel``.
    """
    if splits < 1 or numel % splits:
        raise LayoutError(f"{name}: {numel} elements cannot be cut into {splits} layers of equal size")
    if splits == 1:
        return Layout(numel, (Layer(name, numel),), (Segment(0, numel, 0),) if numel else ())
    size = numel // splits
    return Layout(
        numel,
        tuple(Layer(f"{name}[{i}]", size) for i in range(splits)),
        tuple(Segment(i * size, (i + 1) * size, i) for i in range(splits) if size),
    )


def partition(
    layers: Sequence[Layer],
    pieces: Sequence[Sequence[Segment]],
    *,
    rank: int,
    numel: int,
    process_group: dist.ProcessGroup | None = None,
    also: Sequence[tuple[dist.ProcessGroup, Collection[int]]] = (),
) -> Layout:
    """The layout of this rank's tensor when layers are cut over the ranks of a process group.

    Every rank passes the same ``layers`` and ``pieces``. Only layers with pieces on more than one
    rank take part in a collective.

    Args:
        layers: all layers, in the same order on every rank.
        pieces: for each rank of the group, the segments of its tensor; ``Segment.layer`` indexes
            ``layers``.
        rank: this rank, in the group.
        numel: elements of this rank's tensor, padding included.
        process_group: completes the layers that are cut.
        also: further groups, each with the layers that are cut over it too (indices into ``layers``),
            such as the tensor-parallel group. Its ranks hold the same layers.

    Raises:
        LayoutError: if the pieces overlap, run over the end of a tensor, or do not make up every
            layer exactly once.
    """
    _check_pieces(layers, pieces, rank, numel)
    holders: defaultdict[int, set[int]] = defaultdict(set)
    for holder, segments in enumerate(pieces):
        for segment in segments:
            holders[segment.layer].add(holder)
    mine = sorted({segment.layer for segment in pieces[rank]})
    local = {layer: index for index, layer in enumerate(mine)}
    cut = [layer for layer in range(len(layers)) if len(holders[layer]) > 1]
    # Also without a cut layer: the ranks must agree on whether a step is skipped.
    slots = tuple(local.get(layer) for layer in cut)
    completions = [Completion(process_group, slots, tuple(layers))][: len(pieces) > 1]
    for group, members in also:
        held = [layer for layer in mine if layer in members]
        slots = tuple(local[layer] for layer in held)
        completions.append(Completion(group, slots, tuple(layers[layer] for layer in held)))
    return Layout(
        numel,
        tuple(layers[layer] for layer in mine),
        tuple(replace(s, layer=local[s.layer]) for s in sorted(pieces[rank], key=lambda s: s.start)),
        tuple(completions),
    )


def sharded(name: str, tensor: DTensor) -> Layout:
    """The layout of this rank's part of a DTensor parameter: one layer, cut over its mesh.

    The layer is held on every rank, also where the local tensor is empty: v is replicated.

    Raises:
        LayoutError: if the parameter is a partial sum.
    """
    local = tensor.to_local().numel()
    layer = Layer(name, tensor.numel())
    completions = []
    for dim, placement in enumerate(tensor.placements):
        if placement.is_partial():
            raise LayoutError(
                f"{name} is a DTensor with the placement {placement}: each rank holds a part of a sum, not a "
                "part of the parameter. Redistribute it to Shard or Replicate"
            )
        if not placement.is_replicate():
            completions.append(Completion(tensor.device_mesh.get_group(dim), (0,), (layer,)))
    segments = (Segment(0, local, 0),) if local else ()
    return Layout(local, (layer,), segments, tuple(completions))


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    local = tensor.to_local()
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def local_gradient(p: Tensor) -> Tensor:
    """This rank's part of a parameter's gradient, placed as the parameter is.

    A gradient that is placed otherwise (a partial sum, under tensor parallelism) is redistributed.
    """
    grad = p.grad
    assert grad is not None
    if isinstance(p, DTensor) and isinstance(grad, DTensor) and grad.placements != p.placements:
        grad = grad.redistribute(placements=p.placements)
    return local_tensor(grad)


def _check_pieces(
    layers: Sequence[Layer], pieces: Sequence[Sequence[Segment]], rank: int, numel: int
) -> None:
    spans: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for holder, segments in enumerate(pieces):
        end = 0
        for s in sorted(segments, key=lambda s: s.start):
            if s.numel <= 0 or s.start < end:
                raise LayoutError(
                    f"rank {holder}: the elements {s.start} to {s.stop} given to layer "
                    f"{layers[s.layer].name} are empty or overlap those of another segment"
                )
            end = s.stop
            spans[s.layer].append((s.offset, s.offset + s.numel))
        if holder == rank and end > numel:
            raise LayoutError(f"rank {rank}: a segment ends at element {end} of a tensor of {numel}")
    for index, layer in enumerate(layers):
        end = 0
        for start, stop in sorted(spans[index]):
            if start != end:
                break
            end = stop
        if end != layer.numel or sum(b - a for a, b in spans[index]) != layer.numel:
            raise LayoutError(
                f"layer {layer.name}: its {layer.numel} elements are not held exactly once by the "
                f"{len(pieces)} ranks (each rank's pieces of it: {sorted(spans[index])})"
            )


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
    slots: list[int] = field(default_factory=list)  # places in the buffer of the layers held here
    places: list[int] = field(default_factory=list)  # their places in the vector of all layers
    layers: list[Layer] = field(default_factory=list)  # what the ranks must agree on
    device: torch.device | None = None  # of the collective


class Plan:
    """What one step needs to know of the layouts of its tensors; built once and reused.

    Holds integers only, no parameter. Building it is a collective where layers are cut: the ranks make
    sure once that they mean the same layers.

    Raises:
        LayoutError: on every rank, if the ranks of a process group have different layers.

    Attributes:
        names: the name of each layer in the vector.
        device: where the vector of statistics lives.
    """

    def __init__(self, placed: Sequence[Placed], device: torch.device) -> None:
        self.names = [layer.name for p in placed for layer in p.layout.layers]
        self.device = device
        merged: dict[tuple[int, dist.ReduceOp.RedOpType], _Reduction] = {}
        for p in placed:
            for completion in p.layout.completions:
                key = (id(completion.process_group), p.op)
                reduction = merged.setdefault(key, _Reduction(completion.process_group, p.op))
                for slot, layer in enumerate(completion.slots):
                    if layer is not None:
                        reduction.slots.append(reduction.length + slot)
                        reduction.places.append(p.first + layer)
                reduction.length += len(completion.slots)
                reduction.layers += completion.layers
        index = partial(torch.tensor, dtype=torch.int64, device=device)
        self._reductions = [(r, index(r.slots), index(r.places)) for r in merged.values()]
        # What the last steps have shown: see NovoGrad.layer_norms and skipped_layers.
        self._squared = [p.op == dist.ReduceOp.SUM for p in placed for _ in p.layout.layers]
        self._statistic = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self.bad = torch.zeros(len(self.names), dtype=torch.bool, device=device)
        for reduction, _, _ in self._reductions:
            self._agree(reduction)

    @property
    def reductions(self) -> int:
        """The number of collectives of one step."""
        return len(self._reductions)

    def complete(self, statistic: Tensor, veto: Tensor | None = None) -> Tensor:
        """Complete, in place, the layers that are cut; say whether all ranks may step.

        One all-reduce per process group. The last element of each carries the ranks' verdict, so
        that a non-finite gradient on one rank is known to all.

        Args:
            statistic: float64, one element per layer: this rank's part.
            veto: 0-dim bool: this rank has another reason to skip the step.

        Returns:
            A 0-dim bool tensor: every layer of every rank is finite (in float32's range).
        """
        bad = (~_fits_float32(statistic)).any().to(statistic.dtype)
        if veto is not None:
            bad = torch.maximum(bad, veto.to(bad))
        for reduction, slots, places in self._reductions:
            buffer = statistic.new_zeros(reduction.length + 1)
            # MAX need not carry a NaN from one rank to the others; infinity does.
            held = statistic[places]
            if reduction.op == dist.ReduceOp.MAX:
                held = held.nan_to_num(nan=torch.inf)
            buffer[slots] = held
            buffer[-1] = bad
            buffer = self._all_reduce(reduction, buffer)
            statistic[places] = buffer[slots]
            bad = torch.maximum(buffer[-1], (~_fits_float32(buffer[:-1])).any().to(buffer.dtype))
        return bad == 0

    def _agree(self, reduction: _Reduction) -> None:
        """Raise on every rank if the ranks have different layers, rather than add up what does not match."""
        layers = repr([(layer.name, layer.numel) for layer in reduction.layers]).encode()
        # 48 bits of a hash, which a float64 holds exactly; largest and smallest in one collective.
        digest = float(int.from_bytes(hashlib.sha256(layers).digest()[:6], "big"))
        verdict = torch.tensor([digest, -digest], dtype=torch.float64, device=self.device)
        verdict = self._all_reduce(_Reduction(reduction.process_group, dist.ReduceOp.MAX), verdict)
        if verdict[0] != -verdict[1]:
            raise LayoutError(
                f"the ranks have different layers, in number, name, size or order; this rank has "
                f"{len(reduction.layers)}, from {reduction.layers[0].name} to {reduction.layers[-1].name}. "
                "Build the same model and param groups on every rank"
                if reduction.layers
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
        self.bad.copy_(torch.where(finite, self.bad, ~_fits_float32(statistic)))

    def norms(self) -> dict[str, float]:
        """The norm of each layer's gradient at the last step. Waits for the device."""
        rows = zip(self.names, self._statistic.tolist(), self._squared, strict=True)
        return {name: math.sqrt(value) if squared else value for name, value, squared in rows}


def _collective_device(process_group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """``device``, or the device that the group's backend serves (states offloaded to the CPU, NCCL)."""
    served = [entry.split(":")[0] for entry in dist.get_backend_config(process_group).split(",")]
    if device.type in served:
        return device
    return torch.device(served[0], torch.get_device_module(served[0]).current_device())


def _fits_float32(statistic: Tensor) -> Tensor:
    return statistic <= FLOAT32_MAX  # false for NaN and infinity
