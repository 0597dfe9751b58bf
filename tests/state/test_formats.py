"""Granularity, normalisation and momentum formats in one process, against the oracle; what they cost."""

import copy

import numpy as np
import pytest
import torch
from oracle import Oracle, RowOracle
from stepping import parameters, run, set_gradients, worst
from torch import nn

from novoscale import NovoGrad
from novoscale.memory import optimizer_state_bytes
from novoscale.sharding import blocks
from novoscale.state.formats import FORMATS
from novoscale.state.step_counts import counts_steps

OPTIONS = [
    {},
    {"normalize": "rms", "grad_averaging": True, "betas": (0.9, 0.98), "weight_decay": 0.1},
    {"norm_type": 0},
    {"maximize": True, "init_zero": True},
]


@pytest.mark.parametrize("fused", [None, False], ids=["fused", "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_row_of_a_matrix_is_a_layer(options, dtype, fused):
    params = parameters(dtype)
    optimizer = NovoGrad(params, lr=0.01, granularity="row", fused=fused, **{"preset": "paper", **options})
    oracle = RowOracle([p.detach().double().numpy() for p in params], lr=0.01, **options)
    run(params, optimizer, oracle)
    assert worst(params, oracle) < (2e-6 if dtype == torch.float32 else 2e-7)  # v is float32 always
    assert [len(optimizer.state[p]["exp_avg_sq"]) for p in params] == [5, 1, 3, 1, 1, 300]


def test_rows_of_strided_parameters_are_those_of_their_first_dimension():
    params = [
        nn.Parameter(torch.randn(40, 30).t()),
        nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)),
    ]
    optimizer = NovoGrad(
        params,
        lr=0.01,
        granularity="row",
        momentum_dtype="bfloat16",
        stochastic_rounding=False,
        preset="paper",
    )
    plain = [nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in params]
    other = NovoGrad(plain, lr=0.01, granularity="row", momentum_dtype="bfloat16", preset="paper")
    for _ in range(3):
        for p, q in zip(params, plain, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.contiguous()
        optimizer.step()
        other.step()
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))


def test_a_fused_weight_is_as_many_layers_as_said():
    torch.manual_seed(0)
    fused = torch.randn(6, 5)
    parts = [p.clone().requires_grad_() for p in fused.chunk(3)]
    fused.requires_grad_()
    optimizer, separate = (
        NovoGrad([("qkv", fused)], lr=0.1, granularity=3, preset="paper"),
        NovoGrad(parts, lr=0.1, preset="paper"),
    )
    for _ in range(3):
        fused.grad = torch.randn(6, 5) * torch.tensor([1.0, 1, 10, 10, 0, 0])[:, None]
        for p, g in zip(parts, fused.grad.chunk(3), strict=True):
            p.grad = g.clone()
        optimizer.step()
        separate.step()
    assert torch.equal(fused, torch.cat(parts))
    assert optimizer.state[fused]["exp_avg_sq"].shape == (3,)
    assert list(optimizer.layer_norms()) == ["qkv[0]", "qkv[1]", "qkv[2]"]


def test_a_row_that_is_not_finite_is_named():
    p = nn.Parameter(torch.ones(3, 4))
    optimizer = NovoGrad([("w", p)], lr=0.1, granularity="row", preset="paper")
    p.grad = torch.ones(3, 4)
    p.grad[1, 2] = torch.inf
    optimizer.step()
    assert optimizer.skipped_layers() == ["w[1]"]
    assert torch.equal(p, torch.ones(3, 4))


@pytest.mark.parametrize("momentum_dtype", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_a_step_is_off_by_no_more_than_the_spacing_of_the_format(momentum_dtype, granularity):
    options = {
        "lr": 0.01,
        "betas": (0.9, 0.98),
        "normalize": "rms",
        "grad_averaging": True,
        "granularity": granularity,
    }
    params = [nn.Parameter(torch.randn(64, 100)), nn.Parameter(torch.randn(30))]
    others = copy.deepcopy(params)
    exact, rounded = (
        NovoGrad(params, **{"preset": "paper", **options}),
        NovoGrad(others, momentum_dtype=momentum_dtype, **{"preset": "paper", **options}),
    )
    for _ in range(4):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        exact.step()
        rounded.step()
    spacing = {"bfloat16": 2**-7, "int8": 1 / 127, "int4": 1 / 7}[momentum_dtype]
    largest = exact.state[params[0]]["exp_avg"].abs().max().item()
    off = (params[0] - others[0]).abs().max().item()
    assert 0 < off <= 0.01 * 4 * 2 * spacing * largest
    if momentum_dtype != "bfloat16":  # small parameters keep float32
        assert torch.equal(params[1], others[1])


@pytest.fixture(scope="module")
def gpt2_124m():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config())


