"""Which implementation each tensor goes to: the fused kernel of its device, or the reference."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from novoscale.kernels import orthogonal, reference
from novoscale.kernels.interface import ElementKernels, LayerKernels, States, VectorSizes
from novoscale.kernels.layers import LayerTable
from novoscale.kernels.shards import Coefficients, Shard, ShardTensors

# The fused kernel for each type of device. "cuda" is ROCm's name too.
FUSED_DEVICES = {"cuda": "triton", "cpu": "cpu"}
# Other classes may have no memory of their own.
PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


class Part(NamedTuple):
    """The shards that one implementation takes on one device.

    Attributes:
        module: the implementation.
        device: where the shards are.
        places: which of all shards they are.
        kernels: both passes over them.
    """

    module: ModuleType
    device: torch.device
    places: list[int]
    kernels: ElementKernels

    def hold(self, tensors: Callable[[int], ShardTensors]) -> None:
        """Take the tensors of its shards; ``tensors`` is given the index among all shards."""
        self.kernels.hold(lambda index: tensors(self.places[index]))


class Kernels(ElementKernels):
    """Both passes, for the tensors of a step, each tensor by the fastest kernel that takes it."""

    def __init__(self, shards: Sequence[Shard], device: torch.device, sizes: VectorSizes) -> None:
        places: defaultdict[tuple[ModuleType, torch.device], list[int]] = defaultdict(list)
        directed: defaultdict[tuple[torch.dtype, torch.device], list[int]] = defaultdict(list)
        for index, shard in enumerate(shards):
            if shard.matrices is None:
                places[kernel_of(shard), shard.param.device].append(index)
            else:
                directed[shard.param.dtype, shard.param.device].append(index)
        self._device = device
        self.parts = [
            Part(module, where, own, module.Kernels([shards[i] for i in own], where, sizes))
            for (module, where), own in places.items()
        ]
        for (_, where), own in directed.items():
            for batch in orthogonal.batches([shards[i] for i in own]):
                indices = [own[i] for i in batch]
                kernels = orthogonal.Directions([shards[i] for i in indices], where, sizes, Kernels)
                self.parts.append(Part(orthogonal, where, indices, kernels))

    def move_gradients(self, addresses: Sequence[int]) -> None:
        """See :class:`ElementKernels`."""
        for part in self.parts:
            part.kernels.move_gradients([addresses[i] for i in part.places])

    def move_params(self, addresses: Sequence[int]) -> None:
        """See :class:`ElementKernels`."""
        for part in self.parts:
            part.kernels.move_params([addresses[i] for i in part.places])

    def hold(self, tensors: Callable[[int], ShardTensors]) -> None:
        """See :class:`ElementKernels`."""
        for part in self.parts:
            part.hold(tensors)

    def release(self) -> None:
        """See :class:`ElementKernels`."""
        for part in self.parts:
            part.kernels.release()

    def sum_of_squares(self, more: int = 0) -> Tensor:
        """See :class:`ElementKernels`."""
        # Each layer lies in one tensor, so that all parts but one have 0 for it.
        found = [part.kernels.sum_of_squares(more).to(self._device) for part in self.parts]
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)

    def largest(self, coefficients: Coefficients) -> Tensor:
        """See :class:`ElementKernels`."""
        found = [part.kernels.largest(coefficients.to(part.device)).to(self._device) for part in self.parts]
        return found[0] if len(found) == 1 else torch.stack(found).amax(0)

    def update(self, coefficients: Coefficients) -> None:
        """See :class:`ElementKernels`."""
        for part in self.parts:
            part.kernels.update(coefficients.to(part.device))


def layer_kernels(
    table: LayerTable, device: torch.device, states: States, shards: Sequence[Shard]
) -> LayerKernels:
    """The pass over the layers: by the fused kernel if it takes all of them and any tensor may be fused.

    Args:
        table: the layers.
        device: of the vectors that have one element per layer.
        states: of the tensors, at the addresses that the table has.
        shards: the tensors.
    """
    module = fused(device.type)
    if module is not None and table.dtype == torch.float32 and any(s.fused is not False for s in shards):
        tensors = [t for of in states for t in of]
        if all(t.device == device and t.is_contiguous() and type(t) in PLAIN for t in tensors):
            found: LayerKernels = module.LayerKernels(table, device)
            return found
    return reference.LayerKernels(table, device)


def kernel_of(shard: Shard) -> ModuleType:
    """The module whose kernel is to be used for a tensor.

    Raises:
        RuntimeError: ``fused=True`` where the fused kernel cannot take it.
    """
    if shard.fused is False:
        return reference
    module = fused(shard.param.device.type)
    if module is not None and all(type(t) in PLAIN for t in shard.tensors) and module.supports(shard):
        return module
    if shard.fused:
        raise RuntimeError(
            "`fused=True`: the fused kernel takes dense tensors of float32, bfloat16 or float16 and equal "
            f"strides on devices {list(FUSED_DEVICES)}, got {_described(shard.tensors)}. Leave fused out"
        )
    if module is None and shard.param.device.type in FUSED_DEVICES:
        _warn_once(shard.param.device.type)
    return reference


def fused(device_type: str) -> ModuleType | None:
    """The fused kernel for a type of device, if it can be had here: see :func:`unfused_reason`."""
    found = _load(device_type)
    return None if isinstance(found, str) else found


def unfused_reason(device_type: str) -> str:
    """Why there is no fused kernel for a type of device; empty if there is one."""
    found = _load(device_type)
    return found if isinstance(found, str) else ""


@functools.cache
def _load(device_type: str) -> ModuleType | str:
    """The fused kernel, or why there is none. Asked once for each type of device."""
    name = FUSED_DEVICES.get(device_type)
    if name is None:
        return f"there is no fused kernel for {device_type}"
    try:
        module = importlib.import_module(f"novoscale.kernels.{name}")
        module.load()
    except Exception as error:  # a compiler has many ways to fail, and the reference serves in all of them
        return f"{type(error).__name__}: {error}"
    return module


@functools.cache
def _warn_once(device_type: str) -> None:
    warnings.warn(
        f"NovoGrad's fused kernel for {device_type} cannot be used: {unfused_reason(device_type)}. The "
        "reference implementation in plain torch is used, which gives the same result and is slower "
        "(fused=False says that this is meant)",
        stacklevel=2,
    )


def _described(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{type(t).__name__} of {t.dtype} on {t.device}, strides {t.stride()}" for t in tensors)
