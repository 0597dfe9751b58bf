"""The two passes over the elements: the statistic of each layer, and the update.

``reference`` is the definition, in plain torch; ``triton`` (GPU) and ``cpu`` (C++) are fused kernels that
give the same bits. Kernels see tensors and tables only: no distribution, no optimizer.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from novoscale.kernels import reference
from novoscale.kernels.layers import LayerTable
from novoscale.kernels.reference_layers import LayerKernels, States
from novoscale.kernels.shards import Coefficients, Held, Shard

__all__ = [
    "FUSED_DEVICES", "Coefficients", "Held", "Kernels", "LayerKernels", "Shard", "fused", "layer_kernels",
    "unfused_reason",
]  # fmt: skip

# The fused kernel for each type of device. "cuda" is ROCm's name too.
FUSED_DEVICES = {"cuda": "triton", "cpu": "cpu"}
# Other classes may have no memory of their own.
PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


class Kernels:
    """Both passes, for the tensors of a step, each tensor by the fastest kernel that takes it.

    Fused kernels know addresses. What is left to the reference it holds for one step at a time.

    Args:
        shards: the tensors.
        device: of the vectors that have one element per layer.
        layers: how many layers there are.
        columns: how many columns of factored parameters.
        cut_blocks: how many blocks of first moments are cut.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        device: torch.device,
        layers: int,
        columns: int = 0,
        cut_blocks: int = 0,
    ) -> None:
        self._places: defaultdict[tuple[ModuleType, torch.device], list[int]] = defaultdict(list)
        for index, shard in enumerate(shards):
            self._places[kernel_of(shard), shard.param.device].append(index)
        self._device = device
        self._parts: list[tuple[torch.device, Any]] = [
            (where, module.Kernels([shards[i] for i in places], where, layers, columns, cut_blocks))
            for (module, where), places in self._places.items()
        ]

    def moved(self, gradients: Sequence[int]) -> None:
        """Go on with gradients at other addresses: one for each shard."""
        for ((module, _), places), (_, kernel) in zip(self._places.items(), self._parts, strict=True):
            if module is not reference:
                kernel.moved([gradients[i] for i in places])

    def hold(self, tensors: Callable[[int], Held]) -> None:
        """Take the tensors of those shards that are not known by their addresses, for one step."""
        for ((module, _), places), (_, kernel) in zip(self._places.items(), self._parts, strict=True):
            if module is reference:
                kernel.hold([*map(tensors, places)])

    def release(self) -> None:
        """Let go of them."""
        for (module, _), (_, kernel) in zip(self._places, self._parts, strict=True):
            if module is reference:
                kernel.release()

    def sum_of_squares(self, more: int = 0) -> Tensor:
        """This rank's part of each layer's and column's statistic: see ``reference.sum_of_squares``.

        Followed by ``more`` zeros.
        """
        # Each layer lies in one tensor, so that all parts but one have 0 for it.
        parts = [kernel.sum_of_squares(more).to(self._device) for _, kernel in self._parts]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def largest(self, coefficients: Coefficients) -> Tensor:
        """This rank's part of what the ranks have to agree on of cut blocks: see ``reference.largest``."""
        parts = [kernel.largest(coefficients.to(d)).to(self._device) for d, kernel in self._parts]
        return parts[0] if len(parts) == 1 else torch.stack(parts).amax(0)

    def update(self, coefficients: Coefficients) -> None:
        """The first moment and the weights of every active layer: see ``reference.update``."""
        for device, kernel in self._parts:
            kernel.update(coefficients.to(device))


def layer_kernels(
    table: LayerTable, device: torch.device, states: States, shards: Sequence[Shard]
) -> LayerKernels:
    """The pass over the layers, by the fused kernel if it can take them all and a tensor is for one.

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
    return LayerKernels(table, device)


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
        _say_once(shard.param.device.type)
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
def _say_once(device_type: str) -> None:
    warnings.warn(
        f"NovoGrad's fused kernel for {device_type} cannot be used: {unfused_reason(device_type)}. The "
        "reference implementation in plain torch is used, which gives the same result and is slower "
        "(fused=False says that this is meant)",
        stacklevel=2,
    )


def _described(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{type(t).__name__} of {t.dtype} on {t.device}, strides {t.stride()}" for t in tensors)
