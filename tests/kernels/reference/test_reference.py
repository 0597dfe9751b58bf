"""The definition: every element once, in tiles, for any strides, in bounded memory."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from against_reference import (
    CPU,
    SHARDED_BLOCKS,
    Part,
    assert_same_statistic,
    bits,
    copied,
    moment,
    shard,
    steps,
    uniform,
)
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from novoscale.kernels.interface import VectorSizes
from novoscale.kernels.reference import elements as reference


@st.composite
def strided(draw):
    """A tensor of any strides and a range of its row-major elements."""
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    permutation = draw(st.permutations(range(len(shape))))
    base = torch.arange(torch.Size(shape).numel() * 2).view(*[shape[i] for i in permutation], 2)[..., 0]
    inverse = [permutation.index(i) for i in range(len(shape))]
    tensor = base.permute(inverse)
    start = draw(st.integers(0, tensor.numel() - 1))
    return tensor, start, draw(st.integers(start + 1, tensor.numel()))


@settings(max_examples=200, deadline=None)
@given(strided())
def test_elements_of_a_range_are_read_and_written_in_order(case):
    tensor, start, stop = case
    before = tensor.reshape(-1).clone()
    found = reference._read(tensor, start, stop)
    assert torch.equal(found, before[start:stop])
    active = torch.arange(stop - start) % 3 > 0
    reference._write(tensor, start, stop, found + 1000, active)
    before[start:stop] += 1000 * active
    assert torch.equal(tensor.reshape(-1), before)


def test_ranges_of_a_large_strided_tensor_are_few_views():
    tensor = torch.empty(1000, 1000).t()
    assert len(list(reference._views(tensor, 1500, 700_300))) == 3


@settings(max_examples=100, deadline=None)
@given(steps([1, 5, 60, 128, 200], tensors=3), st.integers(0, 3))
def test_strides_and_tiles_do_not_matter(case, seed):
    shards, counts, coefficients = case
    plain, strided = copied(shards, CPU), []
    expected = reference.largest(plain, coefficients, SHARDED_BLOCKS)
    for s in copied(shards, CPU):  # every second element of a tensor twice as long
        spread = lambda t: torch.stack((t, t), dim=-1)[..., 0]  # noqa: E731
        elementwise = s.exp_avg is not None and s.exp_avg.shape == s.param.shape
        moved = {"exp_avg": spread(s.exp_avg)} if elementwise else {}
        strided.append(replace(s, param=spread(s.param), grad=spread(s.grad), **moved))
    reference.update(plain, replace(coefficients, sharded=expected))
    original, reference.TILE = reference.TILE, 128 << seed
    try:
        statistic = reference.sum_of_squares(strided, CPU, VectorSizes(*counts))
        largest = reference.largest(strided, coefficients, SHARDED_BLOCKS)
        reference.update(strided, replace(coefficients, sharded=largest))
    finally:
        reference.TILE = original
    assert_same_statistic(statistic, shards, *counts)
    infinity = 0x7F800000  # of a NaN only that it is above that
    assert torch.equal(largest.clamp(max=infinity), expected.clamp(max=infinity))
    for mine, other in zip(strided, plain, strict=True):
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(mine.tensors, other.tensors, strict=True))


class LargestAllocation(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.bytes = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for t in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(t, torch.Tensor):
                self.known.add(t.untyped_storage().data_ptr())
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("size", [3_000_000, 2000])
@pytest.mark.parametrize("shape", [(3_000_000,), (1500, 2000)])
def test_no_transient_grows_with_the_tensor(form, size, shape):
    make = lambda: torch.ones(shape) if len(shape) == 1 else torch.ones(shape[::-1]).t()  # noqa: E731
    parts = [Part(0, 3_000_000, 0, 0, size)]
    exp_avg, scale = moment(form, parts, 3_000_000, torch.Generator(), 0, 0.0)
    s = shard(make(), make(), exp_avg, parts, scale=scale)
    layers = 3_000_000 // size
    coefficients = uniform(layers)
    with LargestAllocation() as largest:
        reference.sum_of_squares([s], CPU, VectorSizes(layers))
        reference.update([s], coefficients)
    assert 0 < largest.bytes <= 8 * reference.TILE


def test_elements_in_no_piece_are_neither_read_nor_changed():
    p, g, m = torch.ones(10), torch.ones(10), torch.ones(10)
    for t in (p, g, m):
        t[3:5] = float("nan")
        t[8:] = 1e30
    s = shard(p, g, m, [Part(0, 3, 0), Part(5, 8, 1)])
    assert reference.sum_of_squares([s], CPU, VectorSizes(2)).tolist() == [3.0, 3.0]
    reference.update([s], replace(uniform(2), active=torch.tensor([True, False])))
    assert torch.isnan(p[3:5]).all()
    assert torch.equal(p[8:], torch.full((2,), 1e30))
    assert torch.equal(p[5:8], torch.ones(3))
    assert torch.allclose(p[:3], torch.full((3,), 1 - (0.9 + 1.1)))


def test_sum_of_squares_is_exact_where_float32_would_overflow_or_round():
    g = torch.tensor([3e38, 1.0, 1e-30], dtype=torch.bfloat16)
    s = shard(g, g, None)
    assert reference.sum_of_squares([s], CPU, VectorSizes(1)).item() == g[0].double().item() ** 2
