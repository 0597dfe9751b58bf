"""All-reduces over the ranks that share a layer, a parameter or a block."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from graphlib import TopologicalSorter

import torch
import torch.distributed as dist
from torch import Tensor

from novoscale.sharding.blocks import ShardedBlocks
from novoscale.sharding.layers import Parameter
from novoscale.sharding.layout import Span


@dataclass
class Collective:
    """One all-reduce of a step: of those numbers of the step's vector that one process group completes.

    Attributes:
        process_group: of the ranks.
        op: how the ranks' numbers are put together.
        length: how many numbers are in the buffer.
        slots: the places in the buffer of what this rank has.
        places: their places in the vector of the step.
        scattered: which sums over scattered layers follow in the buffer: indices into ``Plan``'s.
        parameters: what the ranks must agree on.
        device: of the all-reduce; None: not known yet.
    """

    process_group: dist.ProcessGroup | None
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    length: int = 0
    slots: list[range] = field(default_factory=list)
    places: list[range] = field(default_factory=list)
    scattered: list[int] = field(default_factory=list)
    parameters: list[Parameter] = field(default_factory=list)
    device: torch.device | None = None

    def all_reduce(self, buffer: Tensor) -> Tensor:
        """The buffer, put together over the ranks."""
        if self.device is None:
            self.device = _collective_device(self.process_group, buffer.device)
        return all_reduce(buffer, self.op, self.process_group, self.device)

    def add(self, spans: Iterable[Span], first: int, order: Sequence[int] | None = None) -> None:
        """Have this all-reduce complete what lies in some spans.

        Args:
            spans: of layers, columns or parameters.
            first: the place in the vector of the step from which the places of the spans count.
            order: the place of each in that count; None: as they are.
        """
        for span in spans:
            if span.place is not None:
                place = first + (span.place if order is None else order[span.place])
                self.slots.append(range(self.length, self.length + span.count))
                self.places.append(range(place, place + span.count))
            self.length += span.count


def blocks_in_stages(sharded: Iterable[tuple[ShardedBlocks, int]]) -> list[tuple[Collective, Tensor]]:
    """The all-reduces by which ranks agree on sharded blocks, in the order of every tensor's stages.

    Args:
        sharded: the sharded blocks of each tensor, and the place of the first of them among all.

    Returns:
        Of each all-reduce the places of its blocks, int64.
    """
    found: dict[int, tuple[Collective, list[Tensor]]] = {}
    after: TopologicalSorter[int] = TopologicalSorter()
    for of_tensor, first in sharded:
        before: list[int] = []
        for process_group, blocks in of_tensor.stages:
            key = id(process_group)
            after.add(key, *before)
            before.append(key)
            collective = Collective(process_group, dist.ReduceOp.MAX)
            found.setdefault(key, (collective, []))[1].append(blocks + first)
    ordered = [found[key] for key in after.static_order()]
    together = [(collective, torch.cat(places)) for collective, places in ordered]
    return [(collective, places) for collective, places in together if len(places)]


def agree_on_blocks(largest: Tensor, stages: Iterable[tuple[Collective, Tensor]]) -> Tensor:
    """Put together what the ranks have found of sharded blocks: one all-reduce for each process group.

    Args:
        largest: int32 ``[2, sharded blocks]``: see ``kernels.reference.largest``; changed in place.
        stages: of :func:`blocks_in_stages`.
    """
    for collective, places in stages:
        largest[:, places] = collective.all_reduce(largest[:, places])
    return largest


def digest(text: str) -> float:
    """48 bits of a hash of what ranks have to agree on, which a float64 holds exactly."""
    return float(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big"))


def all_reduce(
    tensor: Tensor,
    op: dist.ReduceOp.RedOpType,
    process_group: dist.ProcessGroup | None,
    device: torch.device | None = None,
) -> Tensor:
    """The result of an all-reduce on the tensor's device, wherever the group's backend works.

    Args:
        tensor: contiguous; changed, or not.
        op: how the ranks' tensors are put together.
        process_group: of the ranks.
        device: where it is done, if that is known.
    """
    moved = tensor.to(device or _collective_device(process_group, tensor.device))
    dist.all_reduce(moved, op=op, group=process_group)
    return moved.to(tensor.device)


def _collective_device(process_group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """``device``, or the device that the group's backend serves (states offloaded to the CPU, NCCL)."""
    served = [entry.split(":")[0] for entry in dist.get_backend_config(process_group).split(",")]
    if device.type in served:
        return device
    return torch.device(served[0], torch.get_device_module(served[0]).current_device())
