"""The Triton kernels give the reference's bits: on a GPU, or without one in Triton's interpreter."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from against_reference import (
    CPU,
    DTYPES,
    assert_as_reference,
    assert_follows_gradients,
    assert_same_bits,
    copied,
    cut,
    random_coefficients,
    values,
)
from hypothesis import HealthCheck, Phase, given, settings

pytest.importorskip("triton", reason="Triton is not installed")

from novoscale.kernels import Coefficients, Shard, reference
from novoscale.kernels import triton as kernels
from novoscale.layout import Segment

# NumPy says of the interpreter's arithmetic what float32 arithmetic does with infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
OPTIONS = [  # beta1, beta3, weight_decay, reg_inside_moment
    (0.95, 1.0, 0.0, True),
    (0.9, 0.1, 0.01, True),
    (0.3, 1.0, 0.1, False),
]


@pytest.fixture
def small(monkeypatch):
    """Chunks and blocks so small that small tensors have several."""
    monkeypatch.setattr(kernels, "CHUNK", 64)
    monkeypatch.setattr(kernels, "BLOCK", 16)


# ---- cases ----------------------------------------------------------------------------------------------


@st.composite
def cases(draw):
    """Shards on the CPU, the number of layers, and coefficients."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shards, first = [], 0
    for _ in range(draw(st.integers(1, 4))):
        numel = draw(st.one_of(st.sampled_from([0, 1, 64, 96, 160]), st.integers(0, 170)))
        param, grad, exp_avg = (
            values(
                (numel,), draw(st.sampled_from(dtypes)), generator, draw(st.sampled_from([0, 0, 0, 1, 8, 3]))
            )
            for dtypes in (DTYPES, DTYPES, kernels.MOMENTS)
        )
        if numel and draw(st.integers(0, 3)) == 0:
            at = draw(st.integers(0, numel - 1))
            grad[at] = draw(st.sampled_from([float("nan"), float("inf"), float("-inf"), -0.0]))
        exp_avg = exp_avg if draw(st.booleans()) else None
        bounds = draw(st.lists(st.integers(0, numel), min_size=2, max_size=5))
        segments, layers = cut(draw, sorted(bounds))
        options = draw(st.sampled_from(OPTIONS))
        norm_type = draw(st.sampled_from([2, 0]))
        shards.append(Shard(param, grad, exp_avg, segments, first, norm_type, *options))
        first += layers
    return shards, first, random_coefficients(first, generator)


# ---- both passes ----------------------------------------------------------------------------------------


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # in the interpreter, shrinking takes minutes
)
@given(case=cases())
def test_any_layout_gives_the_bits_of_the_reference(small, case):
    assert_as_reference(kernels, *case, DEVICE)


@pytest.mark.parametrize("norm_type", [2, 0])
@pytest.mark.parametrize("exp_avg", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("grad", DTYPES)
@pytest.mark.parametrize("param", DTYPES)
def test_every_mix_of_dtypes(small, param, grad, exp_avg, norm_type):
    generator = torch.Generator().manual_seed(0)
    tensors = [None if t is None else values((80,), t, generator) for t in (param, grad, exp_avg)]
    shard = Shard(*tensors, (Segment(0, 77, 0),), 0, norm_type, 0.9, 0.1, 0.01, True)
    assert_as_reference(kernels, [shard], 1, random_coefficients(1, generator), DEVICE)


@pytest.mark.parametrize("offset", [0, 1])
def test_with_chunks_and_blocks_as_they_are(offset):
    generator = torch.Generator().manual_seed(0)
    numel = 2 * kernels.CHUNK + 5 * kernels.BLOCK + 100
    segments = (Segment(0, 3, 0), Segment(35, numel - 7, 1))
    tensors = [
        values((numel,), t, generator, offset) for t in (torch.bfloat16, torch.float32, torch.bfloat16)
    ]
    assert_as_reference(
        kernels, [Shard(*tensors, segments, 0, 2, *OPTIONS[2])], 2, random_coefficients(2, generator), DEVICE
    )


def test_rounding_to_bfloat16_is_to_nearest_even(small):
    """Every sign, exponent and last kept bit, with what is cut off below, at and above the middle."""
    kept = torch.arange(0, 2**16, 1 if CUDA else 97)
    kept = torch.cat([kept, torch.tensor([0x7F7F, 0x7F80, 0x7FFF, 0xFF7F, 0xFF80, 0xFFFF])])
    bits = (kept[:, None] << 16) + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    exact = bits.flatten().to(torch.int32).view(torch.float32)
    numel = len(exact)
    # w - 1 * m with m = 1 * g and w = 0: the weight becomes -g.
    shard = Shard(
        torch.zeros(numel, dtype=torch.bfloat16),
        exact,
        None,
        (Segment(0, numel, 0),),
        0,
        2,
        0.0,
        1.0,
        0.0,
        True,
    )
    one = torch.ones(1, dtype=torch.float64, device=DEVICE)
    mine = copied([shard], DEVICE)
    kernels.Kernels(mine, DEVICE, 1).update(Coefficients(one, one, one, one > 0))
    result, expected = mine[0].param.cpu(), (0 - exact).bfloat16()
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result[~result.isnan()], expected[~result.isnan()])


