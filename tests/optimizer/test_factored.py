"""granularity="factored", "element", Nesterov, clip_threshold and scale_parameter, against the oracle."""

import copy
import itertools

import numpy as np
import pytest
import torch
from oracle import FactoredOracle, Oracle, deviation
from torch import nn

from novoscale import NovoGrad

SHAPES = [(5, 7), (7,), (3, 2, 4), (1,), (), (4, 3, 2, 2), (130, 60), (9, 1), (1, 6), (2, 3, 5, 4)]
ADAMW = {"preset": "adamw", "lr": 0.01}


def parameters(dtype=torch.float32, seed=0, shapes=SHAPES):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes]


def gradients(step, shapes=SHAPES, zeros=True):
    """Rows and columns of all magnitudes; some of them, and whole parameters, zero at first."""
    rng = np.random.default_rng(step)
    found = []
    for index, shape in enumerate(shapes):
        g = rng.standard_normal(shape) * 10 ** rng.uniform(-3, 1)
        if len(shape) > 1:
            g = (
                g
                * 10 ** rng.uniform(-2, 2, (shape[0], *[1] * (len(shape) - 1)))
                * 10 ** rng.uniform(-2, 2, shape[-1:])
            )
        if zeros and step < 3 and g.ndim:
            g[: shape[0] // 2] = 0
            if g.ndim > 1:
                g[..., : shape[-1] // 3] = 0
            if index % 3 == step % 3:
                g = g * 0
        found.append(g)
    return found


def train(params, optimizer, oracle, steps=8, **kind):
    for step in range(steps):
        grads = gradients(step, [tuple(p.shape) for p in params], **kind)
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.as_tensor(g).to(p.dtype).reshape(p.shape)
        optimizer.step()
        oracle.step([p.grad.double().numpy() for p in params])


def worst(params, oracle):
    return max(deviation(p.detach().double().numpy(), w) for p, w in zip(params, oracle.weights, strict=True))


OPTIONS = [
    {},
    {"nesterov": False},
    {"bias_correction": False},
    {"bias_correction": False, "init_zero": False},
    {"init_zero": False},
    {"grad_averaging": False, "bias_correction": False},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "reg_inside_moment": False},
    {"reg_inside_moment": False, "nesterov": False},
    {"maximize": True},
    {"eps": 0.1},
    {"betas": (0.0, 0.9)},
    {"betas": (0.8, 0.0)},
    {"clip_threshold": 0.3},
    {"clip_threshold": 1.0, "bias_correction": False, "init_zero": False},
    {"scale_parameter": True, "weight_decay": 0.1},
    {"scale_parameter": True, "clip_threshold": 0.5},
]


@pytest.mark.parametrize("fused", [False, None], ids=["reference", "default kernel"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_option_follows_the_oracle(options, fused):
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 3e-5)):
        params = parameters(dtype)
        oracle = FactoredOracle([p.detach().numpy() for p in params], lr=0.01, **options)
        optimizer = NovoGrad(params, **{"preset": "paper", **ADAMW, **options}, fused=fused)
        train(params, optimizer, oracle)
        # v is float32 whatever the parameters are.
        assert worst(params, oracle) < max(bound, 3e-6)


def test_unseen_rows_columns_and_parameters_are_left_as_they_are():
    p, unused = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(3, 3))
    before, unchanged = p.detach().clone(), unused.detach().clone()
    optimizer = NovoGrad([p, unused], lr=0.1, preset="adamw", weight_decay=0.5)
    for _ in range(3):
        p.grad, unused.grad = torch.ones(4, 6), torch.zeros(3, 3)
        p.grad[1] = 0
        p.grad[:, 2] = 0
        optimizer.step()
    assert torch.equal(p[1], before[1])
    assert torch.equal(p[:, 2], before[:, 2])
    rest = torch.tensor([0, 2, 3])[:, None], torch.tensor([0, 1, 3, 4, 5])
    assert (p[rest] != before[rest]).all()
    assert torch.equal(unused, unchanged)
    assert optimizer.state[unused]["step"].tolist() == [0]
    assert optimizer.state[p]["step"].tolist() == [3]


