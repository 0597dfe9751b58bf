"""What the fused kernels are compared by: the reference, bit for bit, on tensors that nobody chose.

The statistic is a sum in float64 in another order. The squares are exact, and a sum of n numbers of one
sign is off by at most n * 2**-53 of itself, to first order, in whatever order: two of them differ by at
most n * 2**-52.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import hypothesis.strategies as st
import torch
from torch import Tensor

from novoscale.kernels import Coefficients, Shard
from novoscale.kernels.interface import VectorSizes
from novoscale.kernels.reference import elements as reference
from novoscale.sharding.blocks import BLOCK
from novoscale.state.formats import FORMATS

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# beta1, beta3, weight_decay and eps of param groups: rows of Coefficients.options.
OPTIONS = [
    (0.9, 1.0, 0.1, 0.0),
    (0.95, 1.0, 0.0, 1e-8),
    (0.9, 0.1, 0.01, 1e-8),
    (0.3, 1.0, 0.1, 0.0),
    (0.0, 0.05, 1e-60, 0.1),
]
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


class Part(NamedTuple):
    """Elements start..stop of a tensor are those from ``offset`` on of a parameter.

    Its layers have ``size`` elements each; ``layer`` is the first of them. ``column``: the first of its
    columns, if its second moment is factored. ``sharded``: of the sharded blocks, its first and its last one.
    """

    start: int
    stop: int
    layer: int
    offset: int = 0
    size: int = 2**40
    column: int = -1
    sharded: tuple[int, int] = (-1, -1)


SHARDED_BLOCKS = 3  # as many as there are


def shard(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    parts: Sequence[Part] | None = None,
    *,
    first: int = 0,
    scale: Tensor | None = None,
    **options: Any,
) -> Shard:
    """A shard with usual options; without ``parts`` all of the tensor is one layer.

    The moments lie where the elements do; in blocks, or if it is of another size, one part after another.
    """
    if parts is None:
        parts = [Part(0, param.numel(), 0)] if param.numel() else []
    rows, place = [], 0
    for p in parts:
        in_order = scale is not None or (exp_avg is not None and exp_avg.numel() != param.numel())
        layer = first + p.layer + p.offset // p.size
        rows.append(
            (p.start, p.stop, layer, p.offset, p.size, place if in_order else p.start, p.column, *p.sharded)
        )
        place += blocks(p) if scale is not None else p.stop - p.start
    table = torch.tensor(rows, dtype=torch.int64).view(-1, 9)
    usual = {"norm_type": 2, "group": 0, "decays": True, "reg_inside_moment": True}
    return Shard(param, grad, exp_avg, scale, table, **{**usual, "stochastic_rounding": False, **options})


def blocks(part: Part) -> int:
    """How many blocks of the moment a part lies in."""
    return (part.offset + part.stop - part.start - 1) // BLOCK - part.offset // BLOCK + 1


def moment(
    form: str | None,
    parts: Sequence[Part],
    numel: int,
    generator: torch.Generator,
    offset: int,
    special: float,
) -> tuple[Tensor | None, Tensor | None]:
    """A first moment in a format, with its scales. "small": float32 of the parts only."""
    if form is None:
        return None, None
    if form == "small":
        return values((sum(p.stop - p.start for p in parts),), torch.float32, generator), None
    dtype = FORMATS[form].dtype
    if not FORMATS[form].largest:
        return values((numel,), dtype, generator, offset, special), None
    count = sum(map(blocks, parts))
    codes = torch.randint(-FORMATS[form].largest, 128, (count, BLOCK), generator=generator)
    codes = codes.clamp(max=FORMATS[form].largest).to(torch.int8)
    if form == "int4":
        low, high = codes.view(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
        codes = (low & 15) | (high << 4)
    return codes, values((count,), torch.bfloat16, generator, special=special).abs()


@st.composite
def steps(draw: Any, sizes: Sequence[int], tensors: int) -> tuple[list[Shard], tuple[int, int], Coefficients]:
    """Shards of every format over common layers, some of them factored, with padding; the numbers of layers
    and of columns; coefficients.

    Args:
        draw: hypothesis's.
        sizes: elements of a layer, and of the gaps between parts.
        tensors: at most so many.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    special = draw(st.sampled_from([0.0, 0.0, 0.05, 1.0]))
    norm_types = draw(st.lists(st.sampled_from([2, 0]), min_size=1, max_size=tensors))
    pieces: list[list[Part]] = [[] for _ in norm_types]
    first = columns = 0
    for _ in range(draw(st.integers(0, 4))):
        # A parameter: its layers, sharded anywhere, parts of it in any tensor of one norm type, or elsewhere.
        size, layers = draw(st.sampled_from(sizes)), draw(st.sampled_from([1, 1, 1, 2, 5]))
        norm_type = draw(st.sampled_from(norm_types))
        factored = norm_type == 2 and draw(st.booleans())
        own = [t for t, n in enumerate(norm_types) if n == norm_type]
        bounds = [0, *draw(st.lists(st.integers(0, size * layers), max_size=3)), size * layers]
        bounds.sort()
        for a, b in itertools.pairwise(bounds):
            if a < b and draw(st.integers(0, 4)):
                tensor = pieces[draw(st.sampled_from(own))]
                start = (tensor[-1].stop if tensor else 0) + draw(st.sampled_from([0, 0, 1, 7]))
                tensor.append(Part(start, start + b - a, first, a, size, columns if factored else -1))
        first += layers
        columns += size if factored else 0
    shards = []
    for parts, norm_type in zip(pieces, norm_types, strict=True):
        numel = (parts[-1].stop if parts else 0) + draw(st.sampled_from([0, 1, 5]))
        param, grad = (
            values(
                (numel,),
                draw(st.sampled_from(DTYPES)),
                generator,
                draw(st.sampled_from([0, 0, 1, 8, 3])),
                special,
            )
            for _ in range(2)
        )
        form = draw(st.sampled_from([None, "small", *FORMATS]))
        exp_avg, scale = moment(
            form, parts, numel, generator, draw(st.sampled_from([0, 0, 1, 8, 3])), special
        )
        if scale is not None:
            parts = [p._replace(sharded=draw_sharding(draw, p)) for p in parts]
        options = {
            "norm_type": norm_type,
            "group": draw(st.integers(0, len(OPTIONS) - 1)),
            "decays": draw(st.booleans()),
            "reg_inside_moment": draw(st.booleans()),
            "stochastic_rounding": draw(st.booleans()),
            "nesterov": exp_avg is not None and draw(st.booleans()),
        }
        shards.append(shard(param, grad, exp_avg, parts, scale=scale, **options))
    return shards, (first, columns), random_coefficients(first, generator, columns)


