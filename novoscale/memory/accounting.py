"""Bytes from storages, shared storages counted once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class StateBytes:
    """Bytes of optimizer state held on this rank.

    Attributes:
        total: bytes of all storages.
        by_key: bytes by the name under which the optimizer keeps them, such as ``exp_avg``.
    """

    total: int
    by_key: dict[str, int]


def optimizer_state_bytes(optimizer: Optimizer) -> StateBytes:
    """Count the bytes of the storages in ``optimizer.state`` on this rank.

    Works for any torch optimizer; under DeepSpeed pass the one that its wrapper holds
    (``engine.basic_optimizer``). A storage that several tensors share is counted once, whole, under the
    first name that shows it.
    """
    seen: set[int] = set()
    by_key: defaultdict[str, int] = defaultdict(int)
    for state in optimizer.state.values():
        for key, tensor in _tensors(state):
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                by_key[key] += storage.nbytes()
    return StateBytes(sum(by_key.values()), dict(by_key))


def _tensors(value: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _tensors(item, key or str(name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, key)