def test_state_is_a_number_for_each_row_and_column_and_one_count():
    params = parameters(shapes=[(5, 7), (7,), (4, 3, 2, 2), (6, 2, 9), ()])
    optimizer = NovoGrad(params, **{"preset": "paper", **ADAMW})
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    shapes = [{k: tuple(v.shape) for k, v in optimizer.state[p].items() if k != "exp_avg"} for p in params]
    assert shapes == [
        {"exp_avg_sq_row": (5,), "exp_avg_sq_col": (7,), "step": (1,)},
        {"exp_avg_sq": (7,), "step": (1,)},
        {"exp_avg_sq_row": (4,), "exp_avg_sq_col": (3, 2, 2), "step": (1,)},
        {"exp_avg_sq_row": (6, 2), "exp_avg_sq_col": (9,), "step": (1,)},
        {"exp_avg_sq": (1,), "step": (1,)},
    ]
    assert all(t.dtype == torch.float32 for p in params for t in optimizer.state[p].values())


def test_a_vector_has_adams_second_moments():
    """On a gradient that is never zero: as torch's NAdam with a constant beta1."""
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 50, dtype=torch.float64)) for _ in range(2))
    nadam = torch.optim.NAdam([theirs], lr=0.01, betas=(0.9, 0.98), momentum_decay=1e9)
    # Its order is the other one: the average of the gradients, then the division.
    mine = NovoGrad([ours], **{"preset": "paper", **ADAMW}, reg_inside_moment=False)
    for step in range(20):
        g = torch.randn(50, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        ours.grad, theirs.grad = g.clone(), g.clone()
        mine.step()
        nadam.step()
    assert deviation(ours.detach().numpy(), theirs.detach().numpy()) < 1e-6


def test_granularity_element_is_for_vectors_and_follows_the_oracle():
    options = {"lr": 0.01, "betas": (0.9, 0.98), "granularity": "element", "init_zero": True}
    params = parameters(torch.float64, shapes=[(7,), (1,), (), (300,)])
    oracle = FactoredOracle(
        [p.detach().numpy() for p in params],
        lr=0.01,
        bias_correction=False,
        grad_averaging=False,
        nesterov=False,
    )
    train(params, NovoGrad(params, **{"preset": "paper", **options}), oracle)
    assert worst(params, oracle) < 3e-6
    matrix = nn.Parameter(torch.ones(30, 40))
    says = r'w has the shape \(30, 40\).*1,200 second moments here, 4,800 bytes.*"factored", which keeps 70'
    with pytest.raises(ValueError, match=says):
        NovoGrad([("w", matrix)], **{"preset": "paper", **options})
    optimizer = NovoGrad([("v", params[0])], **{"preset": "paper", **options})
    with pytest.raises(ValueError, match=says):
        optimizer.add_param_group({"params": [("w", matrix)]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("normalize", ["norm", "rms"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_clip_threshold_and_scale_parameter_with_other_granularities(granularity, normalize):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(6, 9, dtype=torch.float64))
    w, m, v = p.detach().numpy().copy(), np.zeros((6, 9)), np.zeros(6)
    optimizer = NovoGrad(
        [p],
        lr=0.1,
        granularity=granularity,
        normalize=normalize,
        clip_threshold=0.05,
        scale_parameter=True,
        preset="paper",
    )
    for step in range(5):
        g = np.random.default_rng(step).standard_normal((6, 9)) * (5.0 if step == 3 else 0.1)
        p.grad = torch.from_numpy(g)
        optimizer.step()
        S = (g**2).sum(axis=1)
        if granularity == "tensor":
            S = np.full(6, S.sum())
        v = S if step == 0 else 0.98 * v + 0.02 * S
        count = {"row": 9, "tensor": 54}[granularity] if normalize == "rms" else 1
        u = g / np.sqrt(v / count)[:, None]
        # rms(u) by its definition, from the elements.
        u = u / max(1.0, np.sqrt((u**2).mean()) / 0.05) * max(1e-3, np.sqrt((w**2).mean()))
        m = 0.95 * m + u
        w = w - 0.1 * m
    assert deviation(p.detach().numpy(), w) < 1e-6


def test_a_weight_changed_from_outside_has_its_present_norm():
    p, q = (nn.Parameter(torch.ones(8, 8)) for _ in range(2))
    options = {"lr": 0.1, "preset": "adamw", "scale_parameter": True, "betas": (0.0, 0.0)}
    one, other = (
        NovoGrad([p], **{"preset": "paper", **options}),
        NovoGrad([q], **{"preset": "paper", **options}),
    )
    for step in range(2):
        p.grad = q.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        with torch.no_grad():
            q.copy_(p if step == 0 else 100 * p)
        before = p.detach().clone(), q.detach().clone()
        one.step()
        other.step()
    assert deviation((q - before[1]).detach().numpy(), 100 * (p - before[0]).detach().numpy()) < 1e-4


# ---- all formats, dtypes and strides ---------------------------------------------------------------------


@pytest.mark.parametrize("momentum_dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_kernel_gives_the_bits_of_the_reference(momentum_dtype, dtype):
    """The sums differ in the last bit of a float64, which no second moment in float32 shows here."""
    shapes = [(70, 130), (7,), (5000,), (33, 5, 40)]
    options = {**ADAMW, "momentum_dtype": momentum_dtype, "clip_threshold": 1.0, "scale_parameter": True}
    every = [parameters(dtype, shapes=shapes) for _ in range(2)]
    optimizers = [
        NovoGrad(params, **{"preset": "paper", **options}, fused=fused)
        for params, fused in zip(every, (False, None), strict=True)
    ]
    for step in range(5):
        for params, optimizer in zip(every, optimizers, strict=True):
            for p, g in zip(params, gradients(step, shapes), strict=True):
                p.grad = torch.as_tensor(g).to(dtype)
            optimizer.step()
    for p, q in zip(*every, strict=True):
        assert torch.equal(p, q)
        for key, value in optimizers[0].state[p].items():
            assert torch.equal(value, optimizers[1].state[q][key]), key


def test_strides_do_not_matter():
    plain = nn.Parameter(torch.randn(4, 3, 5, 6))
    other = nn.Parameter(plain.detach().clone(memory_format=torch.channels_last))
    optimizers = [NovoGrad([p], **{"preset": "paper", **ADAMW}) for p in (plain, other)]
    for step in range(4):
        g = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(step))
        plain.grad, other.grad = g, g.contiguous(memory_format=torch.channels_last)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(plain, other)


def test_a_gradient_that_is_not_finite_changes_nothing():
    params = parameters()
    optimizer = NovoGrad(params, **{"preset": "paper", **ADAMW}, clip_threshold=1.0, scale_parameter=True)
    for p, g in zip(params, gradients(5), strict=True):
        p.grad = torch.as_tensor(g).float()
    optimizer.step()
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    params[0].grad[1, 2] = float("inf")
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before[0], strict=True))
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[i][k], before[1][i][k]) for i in after for k in after[i])
    assert optimizer.skipped_layers() == ["parameter 0 of param group 0[1]"]


