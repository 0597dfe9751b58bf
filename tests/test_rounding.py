"""Rounding is unbiased, in every format, and a momentum that gets nothing new decays to zero."""

from unittest import mock

import pytest
import torch
from torch import nn

from novoscale import NovoGrad, blocks, momentum, rounding

REPEATS = 4000
BLOCKED = [momentum.FORMATS[name] for name in ("int8", "int4")]


def bits(repeats, elements):
    """For each repeat those of another step."""
    key = rounding.keys(7, torch.full((repeats,), 3), torch.arange(repeats))
    return rounding.random_bits(key[:, None], torch.arange(elements)[None])


def deterministic(key, position):
    """In place of the random bits: what rounds to the nearest."""
    return torch.full(torch.broadcast_shapes(key.shape, position.shape), 0x7FFF7FFF)


def values():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(blocks.BLOCK, generator=generator) * torch.logspace(-4, 0, blocks.BLOCK)


def assert_unbiased(rounded, exact, spacing):
    # The error of one rounding is below the spacing; a mean of n is off by 5 * spacing / sqrt(4 n) once in a
    # million.
    off = (rounded.double().mean(dim=0) - exact.double()).abs()
    assert (off <= 2.5 * spacing / REPEATS**0.5).all(), (off / spacing).max()


@pytest.mark.parametrize("form", BLOCKED, ids=lambda f: f.name)
def test_the_mean_of_many_roundings_to_codes_is_the_value(form):
    exact = values()
    repeated = exact.expand(REPEATS, -1)
    codes, scale = momentum.encode(repeated, bits(REPEATS, blocks.BLOCK) >> 16, form)
    numel = REPEATS * blocks.BLOCK
    rounded = momentum.read(codes, scale, 0, 0, numel).view(REPEATS, -1)
    spacing = scale[0].item()
    assert_unbiased(rounded, exact, spacing)
    assert ((rounded - exact).abs() < spacing).all()
    nearest = momentum.encode(repeated, torch.full((REPEATS, blocks.BLOCK), 0x7FFF), form)
    with pytest.raises(AssertionError):
        assert_unbiased(momentum.read(*nearest, 0, 0, numel).view(REPEATS, -1), exact, spacing)


@pytest.mark.parametrize("shift", [0, 16], ids=["weights", "momenta"])
def test_the_mean_of_many_roundings_to_bfloat16_is_the_value(shift):
    exact = values()
    rounded = rounding.to_bfloat16(exact.expand(REPEATS, -1).contiguous(), bits(REPEATS, len(exact)) >> shift)
    spacing = torch.exp2(exact.abs().log2().floor() - 7)
    assert_unbiased(rounded, exact, spacing)
    with pytest.raises(AssertionError):
        assert_unbiased(exact.bfloat16().expand(REPEATS, -1), exact, spacing)


def test_random_bits_of_elements_steps_and_halves_are_not_related():
    table = bits(500, 500)
    for other in (table.roll(1, 0), table.roll(1, 1), table.roll((1, -1), (0, 1))):
        differing = sum(((table ^ other) >> bit & 1).double().mean() for bit in range(32))
        assert differing == pytest.approx(16, abs=0.1)
    low, high = ((table & 0xFFFF).double() - 32767.5, (table >> 16).double() - 32767.5)
    assert abs((low * high).mean() / 32768**2) < 0.01


def decayed(momentum_dtype, beta1, steps):
    """First moments of which one element alone gets gradients, over those that they had."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(64, 128))
    optimizer = NovoGrad([p], lr=0.0, betas=(beta1, 0.9), momentum_dtype=momentum_dtype, fused=False)
    p.grad = torch.randn_like(p)
    optimizer.step()
    read = lambda: momentum.read(  # noqa: E731
        *(optimizer.state[p].get(key) for key in ("exp_avg", "exp_avg_scale")), 0, 0, p.numel()
    ).double()
    before = read().clone()
    p.grad.zero_()
    p.grad.view(-1)[:: blocks.BLOCK] = 1.0  # keeps the scale of every block up
    for _ in range(steps):
        optimizer.step()
    rest = torch.arange(p.numel()) % blocks.BLOCK != 0
    return read()[rest], before[rest]


@pytest.mark.parametrize("momentum_dtype", momentum.FORMATS)
def test_a_momentum_without_gradient_decays_to_zero(momentum_dtype):
    after, before = decayed(momentum_dtype, 0.9, 300)
    assert before.abs().max() > 0
    assert after.abs().max() < 1e-12 * before.abs().max()


@pytest.mark.parametrize("momentum_dtype", ["int8", "int4"])
def test_rounded_to_the_nearest_it_would_not(momentum_dtype):
    with mock.patch.object(rounding, "random_bits", deterministic):
        after, before = decayed(momentum_dtype, 0.9, 300)
    assert after.abs().max() > 1e-3 * before.abs().max()


def test_a_slow_decay_is_as_fast_in_bfloat16_as_in_float32():
    after, before = decayed("bfloat16", 0.999, 300)
    assert (after / before).mean().item() == pytest.approx(0.999**300, rel=0.02)
    with mock.patch.object(rounding, "random_bits", deterministic):
        after, before = decayed("bfloat16", 0.999, 300)
    assert (after / before).mean().item() > 0.99  # none of the steps is as large as half of the spacing


def test_small_steps_of_bfloat16_weights_are_not_lost():
    means = {}
    for stochastic in (True, False):
        p = nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
        optimizer = NovoGrad([p], lr=1e-4, betas=(0.0, 0.0), normalize="rms", stochastic_rounding=stochastic)
        p.grad = torch.ones_like(p)
        for _ in range(100):
            optimizer.step()
        means[stochastic] = p.float().mean().item()
    assert means[True] == pytest.approx(0.99, abs=1e-3)
    assert means[False] == 1.0
