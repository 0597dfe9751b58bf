"""Rounding is unbiased, in every format, and a momentum that gets nothing new decays to zero."""

from unittest import mock

import pytest
import torch
from torch import nn

from novoscale import NovoGrad
from novoscale.sharding import blocks
from novoscale.state import formats, momentum, rounding

REPEATS = 4000
BLOCKED = [formats.FORMATS[name] for name in ("int8", "int4")]


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
    codes, scale = formats.encode(repeated, bits(REPEATS, blocks.BLOCK) >> 16, form)
    numel = REPEATS * blocks.BLOCK
    rounded = momentum.read(codes, scale, 0, 0, numel).view(REPEATS, -1)
    spacing = scale[0].item()
    assert_unbiased(rounded, exact, spacing)
    assert ((rounded - exact).abs() < spacing).all()
    nearest = formats.encode(repeated, torch.full((REPEATS, blocks.BLOCK), 0x7FFF), form)
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


SAMPLES = 1 << 14


def whole_numbers(bits, seed):
    return torch.randint(1 << bits, (SAMPLES,), generator=torch.Generator().manual_seed(seed))


def hashed(seed=7, number=None, step=None, position=None):
    """Random bits of samples, each of other whole numbers where none are given."""
    number = whole_numbers(16, 1) if number is None else number
    step = whole_numbers(20, 2) if step is None else step
    position = whole_numbers(34, 3) if position is None else position
    return rounding.random_bits(rounding.keys(seed, number, step), position)


def each_bit(x):
    """Float64 ``[samples, 32]`` of -1 and 1."""
    return 2.0 * (x[:, None] >> torch.arange(32) & 1) - 1


@pytest.mark.parametrize(
    ("argument", "numbers"),
    [("position", whole_numbers(34, 3)), ("step", whole_numbers(20, 2)), ("number", whole_numbers(16, 1))],
    ids=["position", "step", "parameter"],
)
def test_each_bit_of_what_is_hashed_turns_each_random_bit_over_half_of_the_time(argument, numbers):
    before = hashed(**{argument: numbers})
    for bit in range(int(numbers.max()).bit_length()):
        turned = each_bit(before ^ hashed(**{argument: numbers ^ 1 << bit})).mean(dim=0)
        assert turned.abs().max() < 5.5 / SAMPLES**0.5, bit


def test_another_seed_is_another_sequence():
    assert each_bit(hashed(7) ^ hashed(8)).mean(dim=0).abs().max() < 5 / SAMPLES**0.5


@pytest.mark.parametrize("key", ["each its own", "one"])
@pytest.mark.parametrize("apart", [1, 2, 3, 5, 8, 32, 128, 768, 987, 4096, 11008, 1 << 20, 1 << 26, 1 << 32])
def test_no_random_bit_knows_one_of_another_element(apart, key):
    at = torch.arange(SAMPLES)
    names = {} if key == "each its own" else {"number": at * 0, "step": at * 0 + 9}
    one, other = (each_bit(hashed(position=at + off, **names)) for off in (0, apart))
    assert (one.T @ other / SAMPLES**0.5).abs().max() < 5.5  # of 1,024 pairs of bits
    assert (one.T @ one - SAMPLES * torch.eye(32)).abs().max() / SAMPLES**0.5 < 5.5


def too_uneven(x, y):
    """By how many standard deviations pairs of values of four bits are not equally frequent."""
    counts = torch.bincount((x & 15) * 16 + (y & 15), minlength=256).double()
    expected = len(x) / 256
    return abs(((counts - expected) ** 2 / expected).sum().item() - 255) / 510**0.5


@pytest.mark.parametrize("apart", [0, 1, 2, 8, 128, 987, 4096])
@pytest.mark.parametrize("by", ["element", "step"])
def test_pairs_of_random_numbers_are_equally_frequent(by, apart):
    """Of the halves, which round weights and moments, and in their uppermost and lowest bits."""
    at = torch.arange(1 << 19)
    names = {"number": at * 0, "step": at * 0 + 5, "position": at * 0 + 11}
    x = hashed(**names | {"position" if by == "element" else "step": at})
    shifts = {"weight, lowest": 0, "weight, uppermost": 12, "moment, lowest": 16, "moment, uppermost": 28}
    values = {name: x >> shift for name, shift in shifts.items()}
    for one in values:
        for other in values:
            if apart or one < other:
                pairs = values[one][: len(at) - apart], values[other][apart:]
                assert too_uneven(*pairs) < 5, (one, other)


def test_sums_of_random_numbers_vary_as_those_of_independent_ones():
    """Over a block, and over the steps of an element."""
    table = bits(1024, 1024)
    for half in (table & 0xFFFF, table >> 16):
        uniform = (half.double() + 0.5) / 65536 - 0.5
        for sums in (uniform.view(1024, 8, 128).sum(dim=2), uniform.view(8, 128, 1024).sum(dim=1)):
            # The variance of n independent variances' mean is 2 / n.
            assert sums.square().mean().item() * 12 / 128 == pytest.approx(
                1, abs=5 * (2 / sums.numel()) ** 0.5
            )


def decayed(momentum_dtype, beta1, steps):
    """First moments of which one element alone gets gradients, over those that they had."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(64, 128))
    optimizer = NovoGrad(
        [p], lr=0.0, betas=(beta1, 0.9), momentum_dtype=momentum_dtype, fused=False, preset="paper"
    )
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


@pytest.mark.parametrize("momentum_dtype", formats.FORMATS)
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
        optimizer = NovoGrad(
            [p], lr=1e-4, betas=(0.0, 0.0), normalize="rms", stochastic_rounding=stochastic, preset="paper"
        )
        p.grad = torch.ones_like(p)
        for _ in range(100):
            optimizer.step()
        means[stochastic] = p.float().mean().item()
    assert means[True] == pytest.approx(0.99, abs=1e-3)
    assert means[False] == 1.0