def draw_sharding(draw: Any, part: Part) -> tuple[int, int]:
    """Which sharded blocks a part begins and ends in. Parts may be of the same: of another rank, or run."""
    first, last = draw(st.tuples(*[st.sampled_from([-1, -1, *range(SHARDED_BLOCKS)])] * 2))
    return (first, first if blocks(part) == 1 else last)


def random_coefficients(layers: int, generator: torch.Generator, columns: int = 0) -> Coefficients:
    """Of all layers other ones, with the rows of OPTIONS."""
    number = lambda *shape: torch.rand(shape, generator=generator)  # noqa: E731
    key = torch.randint(-(2**31), 2**31, (layers,), generator=generator).int()
    of_columns = number(columns)
    of_columns[number(columns) < 0.1] = 0
    each = number(layers, 4) * torch.tensor([100.0, 1.0, 1.0, 1.0])
    return Coefficients(each, torch.tensor(OPTIONS), number(layers) > 0.2, key, number(layers), of_columns)


def uniform(
    layers: int, step_size: float = 1.0, options: tuple[float, ...] = OPTIONS[0], device: torch.device = CPU
) -> Coefficients:
    """The same of all layers: but for the step size ones, and the key 0."""
    each = torch.tensor([1.0, step_size, 1.0, 1.0], device=device).repeat(layers, 1)
    active = torch.ones(layers, dtype=torch.bool, device=device)
    return Coefficients(each, torch.tensor([options], device=device), active, active.int())


def whole(tensor: Tensor) -> Tensor:
    """All of the memory that a tensor is a view of."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def copied(shards: Sequence[Shard], device: torch.device) -> list[Shard]:
    """The same on a device, with all of the memory that the tensors are views of."""

    def copy(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        return whole(t).to(device, copy=True).as_strided(t.shape, t.stride(), t.storage_offset())

    names = ("param", "grad", "exp_avg", "exp_avg_scale")
    return [replace(s, **{name: copy(getattr(s, name)) for name in names}) for s in shards]


def bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor; of NaN only that it is one (torch writes different ones with vector code)."""
    tensor = tensor.cpu().contiguous()
    return torch.where(
        tensor.isnan(), -1, tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])
    )


