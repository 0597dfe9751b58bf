"""Sums of squares in three words of float32 are as exact as in float64, whatever the numbers."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from against_reference import CPU, Part, shard

pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl

from novoscale.kernels.interface import VectorSizes
from novoscale.kernels.reference import elements as reference
from novoscale.kernels.triton import elements as kernels
from novoscale.kernels.triton import exact_sums
from novoscale.kernels.triton import factored as triton_factored
from novoscale.kernels.triton import statistic as triton_statistic
from novoscale.kernels.triton.formats import jit

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SMALLEST, LARGEST = 2.0**-149, torch.finfo(torch.float32).max


@pytest.fixture(autouse=True)
def in_words(monkeypatch):
    """As on a chip with little float64, and with small tiles: the interpreter adds lane by lane."""
    monkeypatch.setattr(kernels, "little_float64", lambda device: True)
    monkeypatch.setattr(kernels, "CHUNK", 512)
    monkeypatch.setattr(kernels, "TILE", 256)


@pytest.fixture
def never_in_float64(monkeypatch):
    """Nothing is made anew; not to be known of compiled code."""
    if CUDA:
        return

    def fail(*arguments):
        raise AssertionError("made anew in float64")

    monkeypatch.setattr(triton_statistic, "_reduce_chunk", fail)
    monkeypatch.setattr(triton_statistic, "_reduce_rows", fail)
    monkeypatch.setattr(triton_factored, "_strip_in_float64", fail)


def generated(numel, kind):
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(numel, generator=generator)
    exponent = torch.randint(-40, 40, (numel,), generator=generator)
    return {
        "normal": normal,
        "of all magnitudes": normal * torch.exp2(exponent.float()),
        "with some tiny": torch.where(exponent < 0, normal * 1e-30, normal),
        "tiny": normal * 1e-20,  # their squares are subnormal
        "the tiniest": (normal * 3).round() * SMALLEST,
        "huge": normal / normal.abs().max() * LARGEST,
        "large": normal * 2.0**62,  # single squares are in the range, and their sums are not
        "zeros": normal * 0,
        "zeros but one": torch.where(torch.arange(numel) == 3, SMALLEST, 0.0),
    }[kind]


EXTREME = ["of all magnitudes", "with some tiny", "tiny", "the tiniest", "huge", "large", "zeros but one"]
PLACES = {
    "chunks": ([Part(0, 650, 0)], 1, 0),
    "rows": ([Part(0, 650, 0, 0, 26)], 25, 0),
    "wide rows": ([Part(0, 650, 0, 0, 325)], 2, 0),
    "factored": ([Part(0, 650, 0, 0, 26, 0)], 25, 26),
}


def sums(grad, place):
    """By words, and by the reference."""
    parts, layers, columns = PLACES[place]
    (mine, expected) = (
        [shard(torch.zeros_like(grad, device=d), grad.to(d), None, parts)] for d in (DEVICE, CPU)
    )
    found = kernels.Kernels(mine, DEVICE, VectorSizes(layers, columns)).sum_of_squares().cpu()
    return found, reference.sum_of_squares(expected, CPU, VectorSizes(layers, columns))


def exact(grad, place):
    """The sums as fractions."""
    parts, _, columns = PLACES[place]
    squares = [Fraction(x) ** 2 for x in grad.double().tolist()]
    width = parts[0].size or len(squares)
    rows = [sum(squares[i : i + width]) for i in range(0, len(squares), width)]
    return rows + [sum(squares[i::columns]) for i in range(columns)]


def assert_as_exact(grad, place):
    found, expected = sums(grad, place)
    assert torch.allclose(found, expected, rtol=2.0**-48, atol=0)
    for sum_, right in zip(found.tolist(), exact(grad, place), strict=True):
        assert abs(Fraction(sum_) - right) <= right * Fraction(1, 2**50)


@pytest.mark.parametrize(
    ("place", "dtype"),
    [*((place, torch.float32) for place in PLACES), ("chunks", torch.bfloat16), ("factored", torch.float16)],
    ids=str,
)
def test_ordinary_numbers_need_no_float64(never_in_float64, place, dtype):
    assert_as_exact(generated(650, "normal").to(dtype), place)


@pytest.mark.parametrize("place", ["chunks", "wide rows"])
@pytest.mark.parametrize("kind", ["of all magnitudes", "with some tiny"])
def test_sums_of_numbers_far_apart_need_no_float64(never_in_float64, kind, place):
    assert_as_exact(generated(650, kind), place)


@pytest.mark.parametrize("place", PLACES)
def test_zeros_need_no_float64(never_in_float64, place):
    """As in the gradients of embeddings, most rows of which are not in a batch."""
    found, _ = sums(generated(650, "zeros"), place)
    assert found.count_nonzero() == 0


@pytest.mark.parametrize("kind", EXTREME)
@pytest.mark.parametrize("place", PLACES)
def test_sums_of_extreme_numbers(place, kind):
    assert_as_exact(generated(650, kind), place)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("place", PLACES)
def test_nan_and_infinity_stay_what_they_are(place, value):
    grad = generated(650, "normal")
    grad[577] = value
    found, expected = sums(grad, place)
    assert torch.allclose(found, expected, rtol=2.0**-48, atol=0, equal_nan=True)
    assert found.isnan().equal(expected.isnan())


def test_the_words_of_a_sum_lose_nothing():
    """One lane adds numbers of which each is far below the last digit of the sum so far."""

    @jit
    def add_one_by_one(numbers, result, many):
        high = tl.zeros([1], tl.float32)
        middle, low = high, high
        for i in range(many):
            value = tl.load(numbers + i + tl.arange(0, 1))
            product, rest, least = exact_sums.square(value)
            high, middle, low = exact_sums.add(high, middle, low, product, rest, least)
        found, wrong = exact_sums.total(high, middle, low, 0)
        tl.store(result, found)
        tl.store(result + 1, wrong.to(tl.float64))

    numbers = torch.rand(400, generator=torch.Generator().manual_seed(0)).mul_(1e-6).add_(1e-9)
    numbers[0] = 1.0
    result = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    add_one_by_one[(1,)](numbers.to(DEVICE), result, len(numbers), **kernels.LAUNCH)
    right = sum(Fraction(x) ** 2 for x in numbers.tolist())
    assert abs(Fraction(result[0].item()) - right) <= right * Fraction(1, 2**53)
    assert result[1] == 0


@pytest.mark.skipif(CUDA, reason="of the interpreter")
def test_the_interpreter_rounds_a_fused_multiply_add_once():
    """Else these tests would say nothing of the compiled code."""

    @jit
    def rest(value, result):
        x = tl.load(value)
        tl.store(result, tl.fma(x, x, -(x * x)))

    value, result = torch.tensor([1 + 2.0**-23]), torch.zeros(1)
    rest[(1,)](value, result)
    assert result.item() == float(np.float64(value.item()) ** 2 - np.float32(value.item()) ** 2)
    assert result.item() == 2.0**-46


@pytest.mark.parametrize(
    ("capability", "little"),
    [((8, 0), False), ((9, 0), False), ((10, 0), False), ((8, 6), True), ((8, 9), True), ((10, 3), True),
     ((12, 0), True), ((7, 5), True)],
)  # fmt: skip
def test_the_capability_decides(monkeypatch, capability, little):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert kernels.little_float64(torch.device("cuda", 0)) == little
    assert not kernels.little_float64(CPU)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not kernels.little_float64(torch.device("cuda", 0))
