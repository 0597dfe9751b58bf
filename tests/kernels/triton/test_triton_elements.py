"""The Triton kernels give the reference's bits: on a GPU, or without one in Triton's interpreter."""

import gc
import os
import weakref
from dataclasses import replace

import pytest
import torch
from against_reference import (
    CPU,
    DTYPES,
    Part,
    assert_as_reference,
    assert_follows_gradients,
    assert_same_bits,
    bits,
    copied,
    random_coefficients,
    shard,
    steps,
    uniform,
    values,
)
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import CUDA, DEVICE, OPTIONS, generated, made, ones

pytest.importorskip("triton", reason="Triton is not installed")

from novoscale.kernels.interface import VectorSizes
from novoscale.kernels.reference import elements as reference
from novoscale.kernels.triton import elements as kernels
from novoscale.kernels.triton import update as triton_update
from novoscale.kernels.triton.tables import Kind, update_runs
from novoscale.sharding.blocks import BLOCK
from novoscale.state.formats import FORMATS

pytest_plugins = ["triton_fixtures"]
# NumPy says of the interpreter's arithmetic what float32 does with infinity, and uint32 beyond 2**32.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("true_hints")]


# ---- both passes ----------------------------------------------------------------------------------------


@settings(
    max_examples=int(os.environ.get("NOVOSCALE_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # in the interpreter, shrinking takes minutes
)
@given(case=steps([1, 3, 8, 50, 64, 128, 200, 300, 520, 1100], tensors=4))
def test_any_layout_gives_the_bits_of_the_reference(small, case):
    assert_as_reference(kernels, *case, DEVICE)


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("form", [*FORMATS, None, "small"])
@pytest.mark.parametrize("grad", DTYPES)
@pytest.mark.parametrize("param", DTYPES)
def test_every_mix_of_formats(small, param, grad, form, rounding):
    # One tile is whole, one is not; and two layers in the last chunk.
    parts = [Part(0, 300, 0, 256), Part(300, 330, 1, 2, 20)]
    options = {"norm_type": 0 if rounding else 2, "stochastic_rounding": rounding, **OPTIONS[1]}
    case = made(333, form, parts, param=param, grad=grad, special=0.002, **options)
    assert_as_reference(kernels, [case], 3, random_coefficients(3, generated()), DEVICE)


@pytest.mark.parametrize("size", [1, 7, 8, 127, 128, 129, 256, 264, 511, 512, 513, 640, 1100, 1152])
@pytest.mark.parametrize(("form", "norm_type"), [("float32", 2), ("bfloat16", 0), ("int8", 2), ("int4", 0)])
def test_rows(small, size, form, norm_type):
    """Layers below, at and above a block, a tile and a chunk; the piece begins and ends within one."""
    numel = max(5 * size // 2, 1100)
    for start, offset in ((0, 0), (8, size // 2 // 8 * 8), (5, size // 3)):
        parts = [Part(start, start + numel, 0, offset, size)]
        layers = (offset + numel - 1) // size + 1
        case = made(
            start + numel, form, parts, param=torch.bfloat16, grad=DTYPES[size % 3], norm_type=norm_type,
            stochastic_rounding=size % 2 == 0, special=0.0005, **OPTIONS[1 + size % 2],
        )  # fmt: skip
        assert_as_reference(kernels, [case], layers, random_coefficients(layers, generated(size)), DEVICE)


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("before", [64, 100, 300])
def test_positions_pass_32_bits(small, form, before):
    """The boundary lies in the last tile of a chunk, between tiles, and in a block."""
    offset = 2**32 - before
    for parts in (
        [Part(0, 400, 0, offset)],
        [Part(0, 400, 0, offset, offset - 4), Part(400, 500, 7, 2**33 + 1)],
    ):
        layers = 9
        case = made(500, form, parts, param=torch.bfloat16, stochastic_rounding=True, **OPTIONS[1])
        assert_as_reference(kernels, [case], layers, random_coefficients(layers, generated()), DEVICE)


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38, 1e-45, 1e-38, 0.0])
def test_blocks_of_extreme_values(small, form, value):
    case = made(5 * BLOCK, form, decays=False)
    case.grad[BLOCK : 2 * BLOCK] = 0.0
    case.grad[BLOCK + 3] = value
    mine = copied([case], DEVICE)
    without_beta1 = uniform(1, options=(0.0, 1.0, 0.0, 0.0))
    kernels.Kernels(mine, DEVICE, VectorSizes(1)).update(without_beta1.to(DEVICE))
    expected = copied([case], CPU)
    reference.update(expected, without_beta1)
    assert_same_bits(mine, expected)
    code, scale = mine[0].exp_avg[1].cpu(), mine[0].exp_avg_scale.cpu()
    if not torch.tensor(value).isfinite():
        assert (bits(scale)[1], scale.view(torch.int16)[1]) == (-1, 0x7FC0)
        assert not code.any()
    assert scale[[0, 2, 3, 4]].isfinite().all()


def test_a_block_of_inactive_layers_only_is_not_written(small):
    """Its stored bits need not be those that it would get: codes of a smaller scale than any."""
    for form in ("int8", "int4"):
        case = made(4 * BLOCK, form, [Part(0, 4 * BLOCK, 0, 0, 64)])
        case.exp_avg_scale[:] = 1e-40
        mine = copied([case], DEVICE)
        coefficients = ones(8)
        coefficients.active[2:6] = False
        kernels.Kernels(mine, DEVICE, VectorSizes(8)).update(coefficients)
        for stored, before in ((mine[0].exp_avg, case.exp_avg), (mine[0].exp_avg_scale, case.exp_avg_scale)):
            same = (stored.cpu() == before).view(4, -1).all(dim=1)
            assert same.tolist() == [False, True, True, False]


def test_codes_need_not_be_aligned(small):
    for form in ("int8", "int4"):
        case = made(700, form, **OPTIONS[1])
        storage = torch.zeros(case.exp_avg.numel() + 3, dtype=case.exp_avg.dtype)
        storage[3:] = case.exp_avg.flatten()
        case = replace(case, exp_avg=storage[3:].view(case.exp_avg.shape))
        assert_as_reference(kernels, [case], 1, random_coefficients(1, generated()), DEVICE)


@pytest.mark.parametrize(
    ("param", "form", "offset"),
    [(torch.bfloat16, "bfloat16", 0), (torch.float32, "int8", 1), (torch.bfloat16, "int4", 0)],
)
def test_with_chunks_and_tiles_as_they_are(param, form, offset):
    numel = 2 * kernels.CHUNK + 5 * kernels.TILE + 100
    parts = [Part(0, 3, 0), Part(35, kernels.CHUNK + 2, 1), Part(kernels.CHUNK + 8, numel - 7, 2, 0, 768)]
    case = made(numel, form, parts, param=param, offset=offset, stochastic_rounding=True, **OPTIONS[2])
    layers = 2 + (numel - kernels.CHUNK - 16) // 768 + 1
    assert_as_reference(kernels, [case], layers, random_coefficients(layers, generated()), DEVICE)


def test_rounding_to_bfloat16_is_to_nearest_even(small):
    """Every sign, exponent and last kept bit, with what is rounded off below, at and above the middle."""
    kept = torch.arange(0, 2**16, 1 if CUDA else 97)
    kept = torch.cat([kept, torch.tensor([0x7F7F, 0x7F80, 0x7FFF, 0xFF7F, 0xFF80, 0xFFFF])])
    wide = (kept[:, None] << 16) + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    exact = wide.flatten().to(torch.int32).view(torch.float32)
    # w - 1 * m with m = 1 * g and w = 0: the weight becomes -g.
    param = torch.zeros(len(exact), dtype=torch.bfloat16)
    mine = copied([shard(param, exact, None, decays=False)], DEVICE)
    kernels.Kernels(mine, DEVICE, VectorSizes(1)).update(ones(1))
    result, expected = mine[0].param.cpu(), (0 - exact).bfloat16()
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result[~result.isnan()], expected[~result.isnan()])


def test_chunks_are_aligned_where_the_tensor_is_and_the_piece_is_not(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 128)
    tensors = [torch.ones(400, device=DEVICE) for _ in range(2)]
    case = shard(*tensors, None, [Part(115, 390, 0)])
    rows, kinds, chunks = update_runs([case], torch.zeros(1, dtype=torch.int64), 128, 64)
    columns = [
        triton_update.BEGIN.value,
        triton_update.END.value,
        triton_update.PARAM.value,
        triton_update.GRAD.value,
    ]
    rows = rows[:, columns]
    rows[:, 2] -= case.param.data_ptr()
    assert rows.tolist() == [[115, 128, 0, 0], [0, 256, 512, 512], [0, 6, 1536, 1536]]
    assert [Kind(*kind).whole for kind in kinds.tolist()] == [0, 1, 0]
    assert chunks.tolist() == [1, 2, 1]


@pytest.mark.parametrize("offset", [0, 1])
def test_gradients_may_move(small, offset):
    """Also to where they are not aligned, which another launch may have to take."""
    shards = []
    for first, (numel, form) in enumerate(
        ((600, "int8"), (1, "small"), (0, None), (90, "bfloat16"), (300, "int4"))
    ):
        case = made(
            numel, form, [Part(0, numel, first)] if numel else [], grad=DTYPES[first % 3], offset=offset
        )
        shards.append(case)
    assert_follows_gradients(kernels, shards, DEVICE)


class Copied(TorchDispatchMode):
    """Counts the bytes that are copied between tensors."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            self.bytes += result.nbytes
        return result


def moving():
    """Tables of plain and of factored gradients of several chunks, and whereto the gradients move."""
    parts = [Part(0, 1500, 0), Part(1500, 2100, 1, 0, 20, 0)]
    shards = [made(2100, "int8", parts), made(2100, None, [Part(0, 2100, 31)])]
    mine = copied(shards, DEVICE)
    both = kernels.Kernels(mine, DEVICE, VectorSizes(32, 20))
    return both, mine, [torch.full_like(s.grad, 2.0) for s in mine]


def test_of_gradients_that_move_one_address_each_is_sent(small):
    both, mine, elsewhere = moving()
    with Copied() as counted:
        both.move_gradients([t.data_ptr() for t in elsewhere])
    assert counted.bytes == 8 * len(mine)
    assert both.sum_of_squares().tolist() == [6000.0, *[80.0] * 30, 8400.0, *[120.0] * 20]


def test_gradients_may_move_while_a_graph_is_captured(small, monkeypatch):
    """But tables of another alignment are not made then."""
    both, _, elsewhere = moving()
    with monkeypatch.context() as capturing:
        capturing.setattr(kernels, "capturing", lambda: True)
        capturing.setattr(Tensor, "pin_memory", None)
        both.move_gradients([t.data_ptr() for t in elsewhere])
        with pytest.raises(RuntimeError, match="aligned"):
            both.move_gradients([t.data_ptr() + 4 for t in elsewhere])
    assert both.sum_of_squares()[0] == 6000.0


def test_layers_without_elements_are_zero():
    assert kernels.Kernels([], DEVICE, VectorSizes(3)).sum_of_squares().tolist() == [0.0, 0.0, 0.0]
    assert kernels.Kernels([], DEVICE, VectorSizes(0)).sum_of_squares().tolist() == []
    assert kernels.Kernels([], DEVICE, VectorSizes(1, 2)).sum_of_squares().tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_two_runs_give_the_same_bits(small, form):
    parts = [Part(0, 900, 0), Part(900, 1500, 1, 0, 100), Part(1500, 2500, 7, 50, 300, 0)]
    case = made(2500, form, parts, **OPTIONS[1])
    coefficients = random_coefficients(11, generated(), 300).to(DEVICE)
    runs = []
    for _ in range(2):
        (mine,) = copied([case], DEVICE)
        both = kernels.Kernels([mine], DEVICE, VectorSizes(11, 300))
        runs.append([both.sum_of_squares(), both.sum_of_squares(), *mine.tensors])
        both.update(coefficients)
    assert torch.equal(runs[0][0], runs[0][1])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- launches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [3, 30])
def test_launches_do_not_grow_with_the_tensors(recorded, number):
    tensor = lambda: torch.ones(5, device=DEVICE)  # noqa: E731
    shards = [
        shard(tensor(), tensor(), tensor(), [Part(0, 5, i)], group=i, decays=i % 2 > 0) for i in range(number)
    ]
    both = kernels.Kernels(shards, DEVICE, VectorSizes(number))
    assert both.sum_of_squares().tolist() == [5.0] * number
    options = torch.rand(number, 4, device=DEVICE)
    both.update(replace(ones(number), options=options))
    # Each is a param group; the statistic does not depend on whether weights decay.
    assert [len(kernel.launches) for kernel in recorded.values()] == [1, 0, 0, 2, 0, 0]
    assert all(options["enable_fp_fusion"] is False for options in recorded["update"].launches)


@pytest.mark.parametrize("size", [8, 64, 512])
def test_neither_launches_nor_programs_nor_tables_grow_with_the_layers(small, recorded, size):
    case = made(1024, "int8", [Part(0, 1024, 0, 0, size)], param=torch.bfloat16)
    (mine,) = copied([case], DEVICE)
    both = kernels.Kernels([mine], DEVICE, VectorSizes(1024 // size))
    both.sum_of_squares()
    both.update(ones(1024 // size))
    rows = size < 512
    assert [len(kernel.launches) for kernel in recorded.values()] == [not rows, rows, 0, 1, 0, 0]
    assert [kernel.programs for kernel in recorded.values() if kernel.programs] == [[2], [2]]
    assert len(both._runs.rows) == 1


def test_offsets_pass_32_bits():
    start, numel = 2**31 + 3, 2**31 + 64
    param, grad = (torch.empty(numel, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    param[start:], grad[start:] = 1.0, 2.0
    case = shard(param, grad, None, [Part(start, start + 40, 0)], decays=False)
    both = kernels.Kernels([case], DEVICE, VectorSizes(1))
    assert both.sum_of_squares().item() == 160.0
    both.update(ones(1))
    assert param[start:].tolist() == [-1.0] * 40 + [1.0] * 21


# ---- what they take -------------------------------------------------------------------------------------


def test_dense_strides_are_taken_where_one_layer_has_the_tensor(small):
    generator = generated()
    tensors = [values((4, 5, 6), torch.float32, generator).permute(2, 0, 1) for _ in range(3)]
    case = shard(*tensors, [Part(0, 120, 0, size=120)])
    assert kernels.supports(case)
    mine, expected = copied([case], DEVICE), copied([case], CPU)
    coefficients = random_coefficients(1, generator)
    kernels.Kernels(mine, DEVICE, VectorSizes(1)).update(coefficients.to(DEVICE))
    reference.update(expected, coefficients)
    assert_same_bits(mine, expected)


def test_what_they_do_not_take():
    t, whole = torch.ones(4, 6), [Part(0, 24, 0, size=24)]
    halves = [Part(0, 12, 0), Part(12, 24, 1)]
    taken = lambda *args, **options: kernels.supports(shard(*args, **options))  # noqa: E731
    assert taken(t, t, t, halves)
    assert taken(t.t(), t.t(), t.t(), whole)
    assert not taken(t[:, :1], t[:, :1].contiguous(), None, [])
    assert not taken(t.t(), t.t(), t.t(), halves), "strided, and two layers"
    assert not taken(t.t(), t.t(), t.t().bfloat16(), whole), "strided, and rounded by position"
    assert not taken(t.t(), t.view(6, 4), t.t(), whole), "strides that differ"
    assert not taken(t[:, :4], t[:, :4], t[:, :4]), "gaps"
    assert not taken(t[:1].expand(4, 6), t[:1].expand(4, 6), None), "overlaps"
    assert not taken(t.double(), t.double(), t.double())
    assert not taken(t, t, t.half()), "float16 for the first moment"
    assert not taken(t, t.to("meta"), t), "two devices"
    codes, scale = torch.zeros(1, BLOCK, dtype=torch.int8), torch.zeros(1, dtype=torch.bfloat16)
    assert taken(t, t, codes, scale=scale)
    assert taken(t, t, codes[:, :64].contiguous().view(torch.uint8), scale=scale)
    assert not taken(t, t, codes, scale=scale.float()), "another format of scales"
    assert not taken(t, t, codes.short(), scale=scale), "another format of codes"
    assert not taken(t, t, codes, scale=None), "codes without scales"
    with pytest.raises(ValueError, match="float64"):
        kernels.Kernels([shard(t.double(), t, t)], CPU, VectorSizes(1))


def test_no_tensor_is_kept_alive():
    param = torch.ones(8, device=DEVICE)
    both = kernels.Kernels([shard(param, torch.ones_like(param), None)], DEVICE, VectorSizes(1))
    alive = weakref.ref(param)
    del param
    gc.collect()
    assert alive() is None
    assert both is not None
