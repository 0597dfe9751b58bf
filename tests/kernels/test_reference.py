"""The definition: every element once, in tiles, for any strides, in bounded memory."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from novoscale import kernels
from novoscale.kernels import reference
from novoscale.layout import Segment


@st.composite
def strided(draw):
    """A tensor of any strides and a range of its row-major elements."""
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    permutation = draw(st.permutations(range(len(shape))))
    base = torch.arange(torch.Size(shape).numel() * 2).view(*[shape[i] for i in permutation], 2)[..., 0]
    inverse = [permutation.index(i) for i in range(len(shape))]
    tensor = base.permute(inverse)
    bounds = sorted(draw(st.lists(st.integers(0, tensor.numel()), min_size=2, max_size=2)))
    return tensor, *bounds


@settings(max_examples=200, deadline=None)
@given(strided(), st.integers(1, 20))
def test_tiles_are_the_elements_of_the_range_in_order(case, tile):
    tensor, start, stop = case
    other = tensor.contiguous()
    original, reference.TILE = reference.TILE, tile
    try:
        tiles = list(reference._tiles((tensor, other), start, stop))
    finally:
        reference.TILE = original
    assert all(a.shape == b.shape and torch.equal(a, b) and a.numel() <= tile for a, b in tiles)
    found = torch.cat([a.reshape(-1) for a, _ in tiles]) if tiles else torch.empty(0, dtype=tensor.dtype)
    assert torch.equal(found, tensor.reshape(-1)[start:stop])
    assert all(a.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for a, _ in tiles)


def test_tiles_of_a_large_strided_tensor_are_few():
    tensor = torch.empty(1000, 1000).t()
    assert len(list(reference._tiles((tensor,), 0, tensor.numel()))) == 1000 // (reference.TILE // 1000) + 1


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3_000_000,), (1500, 2000)])
def test_no_transient_grows_with_the_tensor(dtype, shape):
    make = lambda: torch.ones(shape).to(dtype) if len(shape) == 1 else torch.ones(shape[::-1]).to(dtype).t()  # noqa: E731
    shard = kernels.Shard(make(), make(), make(), (Segment(0, 3_000_000, 0),), 0, 2, 0.9, 0.1, 0.1, True)
    one = torch.ones(1, dtype=torch.float64)
    coefficients = kernels.Coefficients(one, one, one, one > 0)
    with LargestAllocation() as largest:
        reference.sum_of_squares([shard], torch.device("cpu"), 1)
        reference.update([shard], coefficients)
    assert 0 < largest.bytes <= 8 * reference.TILE


def test_elements_in_no_segment_are_neither_read_nor_changed():
    p, g, m = torch.ones(10), torch.ones(10), torch.ones(10)
    for t in (p, g, m):
        t[3:5] = float("nan")
        t[8:] = 1e30
    shard = kernels.Shard(p, g, m, (Segment(0, 3, 0), Segment(5, 8, 1)), 0, 2, 0.9, 1.0, 0.1, True)
    assert reference.sum_of_squares([shard], torch.device("cpu"), 2).tolist() == [3.0, 3.0]
    ones = torch.ones(2, dtype=torch.float64)
    reference.update([shard], kernels.Coefficients(ones, ones, ones, torch.tensor([True, False])))
    assert torch.isnan(p[3:5]).all()
    assert torch.equal(p[8:], torch.full((2,), 1e30))
    assert torch.equal(p[5:8], torch.ones(3))
    assert torch.allclose(p[:3], torch.full((3,), 1 - (0.9 + 1.1)))


def test_sum_of_squares_is_exact_where_float32_would_overflow_or_round():
    g = torch.tensor([3e38, 1.0, 1e-30], dtype=torch.bfloat16)
    shard = kernels.Shard(g, g, None, (Segment(0, 3, 0),), 0, 2, 0.0, 1.0, 0.0, True)
    assert reference.sum_of_squares([shard], torch.device("cpu"), 1).item() == g[0].double().item() ** 2
