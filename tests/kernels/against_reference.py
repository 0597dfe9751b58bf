"""What the fused kernels are compared by: the reference, bit for bit, on tensors that nobody chose.

The statistic is a sum in float64 in another order. The squares are exact, and a sum of n numbers of one
sign is off by at most n * 2**-53 of itself, to first order, in whatever order: two of them differ by at
most n * 2**-52.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

from novoscale.kernels import Coefficients, Shard, reference
from novoscale.layout import Segment

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -6e-8, 65519.0, 65520.0, 3e38]


def values(
    shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, offset: int = 0, special: float = 0
) -> Tensor:
    """Numbers of all magnitudes, subnormal ones too, a part of them special.

    They begin at an offset from an aligned address, in a storage that they do not fill.
    """
    numel = torch.Size(shape).numel()
    chance = lambda: torch.rand(numel + offset + 3, generator=generator)  # noqa: E731
    exponent = torch.where(chance() < 0.1, -41 - 4 * chance(), 15 * chance() - 12)
    base = (torch.randn(exponent.shape, generator=generator) * 10**exponent).to(dtype)
    places = chance() < special
    base[places] = torch.tensor(SPECIAL)[(chance() * len(SPECIAL)).long()][places].to(dtype)
    return base[offset : offset + numel].view(shape)


def cut(draw: Callable[[Any], Any], bounds: Sequence[int]) -> tuple[tuple[Segment, ...], int]:
    """Segments between sorted bounds, some of them padding, and the number of layers they belong to."""
    layers = draw(st.integers(1, 3))
    offsets, segments = [0] * layers, []
    for start, stop in pairwise(bounds):
        layer = draw(st.integers(-1, layers - 1))
        if layer >= 0:
            segments.append(Segment(start, stop, layer, offsets[layer]))
            offsets[layer] += stop - start
    return tuple(segments), layers


def random_coefficients(layers: int, generator: torch.Generator) -> Coefficients:
    vectors = [torch.rand(layers, generator=generator, dtype=torch.float64) for _ in range(4)]
    return Coefficients(100 * vectors[0], *vectors[1:3], vectors[3] > 0.2)


def whole(tensor: Tensor) -> Tensor:
    """All of the memory that a tensor is a view of."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def copied(shards: Sequence[Shard], device: torch.device) -> list[Shard]:
    """The same on a device, with all of the memory that the tensors are views of."""

    def copy(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        return whole(t).to(device, copy=True).as_strided(t.shape, t.stride(), t.storage_offset())

    return [replace(s, param=copy(s.param), grad=copy(s.grad), exp_avg=copy(s.exp_avg)) for s in shards]


def bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor; of NaN only that it is one (torch writes different ones with vector code)."""
    tensor = tensor.cpu().contiguous()
    return torch.where(tensor.isnan(), -1, tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize]))


def assert_same_bits(shards: Sequence[Shard], expected: Sequence[Shard]) -> None:
    """Of the whole memory, so that a write beside the segments shows."""
    for shard, other in zip(shards, expected, strict=True):
        for mine, its in zip(shard.tensors, other.tensors, strict=True):
            assert torch.equal(bits(whole(mine)), bits(whole(its)))


def assert_same_statistic(statistic: Tensor, shards: Sequence[Shard], layers: int) -> None:
    expected = reference.sum_of_squares(shards, CPU, layers)
    assert (statistic.dtype, statistic.shape) == (torch.float64, (layers,))
    numel, largest = torch.zeros(layers, dtype=torch.float64), torch.zeros(layers, dtype=torch.bool)
    for shard in shards:
        for segment in shard.segments:
            numel[shard.first + segment.layer] += segment.numel
            largest[shard.first + segment.layer] = shard.norm_type == 0
    bound = torch.where(largest, 0.0, numel * 2.0**-52) * expected
    difference = (statistic.cpu() - expected).abs()
    same = (statistic.cpu() == expected) | (statistic.cpu().isnan() & expected.isnan())
    assert (same | (difference <= bound)).all(), (statistic, expected)


def assert_as_reference(
    module: ModuleType,
    shards: Sequence[Shard],
    layers: int,
    coefficients: Coefficients,
    device: torch.device = CPU,
) -> None:
    """Both passes of ``module.Kernels``, of which the first changes nothing; ``shards`` are on the CPU."""
    mine, expected = copied(shards, device), copied(shards, CPU)
    kernels = module.Kernels(mine, device, layers)
    assert_same_statistic(kernels.sum_of_squares(), shards, layers)
    assert_same_bits(mine, shards)
    reference.update(expected, coefficients)
    kernels.update(coefficients.to(device))
    assert_same_bits(mine, expected)


def assert_follows_gradients(module: ModuleType, shards: Sequence[Shard], device: torch.device = CPU) -> None:
    """After ``moved`` the tables are those of gradients at other addresses."""
    mine = copied(shards, device)
    layers = 1 + max(s.first + segment.layer for s in mine for segment in s.segments)
    kernels = module.Kernels([replace(s, grad=torch.zeros_like(s.grad)) for s in mine], device, layers)
    kernels.moved([s.grad.data_ptr() for s in mine])
    coefficients = random_coefficients(layers, torch.Generator().manual_seed(0))
    expected = copied(shards, CPU)
    assert_same_statistic(kernels.sum_of_squares(), shards, layers)
    reference.update(expected, coefficients)
    kernels.update(coefficients.to(device))
    assert_same_bits(mine, expected)