def test_clipping_and_loss_scale_are_folded_in():
    plain, folded = parameters(), parameters()
    one, two = (
        NovoGrad(plain, **{"preset": "paper", **ADAMW}),
        NovoGrad(folded, **{"preset": "paper", **ADAMW}, max_grad_norm=0.5),
    )
    for step in range(4):
        for p, q, g in zip(plain, folded, gradients(step), strict=True):
            p.grad, q.grad = torch.as_tensor(g).float(), 64 * torch.as_tensor(g).float()
        torch.nn.utils.clip_grad_norm_(plain, 0.5)
        two.grad_scale, two.found_inf = torch.tensor(64.0), torch.tensor(0.0)
        one.step()
        two.step()
    assert (
        max(deviation(q.detach().numpy(), p.detach().numpy()) for p, q in zip(plain, folded, strict=True))
        < 1e-5
    )


# ---- state in and out ------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum_dtype", ["float32", "int8"])
def test_a_state_dict_resumes_to_the_same_bits(momentum_dtype):
    options = {**ADAMW, "momentum_dtype": momentum_dtype}
    params = parameters(torch.bfloat16)
    optimizer = NovoGrad(params, **{"preset": "paper", **options})

    def step(params, optimizer, n):
        for p, g in zip(params, gradients(n), strict=True):
            p.grad = torch.as_tensor(g).to(p.dtype)
        optimizer.step()

    for n in range(3):
        step(params, optimizer, n)
    others = copy.deepcopy(params)
    resumed = NovoGrad(others, **{"preset": "paper", **options})
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for n in range(3, 6):
        step(params, optimizer, n)
        step(others, resumed, n)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_state_of_another_granularity_is_refused_and_nothing_changed():
    states = {}
    for granularity in ("tensor", "row", "factored"):
        p = nn.Parameter(torch.ones(6, 7))
        optimizer = NovoGrad([p], lr=0.1, granularity=granularity, normalize="rms", preset="paper")
        p.grad = torch.ones(6, 7)
        optimizer.step()
        states[granularity] = optimizer, copy.deepcopy(optimizer.state_dict())
    for one, other in itertools.permutations(states, 2):
        optimizer, before = states[one]
        with pytest.raises(
            ValueError, match=r"exp_avg_sq.* of parameter 0 .*the option granularity has to be"
        ):
            optimizer.load_state_dict(states[other][1])
        after = optimizer.state_dict()["state"][0]
        assert all(torch.equal(after[key], before["state"][0][key]) for key in after)