def test_chunks_are_aligned_where_the_tensor_is_and_the_segment_is_not(small):
    shard = shard_like(
        torch.ones(300, device=DEVICE), torch.ones(300, device=DEVICE), None, (Segment(83, 250, 0),)
    )
    rows = kernels.Kernels([shard], DEVICE, 1)._table.cpu()
    columns = (kernels._BEGIN.value, kernels._END.value)
    assert rows[:, columns].tolist() == [[3, 48], [0, 64], [0, 58]]
    addresses = rows[:, (kernels._PARAM.value, kernels._GRAD.value)]
    assert (addresses % 16 == 0).all()
    assert (addresses - addresses[0]).tolist() == [[0, 0], [4 * 48] * 2, [4 * 112] * 2]


def test_gradients_may_move(small):
    generator = torch.Generator().manual_seed(0)
    shards = []
    for first, (numel, option) in enumerate(((200, 1), (1, 0), (0, 0), (90, 2), (130, 1))):
        dtypes = (torch.float32, DTYPES[first % 3], torch.float32)
        tensors = [values((numel,), t, generator) for t in dtypes]
        segments = (Segment(0, numel, 0),) if numel else ()
        shards.append(Shard(*tensors, segments, first, 2, *OPTIONS[option]))
    assert_follows_gradients(kernels, shards, DEVICE)


def test_layers_without_elements_are_zero():
    assert kernels.Kernels([], DEVICE, 3).sum_of_squares().tolist() == [0.0, 0.0, 0.0]
    assert kernels.Kernels([], DEVICE, 0).sum_of_squares().tolist() == []


def test_two_runs_give_the_same_bits(small):
    generator = torch.Generator().manual_seed(0)
    tensors = [values((500,), torch.float32, generator) for _ in range(3)]
    shard = Shard(*tensors, (Segment(0, 300, 0), Segment(300, 500, 1)), 0, 2, *OPTIONS[1])
    coefficients = random_coefficients(2, generator).to(DEVICE)
    runs = []
    for _ in range(2):
        (mine,) = copied([shard], DEVICE)
        passes = kernels.Kernels([mine], DEVICE, 2)
        runs.append([passes.sum_of_squares(), passes.sum_of_squares(), mine.param, mine.exp_avg])
        passes.update(coefficients)
    assert torch.equal(runs[0][0], runs[0][1])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