@pytest.mark.parametrize(
    ("momentum_dtype", "most"), [("float32", 4.01), ("bfloat16", 2.01), ("int8", 1.03), ("int4", 0.54)]
)
@pytest.mark.parametrize("options", [{}, {"granularity": "row"}, {"preset": "adamw"}], ids=str)
def test_bytes_of_state_of_gpt2_124m(gpt2_124m, momentum_dtype, most, options):
    numel = sum(p.numel() for p in gpt2_124m.parameters())
    assert round(numel / 1e6) == 124
    optimizer = NovoGrad(
        gpt2_124m.parameters(), momentum_dtype=momentum_dtype, **{"preset": "paper", **options}
    )
    group = optimizer.param_groups[0]
    for p in gpt2_124m.parameters():
        optimizer._init_state(p, optimizer._layouts[id(p)], group, counts_steps(group))
    # Of rows v and the number of steps; of what is factored rows, columns, and v of each element of vectors.
    more = {"row": 8 / 768, "factored": 0.0104}.get(optimizer.defaults["granularity"], 0)
    assert optimizer_state_bytes(optimizer).total / numel < most + more


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_float64_parameters_have_every_format(momentum_dtype):
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.linspace(-1, 1, 9000, dtype=torch.float64).view(90, 100)) for _ in range(2))
    optimizer, exact = (
        NovoGrad([p], lr=1e-3, momentum_dtype=momentum_dtype, preset="paper"),
        NovoGrad([q], lr=1e-3, preset="paper"),
    )
    for _ in range(3):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        optimizer.step()
        exact.step()
    form = FORMATS[momentum_dtype]
    expected = torch.float64 if momentum_dtype == "float32" else form.dtype
    assert optimizer.state[p]["exp_avg"].dtype == expected
    assert torch.allclose(p, q, rtol=0, atol=1e-3)
    assert torch.equal(p, q) == (momentum_dtype == "float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_formats_and_dtypes_of_torch_are_names_too(dtype):
    p = nn.Parameter(torch.randn(70, 70).to(dtype))
    optimizer = NovoGrad([p], momentum_dtype=torch.int8, preset="paper")
    set_gradients([p], [np.ones((70, 70))])
    optimizer.step()
    assert optimizer.param_groups[0]["momentum_dtype"] == "int8"
    assert optimizer.state[p]["exp_avg"].dtype == torch.int8
    assert optimizer.state[p]["exp_avg_scale"].dtype == torch.bfloat16
    # Its largest element has the largest code but one at least.
    assert optimizer.state[p]["exp_avg"].abs().max() >= 126


def test_the_seed_and_the_number_of_the_parameter_are_in_the_bits():
    def trained(seed, first):
        params = [nn.Parameter(torch.zeros(80, 80)) for _ in range(2)]
        optimizer = NovoGrad(
            params[::1] if first else params, lr=0.1, momentum_dtype="int4", seed=seed, preset="paper"
        )
        grad = torch.randn(80, 80, generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            for p in params:
                p.grad = grad.clone()
            optimizer.step()
        return params

    a, b = trained(0, True)
    assert not torch.equal(a, b)
    assert torch.equal(a, trained(0, True)[0])
    assert not torch.equal(a, trained(1, True)[0])


def test_an_embedding_row_without_gradient_keeps_still_and_one_that_had_some_comes_to_rest():
    p = nn.Parameter(torch.ones(50, 128))
    optimizer = NovoGrad(
        [p], lr=0.01, momentum_dtype="int8", granularity="row", betas=(0.9, 0.9), preset="paper"
    )
    for step in range(400):
        p.grad = torch.zeros_like(p)
        p.grad[0] = 1.0
        if step < 5:
            p.grad[1] = torch.randn(128)
        optimizer.step()
        if step == 350:
            before = p.detach().clone()
    assert torch.equal(p[2:], torch.ones(48, 128))
    assert torch.equal(p[1], before[1])
    assert not torch.equal(p[0], before[0])


@pytest.mark.parametrize("oracle", [Oracle, RowOracle])
def test_the_oracle_of_rows_is_another(oracle):
    """The control: what the tests above compare with does tell rows from tensors."""
    weights = [np.random.default_rng(0).standard_normal((3, 4))]
    one, other = oracle(weights, lr=0.1), Oracle(weights, lr=0.1)
    for o in (one, other):
        o.step([np.array([[1.0] * 4, [2.0] * 4, [3.0] * 4])])
    assert np.allclose(one.weights[0], other.weights[0]) == (oracle is Oracle)


def test_stored_moments_lie_in_blocks_of_the_parameter():
    assert blocks.BLOCK == 128
    assert blocks.SMALL == 4096
