"""All-reduces over the ranks that share a layer, a parameter or a block."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from novoscale.sharding.blocks import ShardedBlocks
from novoscale.sharding.layers import Parameter
from novoscale.sharding.layout import Span

Key = TypeVar("Key")


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
        notes: of each tensor, how it is reduced: they must agree on that too.
        options: those of the param groups, as they are written, by id.
        device: of the all-reduce; None: not known yet.
    """

    process_group: dist.ProcessGroup | None
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    length: int = 0
    slots: list[range] = field(default_factory=list)
    places: list[range] = field(default_factory=list)
    scattered: list[int] = field(default_factory=list)
    parameters: list[Parameter] = field(default_factory=list)
    notes: list[tuple[int, ...]] = field(default_factory=list)
    options: dict[int, Mapping[str, str]] = field(default_factory=dict)
    device: torch.device | None = None

    def note(
        self, parameters: Sequence[Parameter], options: Mapping[str, str], of_tensor: tuple[int, ...]
    ) -> None:
        """Note what the ranks must agree on of one tensor."""
        self.parameters += parameters
        self.notes.append(of_tensor)
        self.options[id(options)] = options

    def written(self) -> dict[str, str]:
        """The options of all param groups that have part in it, one after another."""
        names = dict.fromkeys(name for options in self.options.values() for name in options)
        return {name: " and ".join(o[name] for o in self.options.values()) for name in names}

    def all_reduce(self, buffer: Tensor) -> Tensor:
        """The buffer, put together over the ranks."""
        if self.device is None:
            self.device = _collective_device(self.process_group, buffer.device)
        return all_reduce(buffer, self.op, self.process_group, self.device)

    def add(
        self, spans: Iterable[Span], first: int, order: Sequence[int] | None = None, here: bool = True
    ) -> None:
        """Have this all-reduce complete what lies in some spans.

        Args:
            spans: of layers, columns or parameters.
            first: the place in the vector of the step from which the places of the spans count.
            order: the place of each in that count; None: as they are.
            here: whether the vector of this rank has them; the buffer does.
        """
        for span in spans:
            if here and span.place is not None:
                place = first + (span.place if order is None else order[span.place])
                self.slots.append(range(self.length, self.length + span.count))
                self.places.append(range(place, place + span.count))
            self.length += span.count


def in_order(
    collectives: Mapping[Key, Collective], chains: Iterable[Sequence[Key]]
) -> list[tuple[Key, Collective]]:
    """All-reduces in an order in which ranks never wait for each other, whatever else each of them has.

    The ranks of a group have the same tensors over it, and know the same of it: how many groups complete one
    of them before it, and which ranks it has. They take the groups by that. So small groups come before those
    that contain them, which are told what was found there.

    Args:
        collectives: by a key.
        chains: of each tensor the keys of those that complete it, in the order of its mesh.
    """
    stage = dict.fromkeys(collectives, 0)
    before: dict[Key, set[Key]] = {key: set() for key in collectives}
    for chain in chains:
        for nth, key in enumerate(chain):
            stage[key] = max(stage[key], nth)
            before[key].update(chain[:nth])
    found: list[Key] = []
    left = [*collectives]
    places = {key: (stage[key], *_known_of(collectives[key])) for key in left} if len(left) > 1 else {}
    while left:
        ready = [key for key in left if before[key].isdisjoint({*left} - {key})] or left
        found.append(min(ready, key=lambda key: places[key]) if len(ready) > 1 else ready[0])
        left.remove(found[-1])
    return [(key, collectives[key]) for key in found]


def _known_of(collective: Collective) -> tuple[Any, ...]:
    """What all ranks of a group know of it, to sort by."""
    over = collective.process_group
    ranks = ranks_of(over)
    return (len(ranks), ranks, getattr(over, "group_name", ""), str(collective.op))


def ranks_of(process_group: dist.ProcessGroup | None) -> list[int]:
    """The ranks of a process group, as the world numbers them."""
    return sorted(dist.get_process_group_ranks(process_group))


def blocks_in_stages(sharded: Iterable[tuple[ShardedBlocks, int]]) -> list[tuple[Collective, Tensor]]:
    """The all-reduces by which ranks agree on sharded blocks, in the order of every tensor's stages.

    Args:
        sharded: the sharded blocks of each tensor, and the place of the first of them among all.

    Returns:
        Of each all-reduce the places of its blocks, int64.
    """
    found: dict[int, Collective] = {}
    places: dict[int, list[Tensor]] = {}
    chains = []
    for of_tensor, first in sharded:
        chains.append([id(process_group) for process_group, _ in of_tensor.stages])
        for process_group, blocks in of_tensor.stages:
            found.setdefault(id(process_group), Collective(process_group, dist.ReduceOp.MAX))
            places.setdefault(id(process_group), []).append(blocks + first)
    together = [(collective, torch.cat(places[key])) for key, collective in in_order(found, chains)]
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