class Recorded:
    """A kernel that notes the options of its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launches.append(options)
            return self.kernel[grid](*args, **options)

        return launch


@pytest.mark.parametrize("number", [3, 30])
def test_launches_do_not_grow_with_the_tensors(monkeypatch, number):
    names = ("_chunk_statistic", "_layer_statistic", "_update")
    recorded = [Recorded(getattr(kernels, name)) for name in names]
    for name, kernel in zip(names, recorded, strict=True):
        monkeypatch.setattr(kernels, name, kernel)
    tensor = lambda: torch.ones(5, device=DEVICE)  # noqa: E731
    shards = [
        Shard(tensor(), tensor(), tensor(), (Segment(0, 5, 0),), i, 2, 0.9, 1.0, 0.1 * (i % 2), True)
        for i in range(number)
    ]
    passes = kernels.Kernels(shards, DEVICE, number)
    assert passes.sum_of_squares().tolist() == [5.0] * number
    ones = torch.ones(number, dtype=torch.float64, device=DEVICE)
    passes.update(Coefficients(ones, ones, ones, ones > 0))
    # Two groups of options, which the statistic does not depend on.
    assert [len(kernel.launches) for kernel in recorded] == [1, 1, 2]
    assert all(options["enable_fp_fusion"] is False for options in recorded[2].launches)


def test_offsets_pass_32_bits():
    start, numel = 2**31 + 3, 2**31 + 64
    param, grad = (torch.empty(numel, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    param[start:], grad[start:] = 1.0, 2.0
    shard = Shard(param, grad, None, (Segment(start, start + 40, 0),), 0, 2, 0.0, 1.0, 0.0, True)
    passes = kernels.Kernels([shard], DEVICE, 1)
    assert passes.sum_of_squares().item() == 160.0
    one = torch.ones(1, dtype=torch.float64, device=DEVICE)
    passes.update(Coefficients(one, one, one, one > 0))
    assert param[start:].tolist() == [-1.0] * 40 + [1.0] * 21


# ---- what they take -------------------------------------------------------------------------------------


def shard_like(param, grad, exp_avg, segments=None):
    segments = (Segment(0, param.numel(), 0),) if segments is None else segments
    return Shard(param, grad, exp_avg, segments, 0, 2, 0.9, 1.0, 0.1, True)


def test_dense_strides_are_taken_where_one_segment_has_the_tensor(small):
    generator = torch.Generator().manual_seed(0)
    tensors = [values((4, 5, 6), torch.float32, generator).permute(2, 0, 1) for _ in range(3)]
    shard = shard_like(*tensors)
    assert kernels.supports(shard)
    mine, expected = copied([shard], DEVICE), copied([shard], CPU)
    coefficients = random_coefficients(1, generator)
    kernels.Kernels(mine, DEVICE, 1).update(coefficients.to(DEVICE))
    reference.update(expected, coefficients)
    assert_same_bits(mine, expected)


def test_what_they_do_not_take():
    t = torch.ones(4, 6)
    halves = (Segment(0, 12, 0), Segment(12, 24, 1))
    assert kernels.supports(shard_like(t, t, t, halves))
    assert kernels.supports(shard_like(t[:, :1], t[:, :1].contiguous(), None, ())) is False
    assert not kernels.supports(shard_like(t.t(), t.t(), t.t(), halves)), "strided, and two segments"
    assert not kernels.supports(shard_like(t.t(), t.view(6, 4), t.t())), "strides that differ"
    assert not kernels.supports(shard_like(t[:, :4], t[:, :4], t[:, :4])), "gaps"
    assert not kernels.supports(shard_like(t[:1].expand(4, 6), t[:1].expand(4, 6), None)), "overlaps"
    assert not kernels.supports(shard_like(t.double(), t.double(), t.double()))
    assert not kernels.supports(shard_like(t, t, t.half())), "float16 for the first moment"
    assert not kernels.supports(shard_like(t, t.to("meta"), t)), "two devices"
    with pytest.raises(ValueError, match="float64"):
        kernels.Kernels([shard_like(t.double(), t, t)], CPU, 1)


def test_no_tensor_is_kept_alive():
    param = torch.ones(8, device=DEVICE)
    passes = kernels.Kernels([shard_like(param, torch.ones_like(param), None)], DEVICE, 1)
    alive = weakref.ref(param)
    del param
    gc.collect()
    assert alive() is None
    assert passes is not None


# ---- what the compiler makes of them --------------------------------------------------------------------

ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "gfx942"]


@pytest.fixture(scope="module")
def compiled():
    """What triton_compile.py says of each kernel; in a process of its own, without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "triton_compile.py"
    run = subprocess.run(
        [sys.executable, str(script), *ARCHITECTURES],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_code(compiled, architecture, record_property):
    mine = [kernel for kernel in compiled if kernel["architecture"] == architecture]
    assert len(mine) == len(compiled) / len(ARCHITECTURES)
    limit = 128 if architecture.startswith("gfx") else 64  # half of the threads that may run, or a quarter
    for kernel in mine:
        print(json.dumps(kernel))
        record_property(kernel["name"], kernel["registers"])
        assert kernel["spilled"] == 0
        assert kernel["registers"] <= limit or kernel["name"] == "layer"
        assert kernel["float32 fma"] == 0
        assert kernel["128-bit loads"] >= kernel["tensors"]
        assert kernel["128-bit stores"] >= kernel["stored"]
