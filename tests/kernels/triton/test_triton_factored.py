"""The Triton kernels give the reference's bits of factored parameters, in bounded memory and few launches."""

import itertools
from dataclasses import replace

import pytest
import torch
from against_reference import (
    CPU,
    DTYPES,
    Part,
    assert_as_reference,
    assert_same_bits,
    assert_same_statistic,
    copied,
    random_coefficients,
    shard,
)
from triton_cases import DEVICE, OPTIONS, generated, made, ones

pytest.importorskip("triton", reason="Triton is not installed")

from novoscale.kernels.interface import VectorSizes
from novoscale.kernels.reference import elements as reference
from novoscale.kernels.triton import elements as kernels
from novoscale.kernels.triton import factored as triton_factored
from novoscale.sharding.blocks import BLOCK
from novoscale.state.formats import FORMATS

pytest_plugins = ["triton_fixtures"]
# NumPy says of the interpreter's arithmetic what float32 does with infinity, and uint32 beyond 2**32.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("true_hints")]


@pytest.mark.parametrize("width", [1, 7, 8, 16, 17, 64, 72, 256, 264, 511, 520, 1104, 1152])
def test_panels(small, width):
    """Columns below, at and above those of a strip, a tile and a chunk; pieces begin and end within a row."""
    numel = max(3 * width, 400)
    for start, offset, column, address, form in (
        (0, 0, width // 2, 0, "float32"),
        (8, 8, 0, 8, "int8"),
        (5, width // 3, 3, 1, None),
        (0, width // 3 // 8 * 8, 5, 0, "int4"),
    ):
        parts = [Part(start, start + numel, 1, offset, width, column)]
        layers = 1 + (offset + numel - 1) // width + 1
        case = made(
            start + numel, form, parts, param=DTYPES[width % 2], grad=DTYPES[width % 3], offset=address,
            special=0.0005, nesterov=form == "float32", stochastic_rounding=True,
            **OPTIONS[1 + width % 2],
        )  # fmt: skip
        columns = column + width + 2
        coefficients = random_coefficients(layers, generated(width), columns)
        assert_as_reference(kernels, [case], (layers, columns), coefficients, DEVICE)


@pytest.mark.parametrize("form", [*FORMATS, None, "small"])
@pytest.mark.parametrize("param", DTYPES)
def test_every_mix_of_formats_factored(small, param, form):
    # A row of several tiles, and several rows in a chunk.
    rounding = param == torch.bfloat16
    parts = [Part(0, 600, 0, 520, 600, 0), Part(600, 800, 3, 0, 40, 600)]
    options = {"stochastic_rounding": rounding, "reg_inside_moment": rounding, "nesterov": form is not None}
    case = made(803, form, parts, param=param, grad=param, special=0.002, **{**OPTIONS[1], **options})
    coefficients = random_coefficients(8, generated(), 640)
    assert_as_reference(kernels, [case], (8, 640), coefficients, DEVICE)


def test_rows_longer_than_a_chunk_with_chunks_and_tiles_as_they_are():
    width, numel = kernels.CHUNK + 8, kernels.CHUNK + 2 * kernels.TILE
    case = made(numel, "bfloat16", [Part(0, numel, 0, 0, width, 0)], param=torch.bfloat16, **OPTIONS[1])
    coefficients = random_coefficients(2, generated(), width)
    assert_as_reference(kernels, [case], (2, width), coefficients, DEVICE)


def test_layers_and_columns_in_several_panels_and_waves(waves, recorded):
    """Tensors of two dtypes have the pieces of a matrix by turns; some of them are wider than SIDE."""
    size, sharded_dims = 300, [0, 1000, 1010, 4700, 4750, 6000, 9000]
    parts = [[], []]
    for n, (a, b) in enumerate(itertools.pairwise(sharded_dims)):
        start = parts[n % 2][-1].stop if parts[n % 2] else 0
        parts[n % 2].append(Part(start, start + b - a, 0, a, size, 0))
    shards = [made(p[-1].stop, None, p, grad=t) for p, t in zip(parts, DTYPES[:2], strict=True)]
    assert triton_factored._parts(shards, kernels.STRIP * kernels.CHUNK).partials <= 1500
    coefficients = random_coefficients(30, generated(), size)
    assert_as_reference(kernels, shards, (30, size), coefficients, DEVICE)
    assert len(recorded["panel_statistic"].launches) > 3


def llama():
    """Rows and columns of an 8B model's matrices."""
    block = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]
    return [(128256, 4096)] * 2 + block * 32


@pytest.mark.parametrize(
    ("matrices", "most"),
    [
        (llama(), 16),
        ([(2**20, 2**20)], 2000),
        ([(1, 2**31), (2**31, 1)], 520),
        ([(8, 2**24), (2**24, 8), (2**24, 200)], 80),
    ],
)
def test_partials_take_at_most_64_mib(matrices, most):
    """And a wave more or less fills them: few waves."""
    empty, first, column = torch.empty(0, dtype=torch.bfloat16), 0, 0
    shards = []
    for rows, width in matrices:
        shards.append(shard(empty, empty, None, [Part(0, rows * width, first, 0, width, column)]))
        first, column = first + rows, column + width
    parts = triton_factored._parts(shards, kernels.STRIP * kernels.CHUNK)
    assert parts.partials * 8 <= 64 * 2**20
    assert (parts.rows * parts.columns).sum() == sum(rows * width for rows, width in matrices)
    assert int(parts.wave[-1]) + 1 <= most


def test_gradients_of_factored_parameters_may_move(small):
    parts = [Part(3, 900, 0, 20, 64, 0), Part(900, 930, 20, 0)]
    shards = [made(1000, "int8", parts, grad=t, **OPTIONS[1]) for t in DTYPES[:2]]
    shards[1] = replace(shards[1], pieces=shards[1].pieces + torch.tensor([0, 0, 30, 0, 0, 0, 0, 0, 0]))
    mine, expected = copied(shards, DEVICE), copied(shards, CPU)
    elsewhere = [replace(s, grad=torch.zeros(1001, dtype=s.grad.dtype, device=DEVICE)[1:]) for s in mine]
    both = kernels.Kernels(elsewhere, DEVICE, VectorSizes(60, 64))
    both.move_gradients([s.grad.data_ptr() for s in mine])
    coefficients = random_coefficients(60, generated(), 64)
    assert_same_statistic(both.sum_of_squares(), shards, 60, 64)
    both.update(coefficients.to(DEVICE))
    reference.update(expected, coefficients)
    assert_same_bits(mine, expected)


def test_columns_that_never_had_a_gradient_keep_their_bits(small):
    """Also those of a NaN, and of zeros with a sign."""
    for width in (8, 600):
        param, exp_avg = (
            torch.tensor([0x7FC5, -0x003D, -0x8000, 0x3F80], dtype=torch.int16).repeat(300) for _ in range(2)
        )
        case = shard(
            param.view(torch.bfloat16), torch.ones(1200), exp_avg.view(torch.bfloat16),
            [Part(0, 1200, 0, 0, width, 0)], stochastic_rounding=True,
        )  # fmt: skip
        (mine,) = copied([case], DEVICE)
        coefficients = random_coefficients(1200 // width, generated(), width).to(DEVICE)
        coefficients.active[:] = True
        coefficients.column_root[:] = torch.tensor([0.0, 0.0, -1.0, 1.0]).repeat(width // 4)
        kernels.Kernels([mine], DEVICE, VectorSizes(1200 // width, width)).update(coefficients)
        for new, old in ((mine.param, param), (mine.exp_avg, exp_avg)):
            same = (new.cpu().view(torch.int16) == old).view(-1, 4)
            assert same[:, :3].all()
            assert not same[:, 3].any()


@pytest.mark.parametrize("width", [256, 512])
def test_a_block_of_such_columns_only_is_not_written(small, width):
    for form in ("int8", "int4"):
        case = made(4 * BLOCK, form, [Part(0, 4 * BLOCK, 0, 0, width, 0)])
        case.exp_avg_scale[:] = 1e-40
        (mine,) = copied([case], DEVICE)
        one = torch.ones(width, device=DEVICE)
        column_root = one.clone()
        column_root[BLOCK : 2 * BLOCK] = 0
        coefficients = replace(ones(512 // width), row_root=one, column_root=column_root)
        kernels.Kernels([mine], DEVICE, VectorSizes(512 // width, width)).update(coefficients)
        same = (mine.exp_avg.cpu() == case.exp_avg).all(dim=1) & (
            mine.exp_avg_scale.cpu() == case.exp_avg_scale
        )
        assert same.tolist() == [False, True, False, width == 256]


@pytest.mark.parametrize("number", [3, 30])
def test_launches_do_not_grow_with_the_factored_parameters(recorded, number):
    tensor = lambda: torch.ones(15, device=DEVICE)  # noqa: E731
    shards = [
        shard(tensor(), tensor(), tensor(), [Part(0, 15, 3 * i, 0, 5, 5 * i)], nesterov=True)
        for i in range(number)
    ]
    both = kernels.Kernels(shards, DEVICE, VectorSizes(3 * number, 5 * number))
    assert both.sum_of_squares().tolist() == [5.0] * 3 * number + [3.0] * 5 * number
    one = torch.ones(5 * number, device=DEVICE)
    both.update(replace(ones(3 * number), row_root=one, column_root=one))
    launches = {name: len(kernel.launches) for name, kernel in recorded.items() if kernel.programs != [0]}
    assert launches == {
        "chunk_statistic": 0, "rows_statistic": 0, "layer_statistic": 0, "update": 1,
        "strip_statistic": 1, "panel_statistic": 1,
    }  # fmt: skip


def test_rows_of_a_strip_may_be_further_apart_than_32_bits():
    pitch = 2**30 + 8
    grad = torch.empty(2 * pitch + 8, dtype=torch.bfloat16, device=DEVICE)
    for row in range(3):
        grad[row * pitch : row * pitch + 8] = row + 1.0
    table = torch.tensor([[0, 3, 8, pitch, 0, 3, 0, 0]], device=DEVICE)
    gradients = torch.tensor([grad.data_ptr()], device=DEVICE)
    partials = torch.zeros(11, dtype=torch.float64, device=DEVICE)
    triton_factored.strip_statistic[(1,)](
        table,
        gradients,
        partials,
        None,
        grad_type=kernels.FORMATS[grad.dtype],
        in_words=False,
        width=16,
        tile=256,
        **kernels.LAUNCH,
    )
    assert partials.tolist() == [8.0, 32.0, 72.0] + [14.0] * 8
