"""Bytes from storages, shared storages counted once.

What is counted is what is held on this rank, whoever holds it: the model, the optimizer, and the wrappers
around them. Tensor subclasses (DTensor, torchao's and other packages' quantised tensors) are seen through.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
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


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one tensor that the optimizer steps, on this rank: elements, without shared padding."""

    parameters: int
    gradients: int
    state: int


@dataclass(frozen=True)
class Account:
    """Bytes held on this rank, each storage counted once, under the first of these that shows it.

    Attributes:
        parameters: the model's weights as forward and backward use them, or this rank's shards of them.
        state: of the optimizer.
        master_weights: copies of the weights that a wrapper gives to its optimizer.
        gradients: of the model, and those that a wrapper has gathered for its optimizer.
        model_buffers: of the model (``nn.Module.buffers``).
        other: what else optimizer and wrappers hold, such as DeepSpeed's buckets. DDP's buckets are out of
            Python's reach and not counted.
        layers: by name of the tensor; empty unless asked for.
    """

    parameters: int
    state: StateBytes
    master_weights: int
    gradients: int
    model_buffers: int
    other: int
    layers: dict[str, LayerBytes] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        held = self.parameters + self.state.total + self.master_weights + self.gradients
        return held + self.model_buffers + self.other


def optimizer_state_bytes(optimizer: Any) -> StateBytes:
    """Count the bytes of an optimizer's state on this rank.

    Args:
        optimizer: any torch optimizer, or a wrapper around one (DeepSpeed's, Accelerate's,
            ZeroRedundancyOptimizer). A storage that several tensors share is counted once, in full, under
            the first name that shows it.
    """
    return _state(wrapped(optimizer)[-1], _Counter())


def account(model: nn.Module, optimizer: Any = None, *, by_layer: bool = False) -> Account:
    """Count what a model and its optimizer hold on this rank.

    Args:
        model: a module, plain or sharded by FSDP2, DistributedDataParallel, or a DeepSpeed engine.
        optimizer: any torch optimizer or wrapper; default: the DeepSpeed engine's.
        by_layer: also count each tensor that the optimizer steps. Where a wrapper has replaced the
            parameters by flat partitions, these are the partitions.
    """
    wrappers = wrapped(getattr(model, "optimizer", None) if optimizer is None else optimizer)
    inner = wrappers[-1] if wrappers else None
    counter = _Counter()
    weights = [t for p in model.parameters() for t in (p, getattr(p, "ds_tensor", None)) if t is not None]
    parameters = counter.add(weights)
    state = StateBytes(0, {}) if inner is None else _state(inner, counter)
    stepped = [] if inner is None else [p for group in inner.param_groups for p in group["params"]]
    held = [item for wrapper in wrappers for item in _attributes(wrapper)]
    # DeepSpeed's names. Under stage 3 it gives the master weights to its optimizer for the step only.
    of_wrapper = [tensor for name, tensor in held if "fp32" in name and "grad" not in name]
    master_weights = counter.add([*stepped, *of_wrapper])
    gradients = counter.add(p.grad for p in (*weights, *stepped) if p.is_leaf and p.grad is not None)
    model_buffers = counter.add(model.buffers())
    gradients += counter.add(tensor for name, tensor in held if "grad" in name)
    other = counter.add(tensor for _, tensor in held)
    layers = _layers(model, inner) if by_layer and inner is not None else {}
    return Account(parameters, state, master_weights, gradients, model_buffers, other, layers)