def test_a_granularity_that_is_changed_while_it_is_in_use_is_refused():
    p = nn.Parameter(torch.ones(6, 7))
    optimizer = NovoGrad([p], **{"preset": "paper", **ADAMW})
    p.grad = torch.ones(6, 7)
    optimizer.step()
    optimizer.param_groups[0]["granularity"] = "row"
    with pytest.raises(
        RuntimeError, match=r"granularity .* was 'one of 6 layers and of columns' and is 'row' now"
    ):
        optimizer.step()


# ---- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"granularity": "factored"},
            'granularity="factored" .* needs normalize="rms", not normalize="norm"',
        ),
        (
            {"preset": "adamw", "normalize": "norm"},
            r'granularity="factored" \(from preset=.adamw.\) .* needs normalize="rms", not normalize="norm"',
        ),
        (
            {"preset": "adamw", "norm_type": 0},
            r'granularity="factored" \(from preset=.adamw.\) .* needs norm_type=2',
        ),
        ({"clip_threshold": 1.0, "norm_type": 0}, "clip_threshold=1.0 .* needs norm_type=2"),
        ({"scale_parameter": True, "norm_type": 0}, "scale_parameter=true .* needs norm_type=2"),
        ({"scale_parameter": True, "reg_inside_moment": False}, "Set reg_inside_moment=True"),
        ({"clip_threshold": 1.0, "reg_inside_moment": False}, "Set reg_inside_moment=True"),
        ({"clip_threshold": 0.0}, "clip_threshold must be above 0; None"),
        ({"clip_threshold": -1.0}, "clip_threshold must be"),
        ({"granularity": "factord"}, "did you mean 'factored'"),
        (
            {"preset": "adam"},
            r"preset must be one of paper, adamw, muon, got 'adam' \(did you mean 'adamw'\?\)",
        ),
        ({"preset": None}, "preset must be one of"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        NovoGrad([nn.Parameter(torch.ones(3, 4))], **{"preset": "paper", **options})
    if options.get("preset", "") is not None:
        optimizer = NovoGrad([nn.Parameter(torch.ones(2))], preset="paper")
        with pytest.raises(ValueError, match=says):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 4))], **options})
        assert len(optimizer.param_groups) == 1


def test_a_flag_that_is_none_is_the_presets_and_one_of_the_wrong_kind_is_refused():
    assert (
        NovoGrad([nn.Parameter(torch.ones(2))], nesterov=None, preset="paper").defaults["nesterov"] is False
    )
    with pytest.raises(TypeError, match="nesterov must be True or False, got 1"):
        NovoGrad([nn.Parameter(torch.ones(2))], nesterov=1, preset="paper")


# ---- against what there was ------------------------------------------------------------------------------


def test_one_row_factored_is_adams_second_moment_and_one_column_that_of_rows():
    row = FactoredOracle([np.ones((1, 5))], lr=0.1)
    flat = FactoredOracle([np.ones(5)], lr=0.1)
    column = FactoredOracle([np.ones((5, 1))], lr=0.1)
    for step in range(3):
        g = np.random.default_rng(step).standard_normal(5)
        row.step([g.reshape(1, 5)])
        flat.step([g])
        column.step([g.reshape(5, 1)])
    assert deviation(row.weights[0].reshape(-1), flat.weights[0]) < 1e-12
    assert deviation(column.weights[0].reshape(-1), flat.weights[0]) < 1e-12


def test_the_paper_is_still_the_default():
    p = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
    oracle = Oracle([p.detach().numpy()], lr=0.1)
    optimizer = NovoGrad([p], lr=0.1, preset="paper")
    for step in range(4):
        g = np.random.default_rng(step).standard_normal((5, 4))
        p.grad = torch.from_numpy(g)
        optimizer.step()
        oracle.step([g])
    assert deviation(p.detach().numpy(), oracle.weights[0]) < 2e-6


def test_options_that_a_schedule_turns_on_and_off_take_effect():
    params = parameters()
    oracle = FactoredOracle([p.detach().numpy() for p in params], lr=0.01)
    optimizer = NovoGrad(params, **{"preset": "paper", **ADAMW})
    for step in range(6):
        changed = {
            "clip_threshold": [None, 0.3, None][step % 3],
            "scale_parameter": step > 3,
            "nesterov": step != 2,
        }
        optimizer.param_groups[0].update(changed)
        oracle.options.update(changed)
        grads = gradients(step)
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.as_tensor(g).float()
        optimizer.step()
        oracle.step([p.grad.double().numpy() for p in params])
    assert worst(params, oracle) < 3e-5
