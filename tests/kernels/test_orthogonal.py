"""The update of matrices along orthogonal directions: the same bits in C++, Triton and plain torch."""

from dataclasses import replace

import against_reference
import pytest
import torch
from against_reference import CPU, DTYPES, Part, copied, moment, random_coefficients, shard, values

from novoscale.kernels import cpu, orthogonal, reference
from novoscale.kernels.interface import VectorSizes
from novoscale.kernels.orthogonal import Directions
from novoscale.kernels.shards import Matrices, ShardTensors
from novoscale.state.formats import FORMATS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of Triton's interpreter
SHAPES = [(12, 20), (36, 6), (2, 9, 16)]  # the last is two matrices; blocks and tiles end within each
LAYERS = [1, 3, 2]


def shards(param, grad, form, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    made, first = [], 0
    for group, (shape, layers) in enumerate(zip(SHAPES, LAYERS, strict=True)):
        numel = torch.Size(shape).numel()
        parts = [Part(0, numel, 0, 0, numel // layers)]
        weights, gradient = (values(shape, dtype, generator) for dtype in (param, grad))
        exp_avg, scale = moment(form, parts, numel, generator, 0, 0.0)
        if exp_avg is not None and not FORMATS[form].largest:
            exp_avg = exp_avg.view(shape)
        of_layer = shape[-2:] if len(shape) > 2 else (shape[0] // layers, shape[1])
        own = {"group": group, "matrices": Matrices(*of_layer, 5), **options}
        made.append(shard(weights, gradient, exp_avg, parts, first=first, scale=scale, **own))
        first += layers
    return made


def coefficients():
    made = random_coefficients(sum(LAYERS), torch.Generator().manual_seed(5))
    return replace(made, lr=torch.tensor([0.1, 0.02, 0.003, 1.0, 1.0], dtype=torch.float64))


def step(module, mine, steps=2):
    kernels = Directions(mine, CPU, VectorSizes(sum(LAYERS)), module.Kernels)
    statistics = []
    for _ in range(steps):
        kernels.hold(lambda i: ShardTensors(*(getattr(mine[i], name) for name in ShardTensors._fields)))
        statistics.append(kernels.sum_of_squares())
        kernels.update(coefficients())
        kernels.release()
    return statistics


@pytest.fixture(params=["cpu", "triton"])
def module(request, monkeypatch):
    if request.param == "cpu":
        return cpu
    triton = pytest.importorskip("novoscale.kernels.triton.elements", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("directions are of bfloat16 on a GPU")
    monkeypatch.setattr(triton, "CHUNK", 512)
    monkeypatch.setattr(triton, "TILE", 256)
    return triton


@pytest.mark.parametrize(
    ("param", "grad", "form"),
    [
        *((torch.float32, torch.float32, form) for form in [*FORMATS, None]),
        *((torch.bfloat16, torch.bfloat16, form) for form in [*FORMATS, None]),
        (torch.float16, torch.float32, "int8"),
    ],
    ids=str,
)
def test_every_implementation_gives_the_bits_of_the_reference(module, param, grad, form):
    options = {"nesterov": form is not None, "stochastic_rounding": True, "decays": form != "bfloat16"}
    given = shards(param, grad, form, **options)
    mine, expected = copied(given, CPU), copied(given, CPU)
    step(reference, expected)
    for statistic in step(module, mine):
        against_reference.assert_same_statistic(statistic, given, sum(LAYERS))
    against_reference.assert_same_bits(mine, expected)
    assert not torch.equal(mine[0].param, given[0].param) or not coefficients().active[0]


def test_a_buffer_may_lie_elsewhere_at_each_step(module, monkeypatch):
    given = shards(torch.float32, torch.float32, "int8", nesterov=True)
    mine, expected = copied(given, CPU), copied(given, CPU)
    step(reference, expected, steps=3)
    kept, zeros = [], torch.zeros

    def elsewhere(*size, **options):
        kept.append(zeros(*size, **options))
        return kept[-1]

    monkeypatch.setattr(torch, "zeros", elsewhere)
    step(module, mine, steps=3)
    against_reference.assert_same_bits(mine, expected)


def test_a_layer_that_is_not_active_is_left_as_it_is(module):
    given = shards(torch.bfloat16, torch.bfloat16, "int8", nesterov=True, stochastic_rounding=True)
    mine = copied(given, CPU)
    still = [index for index, active in enumerate(coefficients().active.tolist()) if not active]
    assert still
    step(module, mine)
    first = 0
    for after, before, layers in zip(mine, given, LAYERS, strict=True):
        for layer in range(layers):
            own = slice(layer * before.param.numel() // layers, (layer + 1) * before.param.numel() // layers)
            same = torch.equal(after.param.view(-1)[own], before.param.view(-1)[own])
            assert same == (first + layer in still)
        first += layers


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_directions_are_wider_than_the_weights_on_a_cpu(dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert orthogonal.direction_dtype(dtype, "cpu") == expected
    assert orthogonal.direction_dtype(dtype, "cuda") == (dtype if dtype == torch.float64 else torch.bfloat16)


def test_batches_depend_on_the_sizes_alone_and_hold_as_many_as_fit(monkeypatch):
    given = shards(torch.float32, torch.float32, None)
    sizes = [4 * 256, 4 * 256, 4 * 384]  # rounded up to 128 elements
    for room, expected in (
        (sum(sizes), [[0, 1, 2]]),
        (sizes[0] + sizes[1], [[0, 1], [2]]),
        (1, [[0], [1], [2]]),
    ):
        monkeypatch.setattr(orthogonal, "BUFFER", room)
        assert list(orthogonal.batches(given)) == expected
