"""The fused CPU kernel against the reference: the update bit for bit, the sums to float64's rounding."""

import platform
import re
import shlex
from pathlib import Path

import pytest
import torch
from against_reference import (
    CPU,
    DTYPES,
    Part,
    assert_as_reference,
    assert_follows_gradients,
    assert_same_bits,
    assert_same_statistic,
    bits,
    copied,
    moment,
    random_coefficients,
    shard,
    steps,
    uniform,
    values,
)
from hypothesis import given, settings

from novoscale.kernels.cpu import build
from novoscale.kernels.cpu import elements as cpu
from novoscale.kernels.interface import VectorSizes
from novoscale.kernels.reference import elements as reference

try:
    build.load()
except build.BuildError as error:
    pytest.skip(f"no CPU kernel here: {error}", allow_module_level=True)


SIZES = [1, 2, 7, 15, 16, 17, 63, 127, 128, 129, 200, 768, 1023, 1024, 1025, 3000]


def random(layers, seed=0, columns=0):
    return random_coefficients(layers, torch.Generator().manual_seed(seed), columns)


@settings(max_examples=250, deadline=None)
@given(steps(SIZES, tensors=5))
def test_any_layout_gives_what_the_reference_gives(case):
    assert all(map(cpu.supports, case[0]))
    assert_as_reference(cpu, *case)


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("size", [100, 768, 70_000])
def test_rows_that_chunks_cut_and_positions_beyond_32_bits(form, size):
    generator = torch.Generator().manual_seed(0)
    numel = 150_001
    parts = [Part(0, numel, 0, 2**32 - 70_003, size)]
    exp_avg, scale = moment(form, parts, numel, generator, 0, 0.001)
    param, grad = (values((numel,), torch.bfloat16, generator) for _ in range(2))
    s = shard(param, grad, exp_avg, parts, scale=scale, stochastic_rounding=True)
    s.pieces[:, 2] = 0  # the layers before are not here
    layers = (parts[0].offset % size + numel) // size + 1
    assert_as_reference(cpu, [s], layers, random(layers))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_number_of_16_bits_and_its_neighbours_are_converted_as_torch_does(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    exact = every.view(torch.int32)
    # Halfway to the next, and the float32 before and after that.
    half = 1 << (15 if dtype == torch.bfloat16 else 12)
    g = torch.cat([(exact + d).view(torch.float32) for d in (-1, 0, 1, half - 1, half, half + 1)])
    g = torch.cat([g, torch.arange(-2048.5, 2048.5, 0.25) * 2.0**-24, torch.tensor([65519.996, 65520.0])])
    # w - (-1*g) with w = -0 is g in all its bits.
    c = uniform(1, step_size=-1.0)
    narrowed = shard(torch.full_like(g, -0.0, dtype=dtype), g, None, decays=False)
    widened = shard(torch.full_like(every, -0.0), every.to(dtype), None, decays=False)
    cpu.Kernels([narrowed], CPU, VectorSizes(1)).update(c)
    cpu.Kernels([widened], CPU, VectorSizes(1)).update(c)
    assert torch.equal(bits(narrowed.param), bits(g.to(dtype)))
    assert torch.equal(bits(widened.param), bits(every))


def matrix(rows, width, dtype=torch.float32, *, begin=0, end=0, form="float32", first=0, column=0, **options):
    """A factored parameter, but for its first ``begin`` and last ``end`` elements."""
    generator = torch.Generator().manual_seed(rows)
    numel = rows * width - begin - end
    parts = [Part(0, numel, 0, begin, width, column)]
    exp_avg, scale = moment(form, parts, numel, generator, 0, 0.001)
    param, grad = (values((numel,), dtype, generator) for _ in range(2))
    return shard(param, grad, exp_avg, parts, scale=scale, first=first, **{"group": 1, **options})


def assert_same_bits_for_every_number_of_threads(shards, counts):
    results = []
    layers, columns = counts
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            own = copied(shards, CPU)
            kernels = cpu.Kernels(own, CPU, VectorSizes(layers, columns))
            sums = kernels.sum_of_squares()
            kernels.update(random(layers, columns=columns))
            results.append([sums, *(t for s in own for t in s.tensors)])
    finally:
        torch.set_num_threads(before)
    assert all(
        torch.equal(bits(a), bits(b)) if a.dtype != torch.float64 else torch.equal(a, b)
        for other in results[1:]
        for a, b in zip(results[0], other, strict=True)
    )
    assert_as_reference(cpu, shards, counts, random(layers, columns=columns))


def test_a_large_layer_gives_the_same_bits_for_every_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    shards = [
        shard(*(values((numel,), torch.float32, generator) for _ in range(3)), first=first)
        for first, numel in enumerate((1_000_001, 5, 300_000))
    ]
    assert_same_bits_for_every_number_of_threads(shards, (3, 0))


# Matrices of several panels: high; with rows in several panels; narrow; split within rows; all, beside
# a layer that is not factored.
HIGH = matrix(1501, 1000, nesterov=True)
WIDE = matrix(67, 40_001, torch.bfloat16, form="int8", first=1501, column=1000)
NARROW = matrix(90_000, 3, torch.float16, form="bfloat16", first=1568, column=41_001, reg_inside_moment=False)
SHARDED = matrix(900, 777, begin=300, end=500, form=None, first=91_568, column=41_004)
PLAIN = shard(torch.ones(100_000), torch.ones(100_000), None, first=92_468)


@pytest.mark.parametrize(("wave", "waves"), [(cpu.WAVE, 1), (20_000, 7), (1, 19)])
def test_factored_matrices_give_the_same_bits_for_every_number_of_threads(wave, waves, monkeypatch):
    monkeypatch.setattr(cpu, "WAVE", wave)
    shards = [HIGH, WIDE, NARROW, SHARDED, PLAIN]
    table, sums = cpu.panel_table(shards)
    assert (len(table), (table[:, -1] == 0).sum()) == (19, waves)
    assert sums < wave + (table[:, 1] + table[:, 2]).max()
    assert_same_bits_for_every_number_of_threads(shards, (92_469, 41_781))


def test_how_a_matrix_is_cut_shows_in_the_rounding_of_float64_only():
    """Panels that begin and end within rows, in two tensors; each row and column is there once."""
    generator = torch.Generator().manual_seed(0)
    grad = values((700 * 1000,), torch.float32, generator)
    sharded = 333_333
    halves = [
        shard(g.clone(), g, None, [Part(0, len(g), 0, begin, 1000, 0)])
        for begin, g in ((0, grad[:sharded]), (sharded, grad[sharded:]))
    ]
    squares = grad.double().square().view(700, 1000)
    expected = torch.cat((squares.sum(1), squares.sum(0)))
    sums = cpu.Kernels(halves, CPU, VectorSizes(700, 1000)).sum_of_squares()
    assert torch.allclose(sums, expected, rtol=1e-13, atol=0)
    assert_as_reference(cpu, halves, (700, 1000), random(700, columns=1000))


# Rows, columns, how many: Llama 3.1 8B (its embedding and head too), and the extremes of shape.
LLAMA = [(128_256, 4096, 2), (4096, 4096, 64), (1024, 4096, 64), (14_336, 4096, 64), (4096, 14_336, 32)]


@pytest.mark.parametrize("shapes", [LLAMA, [(2**28, 1, 4)], [(1, 2**30, 4)], [(2**14, 2**18, 2)]])
def test_partial_sums_are_bounded_whatever_the_size_of_a_model(shapes):
    shards, layers, columns = [], 0, 0
    for rows, width, count in shapes:
        for _ in range(count):
            nothing = torch.empty(rows * width, dtype=torch.bfloat16, device="meta")
            part = Part(0, rows * width, 0, 0, width, columns)
            shards.append(shard(nothing, nothing, None, [part], first=layers))
            layers, columns = layers + rows, columns + width
    table, sums = cpu.panel_table(shards)
    assert 8 * sums <= 64 << 20
    rows, width = table[:, 1], table[:, 2]
    assert int((rows * width).sum()) == int(table[-1, -2]) == sum(s.param.numel() for s in shards)
    assert (rows * width).max() <= 2**20
    # Of a matrix that has enough rows, the sums are little beside the gradient.
    if shapes is LLAMA:
        assert 40 * int((rows + width).sum()) <= int(table[-1, -2])


def test_the_tables_of_a_matrix_are_small_beside_it():
    # Where each parameter is stepped by itself they are kept for each.
    one = matrix(1024, 4096, torch.bfloat16, form="int4")  # which the tables do not keep alive
    kernels = cpu.Kernels([one], CPU, VectorSizes(1024, 4096))
    kernels.sum_of_squares()
    kept = sum(t.nbytes for t in vars(kernels).values() if isinstance(t, torch.Tensor))
    assert kept < 0.01 * 1024 * 4096


@pytest.mark.parametrize("form", [None, "float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column", [-1, 0])
def test_layers_of_one_element(form, dtype, column):
    generator = torch.Generator().manual_seed(0)
    numel = 70_001  # more than a chunk
    parts = [Part(0, numel, 0, 0, 1, column)]
    exp_avg, scale = moment(form, parts, numel, generator, 0, 0.001)
    param, grad = (values((numel,), dtype, generator, 0, 0.001) for _ in range(2))
    for inside, decays in ((True, True), (False, True), (True, False)):
        options = {"reg_inside_moment": inside, "decays": decays, "stochastic_rounding": True, "group": 2}
        nesterov = exp_avg is not None and inside
        s = shard(param, grad, exp_avg, parts, scale=scale, nesterov=nesterov, **options)
        coefficients = random(numel, columns=1)
        coefficients.column_root.fill_(0.5)
        assert_as_reference(cpu, [s], (numel, 1), coefficients)


@pytest.mark.parametrize("norm_type", [2, 0])
def test_the_statistics_of_layers_of_one_element(norm_type):
    g = torch.tensor([3.0, -2.0, torch.nan, -torch.inf, 0.0, 1e-30] * 20_000)
    s = shard(g, g, None, [Part(0, 7, 0, 0, 1), Part(9, len(g), 0, 7, 1)], norm_type=norm_type)
    found = cpu.Kernels([s], CPU, VectorSizes(len(g))).sum_of_squares()
    held = torch.cat((g[:7], g[9:])).double()
    expected = held.square() if norm_type == 2 else held.abs()
    assert torch.equal(bits(found[:-2].float()), bits(expected.float()))
    assert found[-2:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("begin", [0, 1, 100, 127, 129])
def test_blocks_in_tiles_that_begin_and_end_anywhere(form, begin):
    """Of a layer, and of layers that end within blocks; a part of them inactive."""
    generator = torch.Generator().manual_seed(begin)
    for numel in (1, 126, 127, 128, 129, 255, 256, 257, 383, 384, 385, 511, 513, 1400, 1537):
        for size in (2**40, 1, 3, 100, 300):
            for special in (0.0, 0.002):
                parts = [Part(0, numel, 0, begin, size)]
                exp_avg, scale = moment(form, parts, numel, generator, 0, special)
                param, grad = (values((numel,), torch.bfloat16, generator, 1, special) for _ in range(2))
                s = shard(param, grad, exp_avg, parts, scale=scale, stochastic_rounding=True)
                layers = (begin + numel - 1) // size + 1
                assert_as_reference(cpu, [s], layers, random(layers, seed=numel))


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_blocks_of_which_no_column_has_a_second_moment_are_left_as_they_are(form):
    s = matrix(40, 1000, torch.bfloat16, form=form, stochastic_rounding=True)
    coefficients = random(40, columns=1000)
    coefficients.column_root.fill_(1.0)
    coefficients.column_root[200:700] = 0.0
    assert_as_reference(cpu, [s], (40, 1000), coefficients)


# The instruction sets that the library chooses between when it is loaded, and what a processor must have.
VARIANTS = {
    "default": (),
    "avx2": ("avx2",),
    "arch=x86-64-v4": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
}


def has(flags):
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found is not None and set(flags) <= set(found[1].split())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one variant")
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_gives_what_the_reference_gives(variant, tmp_path, monkeypatch):
    if not has(VARIANTS[variant]):
        pytest.skip("not on this processor")
    attribute = "" if variant == "default" else f'__attribute__((target("{variant}")))'
    monkeypatch.setenv("CXX", shlex.join(["c++", f"-DVARIANTS={attribute}"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = build.load.__wrapped__()
    monkeypatch.setattr(cpu, "load", lambda: library)
    random_layouts()


@settings(max_examples=60, deadline=None)
@given(steps(SIZES, tensors=5))
def random_layouts(case):
    assert_as_reference(cpu, *case)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4"])
def test_columns_without_a_second_moment_are_left_as_they_are(form):
    s = matrix(300, 500, torch.bfloat16, form=form, stochastic_rounding=True)
    coefficients = random(300, columns=500)
    coefficients.active.fill_(True)
    coefficients.column_root[:] = torch.tensor([0.0, -1.0, torch.nan, 1e-60]).repeat(125)
    before = copied([s], CPU)
    (mine,) = copied([s], CPU)
    cpu.Kernels([mine], CPU, VectorSizes(300, 500)).update(coefficients)
    assert_same_bits([mine], before)
    coefficients.column_root[::7] = 1.0
    assert_as_reference(cpu, [s], (300, 500), coefficients)


def test_a_thousand_layers_and_a_large_one():
    sizes = [256] * 1000 + [200_000, 0, 1]
    generator = torch.Generator().manual_seed(0)
    shards = [
        shard(*(values((n,), torch.float32, generator) for _ in range(3)), first=i)
        for i, n in enumerate(sizes)
    ]
    assert_as_reference(cpu, shards, len(sizes), random(len(sizes)))
    assert cpu.Kernels(shards, CPU, VectorSizes(len(sizes))).sum_of_squares()[-2] == 0


def test_no_shards_and_no_layers():
    kernels = cpu.Kernels([], CPU, VectorSizes(0))
    assert kernels.sum_of_squares().numel() == 0
    kernels.update(random(0))
    assert cpu.Kernels([], CPU, VectorSizes(2)).sum_of_squares().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("norm_type", [2, 0])
def test_a_nan_shows_in_its_layer_only(norm_type):
    g = torch.ones(200_000)
    g[70_000], g[150_000] = torch.nan, torch.inf
    parts = [Part(0, 100_000, 0), Part(100_000, 160_000, 1), Part(160_000, 200_000, 2)]
    s = shard(g, g, None, parts, norm_type=norm_type)
    nan, inf, rest = cpu.Kernels([s], CPU, VectorSizes(3)).sum_of_squares().tolist()
    assert (nan != nan, inf, rest) == (True, float("inf"), 40_000.0 if norm_type == 2 else 1.0)


@pytest.mark.parametrize("moment", [None, torch.bfloat16])
def test_elements_beyond_two_to_the_31(moment):
    numel = 2**31 + 1000  # bfloat16 pages that nobody touches take no memory
    param, grad = (torch.empty(numel, dtype=torch.bfloat16) for _ in range(2))
    exp_avg = None if moment is None else torch.empty(numel, dtype=moment)
    held = Part(2**31 + 7, 2**31 + 900, 0)
    near = slice(held.start - 5, held.stop + 5)
    generator = torch.Generator().manual_seed(0)
    for t in (param, grad, exp_avg):
        if t is not None:
            t[near] = values((held.stop - held.start + 10,), t.dtype, generator)
    large = shard(param, grad, exp_avg, [held])
    small = [None if t is None else t[near].clone() for t in (param, grad, exp_avg)]
    expected = shard(*small, [Part(5, 5 + held.stop - held.start, 0)])
    kernels, c = cpu.Kernels([large], CPU, VectorSizes(1)), random(1)
    c.active.fill_(True)
    assert_same_statistic(kernels.sum_of_squares(), [expected], 1)
    kernels.update(c)
    reference.update([expected], c)
    assert torch.equal(bits(param[near]), bits(expected.param))
    assert exp_avg is None or torch.equal(bits(exp_avg[near]), bits(expected.exp_avg))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_any_order_of_dimensions_where_it_is_the_same_for_all(memory_format):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        values((2, 3, 5, 7), torch.float32, generator).contiguous(memory_format=memory_format)
        for _ in range(3)
    ]
    s = shard(*tensors)
    assert cpu.supports(s)
    assert_as_reference(cpu, [s], 1, random(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_may_move(dtype):
    generator = torch.Generator().manual_seed(0)
    shards = [
        shard(*(values((n,), d, generator) for d in (dtype, dtype, torch.float32)), first=i)
        for i, n in enumerate((300, 1, 0, 70_000))
    ]
    assert_follows_gradients(cpu, shards)


def test_what_is_not_supported():
    t = torch.zeros(4, 6)
    supports = lambda *tensors, **options: cpu.supports(shard(*tensors, **options))  # noqa: E731
    assert supports(t, t, None)
    assert supports(t.t(), t.t(), t.t())
    assert supports(t, t.half(), t.bfloat16())
    assert not supports(t.double(), t.double(), None)
    assert not supports(t, t, t.half())
    assert not supports(t, t, None, nesterov=True)
    assert not supports(t.t(), t.t(), None, [Part(0, 24, 0, 0, 24, 0)]), "columns are consecutive"
    assert supports(t, t, t, [Part(0, 24, 0, 0, 6, 0)], nesterov=True)
    assert not supports(t, t.to_sparse(), None)
    assert not supports(t.to("meta"), t, None)
    assert not supports(t.t(), t.view(6, 4), None)
    assert not supports(t[:, :4], t[:, :4], None)
    assert not supports(t[:1].expand(4, 6), t[:1].expand(4, 6), None)
    halves = [Part(0, 12, 0), Part(12, 24, 1)]
    assert not supports(t.t(), t.t(), None, halves)
    assert not supports(t.t(), t.t(), None, halves[:1])
    assert not supports(t.t(), t.t(), None, [Part(0, 24, 0, 0, 4)]), "which row an element is in matters"
    assert not supports(t.t().bfloat16(), t.t(), None, stochastic_rounding=True), "and which element it is"
    assert supports(t.t().bfloat16(), t.t(), None)
