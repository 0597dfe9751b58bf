"""Bytes on each rank for a model of any size, from its shapes, the sharding and the rule of each optimizer.

What is planned are the model states: parameters, gradients, optimizer state and float32 master weights.
Activations, the collectives' buckets and layers that are gathered for a moment are not in it; ``novoscale
memory`` measures those.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from novoscale.kernels import orthogonal as directions
from novoscale.memory import releasing
from novoscale.memory.rules import FLOAT32, Piece, Rule, Stepped
from novoscale.optimizer import hidden

BFLOAT16 = 2
# Elements. Under stage 3 a rank keeps smaller parameters in full, beside its shards (DeepSpeed's default).
PERSISTENT = 100_000
LARGEST_WORLD = 1 << 17


@dataclass(frozen=True)
class Plan:
    """Bytes of the model states on the rank that holds most.

    Attributes:
        parameters: the weights that forward and backward use, or the rank's shards of them.
        gradients: after the backward pass, as they wait for the step; released ones: the most of them that
            is alive at once.
        state: of the optimizer.
        master_weights: the copies that DeepSpeed gives to the optimizer.
        transient: gradients that DeepSpeed holds for a moment besides: under stage 1 all of them until the
            backward pass ends; under stages 1 and 2 the partition's once more in the step. Of NovoGrad with
            orthogonal directions those that are there at a time.
        on_host: what of the former lies in the host's memory, by offload.
    """

    parameters: int
    gradients: int
    state: int
    master_weights: int = 0
    transient: int = 0
    on_host: int = 0

    @property
    def total(self) -> int:
        """Bytes held between the backward pass and the step, or while it releases gradients."""
        return self.parameters + self.gradients + self.state + self.master_weights

    @property
    def on_device(self) -> int:
        """Bytes that the device must have for the model states."""
        return self.total + self.transient - self.on_host


def plan(
    model: nn.Module,
    rule: Rule,
    sharding: str,
    world: int,
    precision: str,
    release: bool = False,
    orthogonal: bool = False,
) -> Plan:
    """Plan the memory of the rank that holds most.

    Args:
        model: on any device, the meta device included; only the shapes of its parameters are read. All
            are taken to be trained.
        rule: of the optimizer, see ``novoscale.memory.rules``.
        sharding: of ``novoscale.memory.shardings.SHARDINGS``.
        world: number of ranks.
        precision: of ``novoscale.memory.shardings.PRECISIONS``.
        release: with ``novoscale.release_gradients``; where ``releasing.why_not`` has nothing against it.
        orthogonal: NovoGrad with ``preset="muon"``.
    """
    shapes = [tuple(p.shape) for p in model.parameters()]
    planned = _SHARDINGS[sharding](shapes, rule, world, precision)
    if orthogonal:
        planned = replace(planned, transient=planned.transient + _directions(model, release))
    if release:
        alive = releasing.alive_at_once(model, sharding, world)
        return replace(planned, gradients=_torch_size(precision) * alive)
    return planned


def smallest_world(
    model: nn.Module,
    rule: Rule,
    sharding: str,
    precision: str,
    device_bytes: float,
    release: bool = False,
    orthogonal: bool = False,
) -> int | None:
    """The fewest ranks on which the model states fit the device; None if no number of ranks is enough."""

    def fits(world: int) -> bool:
        found = plan(model, rule, sharding, world, precision, release, orthogonal)
        return found.on_device <= device_bytes

    low, high = 0, 1  # does not fit, may fit
    while not fits(high):
        low, high = high, 2 * high
        if high > LARGEST_WORLD or sharding in ("none", "ddp"):
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _directions(model: nn.Module, release: bool) -> int:
    """Bytes of the directions that are there at a time on a GPU: in bfloat16, see ``kernels.orthogonal``."""
    roles = hidden.of_model(model, None)
    sizes = [BFLOAT16 * p.numel() for p in model.parameters() if roles[id(p)].hidden]
    largest = max(sizes, default=0)
    return largest if release else min(sum(sizes), max(directions.BUFFER, largest))


Shapes = Sequence[tuple[int, ...]]


def _unsharded(shapes: Shapes, rule: Rule, world: int, precision: str) -> Plan:
    size = _torch_size(precision)
    weights = size * _elements(shapes)
    return Plan(weights, weights, rule([full_tensor(shape) for shape in shapes], size))


def _fsdp2(shapes: Shapes, rule: Rule, world: int, precision: str) -> Plan:
    """Slices along dimension 0; the first rank has the largest."""
    size = _torch_size(precision)
    tensors = []
    for shape in shapes:
        rows, *rest = shape or (1,)
        shard = (-(-rows // world), *rest)
        tensors.append(Stepped(shard, (Piece(shape, math.prod(shard)),)))
    weights = size * sum(t.numel for t in tensors)
    return Plan(weights, weights, rule(tensors, size))


def _zero_1_and_2(stage: int, offload: bool) -> Callable[[Shapes, Rule, int, str], Plan]:
    def planned(shapes: Shapes, rule: Rule, world: int, precision: str) -> Plan:
        """One flat tensor, padded to equal partitions of an even number of elements."""
        size, master = _sizes(precision)
        elements = _elements(shapes)
        partition = 2 * math.ceil(elements / (2 * world))
        # Which rank holds most depends on the rule: columns are kept by every rank that has a part of them.
        state = max(rule([Stepped((partition,), p)], master) for p in _partitions(shapes, partition))
        master_weights = master * partition
        parameters = size * 2 * world * math.ceil(elements / (2 * world))
        if offload:  # float32 gradients on the host, and a buffer for the largest on either side
            buffer = size * max(map(math.prod, shapes))
            on_host = master_weights + state + FLOAT32 * partition + buffer
            return Plan(parameters, FLOAT32 * partition + 2 * buffer, state, master_weights, 0, on_host)
        transient = size * elements if stage == 1 else master_weights
        gradients = size * _largest_share(shapes, partition)
        return Plan(parameters, gradients, state, master_weights, transient)

    return planned


def _zero_3(shapes: Shapes, rule: Rule, world: int, precision: str) -> Plan:
    """An equal slice of every parameter, padded, in one flat tensor; and small parameters in full."""
    size, master = _sizes(precision)
    pieces = tuple(Piece(shape, math.ceil(math.prod(shape) / world)) for shape in shapes)
    slices = sum(piece.numel for piece in pieces)
    persistent = sum(piece.unsharded_numel for piece in pieces if piece.unsharded_numel <= PERSISTENT)
    state = rule([Stepped((slices,), pieces)], master)
    return Plan(size * (slices + persistent), size * slices, state, master * slices)


_SHARDINGS: dict[str, Callable[[Shapes, Rule, int, str], Plan]] = {
    "none": _unsharded,
    "ddp": _unsharded,
    "zero1": _zero_1_and_2(1, offload=False),
    "zero2": _zero_1_and_2(2, offload=False),
    "zero3": _zero_3,
    "offload": _zero_1_and_2(2, offload=True),
    "fsdp2": _fsdp2,
}


def _torch_size(precision: str) -> int:
    """Bytes of an element without DeepSpeed: autocast and FSDP2's mixed precision keep float32 weights."""
    return BFLOAT16 if precision == "bfloat16" else FLOAT32


