"""Orthogonal factors: those of the oracle, for any shape, rank and spread of singular values."""

import numpy as np
import pytest
import torch
from oracle import orthogonal as expected

from novoscale.kernels import newton_schulz
from novoscale.kernels.newton_schulz import flops, orthogonal

SHAPES = [(64, 64), (64, 256), (256, 64), (128, 129), (3, 700), (2, 2)]


def matrix(shape, kind, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    made = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, s, v = torch.linalg.svd(made, full_matrices=False)
    if kind == "spread":
        s = torch.logspace(0, -6, len(s), dtype=torch.float64)
    elif kind == "low rank":
        s[max(1, len(s) // 8) :] = 0
    return (u @ torch.diag(s) @ v).to(dtype)


def cosine(a, b):
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["even", "spread"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_the_direction_is_that_of_the_oracle(shape, kind, dtype, bound):
    given = matrix(shape, kind, dtype)
    found = orthogonal(given, 5)
    assert found.dtype == dtype
    assert found.shape == given.shape
    assert 1 - cosine(found.double().numpy(), expected(given.double().numpy())) < bound


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_what_five_steps_give(shape):
    s = torch.linalg.svdvals(orthogonal(matrix(shape, "even", torch.float32), 5))
    of_oracle = np.linalg.svd(expected(matrix(shape, "even").numpy()), compute_uv=False)
    np.testing.assert_allclose(s.numpy(), of_oracle, atol=1e-5)
    assert s.max() < 1.21
    if max(shape) >= 4 * min(shape):  # no singular value is small
        assert s.min() > 0.65


@pytest.mark.parametrize("shape", [(64, 256), (128, 129)])
def test_in_bfloat16_the_direction_is_the_same_to_its_digits(shape):
    given = matrix(shape, "even", torch.bfloat16)
    found = orthogonal(given, 5)
    assert found.dtype == torch.bfloat16
    assert cosine(found.double().numpy(), expected(given.double().numpy())) > 1 - 5e-4


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_the_gram_form_is_the_same_iteration(steps, monkeypatch):
    given = matrix((16, 100), "even", torch.float64)
    found = orthogonal(given, steps)
    monkeypatch.setattr(newton_schulz, "gram_is_cheaper", lambda *_: False)
    torch.testing.assert_close(orthogonal(given, steps), found, rtol=1e-9, atol=1e-9)


def test_operations_are_counted_as_the_products_that_are_made():
    """2*m*n*k for each product of [m, k] and [k, n]."""
    counted = {"gram": 0, "direct": 0}

    class Counting(torch.overrides.TorchFunctionMode):
        form = "gram"

        def __torch_function__(self, func, types, args=(), kwargs=None):
            matmul = (torch.Tensor.matmul, torch.Tensor.__matmul__)
            if func in (*matmul, torch.addmm):
                left, right = args[1:3] if func is torch.addmm else args[:2]
                counted[self.form] += 2 * left.shape[0] * left.shape[1] * right.shape[1]
            return func(*args, **(kwargs or {}))

    for form, function in (("gram", newton_schulz._by_gram), ("direct", newton_schulz._directly)):
        Counting.form = form
        with Counting():
            function(torch.randn(8, 40), 5)
    assert counted == {"gram": flops((8, 40), 5, gram=True), "direct": flops((8, 40), 5, gram=False)}
    assert counted["gram"] < counted["direct"]


def test_a_matrix_of_zeros_stays_so_and_the_scale_of_others_does_not_matter():
    assert not orthogonal(torch.zeros(4, 6), 5).any()
    given = matrix((6, 40), "even", torch.float32)
    torch.testing.assert_close(orthogonal(given * 1e-20, 5), orthogonal(given, 5), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(orthogonal(given * 1e15, 5), orthogonal(given, 5), rtol=1e-4, atol=1e-5)


def test_autocast_changes_nothing():
    given = matrix((16, 40), "even", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(orthogonal(given, 5), orthogonal(given.clone(), 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = orthogonal(given, 5)
    assert torch.equal(inside, orthogonal(given, 5))