class AliveGradients:
    """Counts the gradients of some parameters that are alive at once, whoever holds them.

    It sees a gradient when it is added to its parameter: what autograd has of it before is not counted. Make
    it before anything else that has hooks on the parameters.

    Attributes:
        most: bytes of their storages.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.most = 0
        self._alive: dict[StorageWeakRef, int] = {}
        for p in params:
            p.register_post_accumulate_grad_hook(self._count)  # type: ignore[no-untyped-call]

    def _count(self, p: Tensor) -> None:
        self._alive = {seen: held for seen, held in self._alive.items() if not seen.expired()}  # type: ignore[no-untyped-call]
        for part in parts(p.grad) if p.grad is not None else ():
            storage = part.untyped_storage()
            self._alive[StorageWeakRef(storage)] = storage.nbytes()  # type: ignore[no-untyped-call]
        self.most = max(self.most, sum(self._alive.values()))


def wrapped(optimizer: Any) -> list[Any]:
    """The optimizer and what it wraps, outermost first; the last one does the arithmetic."""
    found: list[Any] = []
    while optimizer is not None and not any(optimizer is known for known in found):
        found.append(optimizer)
        # ZeroRedundancyOptimizer says "optim"; DeepSpeed and Accelerate "optimizer".
        optimizer = getattr(optimizer, "optimizer", None) or getattr(optimizer, "optim", None)
    return found


class _Counter:
    """Counts storages that it has not seen."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def add(self, tensors: Iterable[Tensor]) -> int:
        total = 0
        for tensor in tensors:
            for part in parts(tensor):
                storage = part.untyped_storage()
                # No address: the storage is empty, or on the meta device.
                if (address := storage.data_ptr()) and address not in self._seen:
                    self._seen.add(address)
                    total += storage.nbytes()
        return total


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of: itself, unless it is a subclass that wraps others."""
    if isinstance(tensor, nn.Parameter):
        tensor = tensor.detach()
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            inner = getattr(tensor, name)
            if isinstance(inner, Tensor):  # a DTensor also lists its mesh
                yield from parts(inner)
    else:
        yield tensor


def _state(optimizer: Optimizer, counter: _Counter) -> StateBytes:
    by_key: defaultdict[str, int] = defaultdict(int)
    # Apex keeps its second moments in the param groups.
    groups = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in optimizer.param_groups]
    for state in (*optimizer.state.values(), *groups):
        for key, tensor in _tensors(state):
            by_key[key] += counter.add([tensor])
    return StateBytes(sum(by_key.values()), {key: held for key, held in by_key.items() if held})


def _tensors(value: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _tensors(item, key or str(name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, key)


def _attributes(wrapper: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that an object holds, through the containers and the objects of its own package.

    The name is that of the attribute of ``wrapper``, and of the attributes on the way.
    """
    package = type(wrapper).__module__.split(".")[0]
    seen: set[int] = set()

    def walk(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            yield name, value
            yield from walk(value.grad if value.is_leaf else None, f"{name}.grad")
            return
        if id(value) in seen or isinstance(value, (str, bytes, type, nn.Module)):
            return
        if isinstance(value, Optimizer) and value is not wrapper:
            return
        seen.add(id(value))
        if isinstance(value, dict):
            items: Iterable[tuple[str, Any]] = ((name, item) for item in value.values())
        elif isinstance(value, (list, tuple, set)):
            items = ((name, item) for item in value)
        elif value is wrapper or type(value).__module__.split(".")[0] == package:
            items = ()
        else:
            return
        for key, item in (*items, *((f"{name}.{k}", v) for k, v in getattr(value, "__dict__", {}).items())):
            yield from walk(item, key)

    return walk(wrapper, "")


def _layers(model: nn.Module, optimizer: Optimizer) -> dict[str, LayerBytes]:
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for index, group in enumerate(optimizer.param_groups):
        for position, p in enumerate(group["params"]):
            name = names.get(id(p), f"tensor {position} of param group {index}")
            gradient = [] if p.grad is None else [p.grad]
            state = [tensor for _, tensor in _tensors(optimizer.state.get(p, {}))]
            found[name] = LayerBytes(_element_bytes([p]), _element_bytes(gradient), _element_bytes(state))
    return found


def _element_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(part.numel() * part.element_size() for tensor in tensors for part in parts(tensor))