def _sizes(precision: str) -> tuple[int, int]:
    """Bytes of an element of the weights and of their master copies under DeepSpeed."""
    return {
        "float32": (FLOAT32, FLOAT32),
        "bf16-mixed": (BFLOAT16, FLOAT32),
        "bfloat16": (BFLOAT16, BFLOAT16),
    }[precision]


def _elements(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


def full_tensor(shape: tuple[int, ...]) -> Stepped:
    """A tensor that is not sharded."""
    return Stepped(shape, (Piece(shape, math.prod(shape)),))


def _largest_share(shapes: Shapes, partition: int) -> int:
    """The most elements of gradients that a rank holds; a parameter on a border counts in full on both."""
    held: defaultdict[int, int] = defaultdict(int)
    start = 0
    for numel in map(math.prod, shapes):
        for rank in range(start // partition, (start + numel - 1) // partition + 1):
            held[rank] += numel
        start += numel
    return max(held.values())


def _partitions(shapes: Shapes, elements: int) -> Iterator[tuple[Piece, ...]]:
    """The parameters, or the parts of them, that fill each partition of so many elements.

    Of those that lie within one parameter only one: there are as many as ranks, and they are alike.
    """
    pieces: list[Piece] = []
    room = elements
    for shape in shapes:
        left = math.prod(shape)
        while left > 0:
            numel = min(left, room)
            pieces.append(Piece(shape, numel))
            left, room = left - numel, room - numel
            if room == 0:
                yield tuple(pieces)
                pieces, room = [], elements
                if left > 2 * elements:
                    left = elements + left % elements
    if pieces:
        yield tuple(pieces)