def assert_same_bits(shards: Sequence[Shard], expected: Sequence[Shard]) -> None:
    """Of the whole memory, so that a write beside the fragments shows."""
    for shard, other in zip(shards, expected, strict=True):
        for mine, its in zip(shard.tensors, other.tensors, strict=True):
            assert torch.equal(bits(whole(mine)), bits(whole(its)))


def assert_same_statistic(statistic: Tensor, shards: Sequence[Shard], layers: int, columns: int = 0) -> None:
    expected = reference.sum_of_squares(shards, CPU, VectorSizes(layers, columns))
    assert (statistic.dtype, statistic.shape) == (torch.float64, (layers + columns,))
    numel, largest = (torch.zeros(layers + columns, dtype=t) for t in (torch.float64, torch.bool))
    for s in shards:
        for start, stop, layer, position, size, _, column, *_ in s.pieces.tolist():
            rows = (position % size + stop - start - 1) // size + 1
            touched = slice(layer, layer + rows)
            numel[touched] += min(stop - start, size)
            largest[touched] = s.norm_type == 0
            if column >= 0:
                numel[layers + column : layers + column + size] += rows
    bound = torch.where(largest, 0.0, numel * 2.0**-52) * expected
    difference = (statistic.cpu() - expected).abs()
    same = (statistic.cpu() == expected) | (statistic.cpu().isnan() & expected.isnan())
    assert (same | (difference <= bound)).all(), (statistic, expected)


def assert_as_reference(
    module: ModuleType,
    shards: Sequence[Shard],
    counts: int | tuple[int, int],
    coefficients: Coefficients,
    device: torch.device = CPU,
) -> None:
    """What ``module.Kernels`` does, of which only the update changes anything; ``shards`` are on the CPU.

    ``counts``: of layers, and of columns if there are any.
    """
    mine, expected = copied(shards, device), copied(shards, CPU)
    layers, columns = counts if isinstance(counts, tuple) else (counts, 0)
    kernels = module.Kernels(mine, device, VectorSizes(layers, columns, SHARDED_BLOCKS))
    assert_same_statistic(kernels.sum_of_squares(), shards, layers, columns)
    largest = reference.largest(expected, coefficients, SHARDED_BLOCKS)
    infinity = 0x7F800000  # of a NaN only that it is above that
    found = kernels.largest(coefficients.to(device)).cpu()
    assert torch.equal(found.clamp(max=infinity), largest.clamp(max=infinity))
    assert_same_bits(mine, shards)
    coefficients = replace(coefficients, sharded=torch.maximum(largest, of_others(layers)))
    reference.update(expected, coefficients)
    kernels.update(coefficients.to(device))
    assert_same_bits(mine, expected)


def of_others(seed: int) -> Tensor:
    """What other ranks have found of the sharded blocks."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(6, (SHARDED_BLOCKS,), generator=generator)
    magnitudes = torch.tensor([0.0, 0.0, 1e-40, 1e-3, 1e3, torch.nan])[chosen].view(torch.int32)
    return torch.stack((magnitudes, torch.randint(2, (SHARDED_BLOCKS,), generator=generator).int()))


def assert_follows_gradients(module: ModuleType, shards: Sequence[Shard], device: torch.device = CPU) -> None:
    """After ``move_gradients`` the tables are those of gradients at other addresses."""
    mine = copied(shards, device)
    layers = 1 + max(int(s.pieces[:, 2].max()) for s in mine if len(s.pieces))
    kernels = module.Kernels(
        [replace(s, grad=torch.zeros_like(s.grad)) for s in mine], device, VectorSizes(layers)
    )
    kernels.move_gradients([s.grad.data_ptr() for s in mine])
    coefficients = random_coefficients(layers, torch.Generator().manual_seed(0))
    expected = copied(shards, CPU)
    assert_same_statistic(kernels.sum_of_squares(), shards, layers)
    reference.update(expected, coefficients)
    kernels.update(coefficients.to(device))
    assert_same_bits(mine, expected)
