"""preset="muon": one scalar second moment for each layer, and an orthogonal direction for hidden matrices."""

import copy
import io
import math
import warnings

import numpy as np
import pytest
import torch
from oracle import MuonOracle, Oracle, deviation
from torch import nn

from novoscale import NovoGrad, param_groups, release_gradients
from novoscale.kernels import orthogonal
from novoscale.optimizer import presets

HIDDEN = {"preset": "muon", "orthogonalize": True}


def parameters(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def gradients(params, steps, seed=1):
    """Of every magnitude: a scalar for each layer makes them alike."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            (torch.randn(p.shape, generator=generator) * 10.0 ** (n - i)).to(p.dtype)
            for i, p in enumerate(params)
        ]
        for n in range(steps)
    ]


def train(optimizer, params, grads):
    for each in grads:
        for p, g in zip(params, each, strict=True):
            p.grad = g.clone()
        optimizer.step()


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(
    ("shape", "layers"),
    [((64, 96), 1), ((300, 8), 1), ((96, 64), 3), ((4, 32, 48), 4), ((6, 8, 10), 3), ((16, 8, 3, 3), 1)],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False, "maximize": True},
        {"betas": (0.0, 0.9)},
        {"ns_steps": 3},
        {"row_normalize": True},
    ],
)
def test_trajectory_is_that_of_the_oracle(shape, layers, options, fused):
    (p,) = parameters([shape])
    of_oracle = {"steps": options["ns_steps"]} if "ns_steps" in options else options
    expected = MuonOracle([p.detach().numpy()], 0.04, weight_decay=0.1, layers=layers, **of_oracle)
    granularity = layers if layers > 1 else "tensor"
    optimizer = NovoGrad(
        [p], lr=0.01, weight_decay=0.1, granularity=granularity, fused=fused, **HIDDEN, **options
    )
    for grads in gradients([p], 6):
        expected.step([g.numpy() for g in grads])
        train(optimizer, [p], [grads])
    assert deviation(p.detach().numpy(), expected.weights[0]) < 2e-6
    assert optimizer.state[p]["exp_avg_sq"].shape == (layers,)
    if "row_normalize" in options:
        rows = shape[1] * layers if len(shape) == 3 and layers == shape[0] else shape[0]
        assert optimizer.state[p]["direction_avg_sq"].shape == (rows,)


def test_all_else_has_one_scalar_for_each_tensor():
    model = nn.ModuleDict({"embed": nn.Embedding(11, 8), "hidden": nn.Linear(8, 6)})
    optimizer = NovoGrad(model.named_parameters(), lr=0.01, preset="muon")
    p = model["embed"].weight
    (grads,) = gradients([p], 1)
    before = p.detach().numpy().copy()
    train(optimizer, [p], [grads])
    g = grads[0].double().numpy()
    # The first step of NAdam with one second moment: beta1*m/(1 - beta1**2) + (1 - beta1)*u/(1 - beta1).
    u = g / np.sqrt((g**2).mean())
    m = 0.05 * u
    expected = before - 0.01 * (0.95 * m / (1 - 0.95**2) + 0.05 * u / 0.05)
    assert deviation(p.detach().numpy(), expected) < 1e-6
    assert optimizer.state[p]["exp_avg_sq"].shape == (1,)


def test_hidden_matrices_have_their_own_learning_rate_unless_one_is_given():
    named = [("embed.weight", parameters([(5, 4)])[0]), ("up.weight", parameters([(6, 4)])[0])]
    hidden, others = NovoGrad(named, lr=0.01, preset="muon").param_groups
    assert (hidden["lr"], others["lr"]) == (presets.HIDDEN_LR * 0.01, 0.01)
    hidden, others = NovoGrad([{"params": named, "lr": 0.02}], preset="muon").param_groups
    assert (hidden["lr"], others["lr"]) == (0.02, 0.02)
    with pytest.raises(ValueError, match="cannot follow a tensor: give every param group an lr"):
        NovoGrad(named, lr=torch.tensor(0.01), preset="muon")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("row_normalize", [False, True])
@pytest.mark.parametrize("momentum_dtype", ["float32", "bfloat16", "int8", "int4"])
def test_fused_and_reference_give_the_same_bits(dtype, momentum_dtype, row_normalize):
    shapes = [(64, 96), (130, 40), (8, 64, 16)]
    trained = []
    for fused in (None, False):
        params = parameters(shapes, dtype)
        groups = [{"params": params[:2]}, {"params": params[2:], "granularity": 8}]
        optimizer = NovoGrad(
            groups,
            lr=0.01,
            weight_decay=0.1,
            momentum_dtype=momentum_dtype,
            row_normalize=row_normalize,
            fused=fused,
            **HIDDEN,
        )
        train(optimizer, params, gradients(params, 4))
        trained.append([*params, *(s for p in params for s in optimizer.state[p].values())])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


@pytest.mark.parametrize("momentum_dtype", ["float32", "int8"])
def test_strided_weights_are_stepped_as_contiguous_ones(momentum_dtype):
    shape, trained = (32, 16, 3, 3), []
    for strided in (False, True):
        (p,) = parameters([shape])
        if strided:
            p.data = p.data.to(memory_format=torch.channels_last)
        optimizer = NovoGrad([p], lr=0.01, momentum_dtype=momentum_dtype, **HIDDEN)
        train(optimizer, [p], gradients([p], 3))
        trained.append(p.detach())
    assert torch.equal(*trained)


def test_the_buffer_is_bounded_and_what_is_in_it_changes_no_bit(monkeypatch):
    shapes = [(64, 96), (130, 40), (16, 64)]
    trained, largest = [], []
    zeros = torch.zeros

    def noted(*size, **options):
        made = zeros(*size, **options)
        largest[-1] = max(largest[-1], made.nbytes)
        return made

    for room in (orthogonal.BUFFER, 30_000, 1):
        monkeypatch.setattr(orthogonal, "BUFFER", room)
        largest.append(0)
        params = parameters(shapes)
        optimizer = NovoGrad(params, lr=0.01, **HIDDEN)
        train(optimizer, params, gradients(params, 1))
        monkeypatch.setattr(torch, "zeros", noted)
        train(optimizer, params, gradients(params, 2))
        monkeypatch.setattr(torch, "zeros", zeros)
        trained.append(params)
    assert all(torch.equal(a, b) for other in trained[1:] for a, b in zip(trained[0], other, strict=True))
    matrices = [4 * math.prod(s) for s in shapes]
    assert largest[0] < sum(matrices) + 3 * 512
    assert largest[1] < 30_000 + 512
    assert largest[2] < max(matrices) + 512


def test_a_matrix_without_a_gradient_yet_stays_and_one_with_nan_keeps_all():
    params = parameters([(8, 6), (6, 8)])
    before = [p.detach().clone() for p in params]
    optimizer = NovoGrad(params, lr=0.1, weight_decay=0.1, **HIDDEN)
    train(optimizer, params, [[torch.zeros(8, 6), torch.ones(6, 8)]])
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[1], before[1])
    after = params[1].detach().clone()
    train(optimizer, params, [[torch.full((8, 6), math.nan), torch.ones(6, 8)]])
    assert torch.equal(params[1], after)
    assert torch.equal(params[0], before[0])
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("row_normalize", [False, True])
@pytest.mark.parametrize("momentum_dtype", ["float32", "int8"])
def test_resuming_gives_the_same_bits(momentum_dtype, row_normalize):
    model = nn.ModuleDict({"embed": nn.Embedding(64, 80), "up": nn.Linear(80, 70), "head": nn.Linear(70, 64)})
    options = {"lr": 0.01, "preset": "muon", "momentum_dtype": momentum_dtype}
    options["row_normalize"] = row_normalize
    params, optimizer = [*model.parameters()], NovoGrad(model.named_parameters(), **options)
    grads = gradients(params, 4)
    train(optimizer, params, grads[:2])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed = copy.deepcopy(model)
    again = NovoGrad(resumed.named_parameters(), **options)
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    train(optimizer, params, grads[2:])
    train(again, [*resumed.parameters()], grads[2:])
    for a, b in zip(params, resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_released_gradients_give_the_same_bits():
    trained = []
    for releases in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20))
        groups = param_groups(model, preset="muon", exclude=["2.*"])
        optimizer = NovoGrad(groups, lr=0.01, momentum_dtype="int8")
        if releases:
            release_gradients(model, optimizer)
        for n in range(3):
            model(torch.randn(4, 20, generator=torch.Generator().manual_seed(n))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append([*model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


@pytest.mark.parametrize("scaled", [False, True])
def test_loss_scale_and_clipping_do_what_they_do_elsewhere(scaled):
    """The scalar takes the factor out but for the running averages; a GradScaler's is exact."""
    params, other = parameters([(16, 24)]), parameters([(16, 24)])
    grads = gradients(params, 3)
    train(NovoGrad(params, lr=0.01, max_grad_norm=1.0, **HIDDEN), params, grads)
    optimizer = NovoGrad(other, lr=0.01, max_grad_norm=1.0, **HIDDEN)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    for (g,) in grads:
        loss = (other[0] * g).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    torch.testing.assert_close(params[0], other[0], rtol=0, atol=1e-6)


def test_learning_rates_change_from_step_to_step():
    (p,) = parameters([(12, 20)])
    optimizer = NovoGrad([p], lr=0.01, **HIDDEN)
    grads = gradients([p], 2)
    train(optimizer, [p], grads[:1])
    optimizer.param_groups[0]["lr"] = 0.0
    before = p.detach().clone()
    train(optimizer, [p], grads[1:])
    assert torch.equal(p, before)


def test_muon_and_adamw_in_one_optimizer():
    params = parameters([(16, 24), (16, 24)])
    alone = parameters([(16, 24), (16, 24)])
    grads = gradients(params, 3)
    groups = [{"params": params[:1], "preset": "adamw"}, {"params": params[1:], **HIDDEN}]
    train(NovoGrad(groups, lr=0.01, seed=3), params, grads)
    train(NovoGrad(alone[:1], lr=0.01, preset="adamw"), alone[:1], [g[:1] for g in grads])
    train(NovoGrad(alone[1:], lr=0.01, **HIDDEN), alone[1:], [g[1:] for g in grads])
    assert all(torch.equal(a, b) for a, b in zip(params, alone, strict=True))


def test_without_orthogonalize_nothing_is_made_orthogonal():
    (p,) = parameters([(16, 24)])
    expected = Oracle(
        [p.detach().numpy()],
        0.01,
        betas=(0.95, 0.98),
        grad_averaging=True,
        normalize="rms",
    )
    optimizer = NovoGrad(
        [p],
        lr=0.01,
        preset="muon",
        orthogonalize=False,
        nesterov=False,
        bias_correction=False,
        init_zero=False,
    )
    for grads in gradients([p], 3):
        expected.step([g.numpy() for g in grads])
        train(optimizer, [p], [grads])
    assert deviation(p.detach().numpy(), expected.weights[0]) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "row"}, "granularity='row': a layer is one matrix there"),
        ({"granularity": "factored"}, "granularity='factored': a layer is one matrix"),
        ({"granularity": "element"}, "granularity='element': a layer is one matrix"),
        ({"norm_type": 0, "normalize": "norm"}, "norm_type=0: use norm_type=2"),
        ({"reg_inside_moment": False}, "reg_inside_moment=False: the normalised gradient enters the moment"),
        ({"clip_threshold": 1.0}, "clip_threshold=1.0: the direction has one size"),
        ({"scale_parameter": True}, "scale_parameter=True: the direction has one size"),
        ({"ns_steps": 0}, "ns_steps must be an integer of at least 1"),
        ({"ns_steps": True}, "ns_steps must be an integer of at least 1"),
    ],
)
def test_options_that_contradict_orthogonalize_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        NovoGrad(parameters([(4, 6)]), lr=0.1, **HIDDEN, **options)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (6, 1), (), (1, 6, 1)])
def test_what_is_no_matrix_is_refused_by_name(shape):
    with pytest.raises(ValueError, match=r"bias has the shape .* orthogonalize=True is for matrices"):
        NovoGrad([("bias", nn.Parameter(torch.ones(shape)))], lr=0.1, **HIDDEN)


def test_loading_leaves_it_to_the_optimizer_what_is_orthogonalised():
    params, others = parameters([(4, 6), (6,)]), parameters([(4, 6), (6,)])
    groups = [{"params": params[:1], "orthogonalize": True}, {"params": params[1:], "orthogonalize": False}]
    optimizer = NovoGrad(groups, lr=0.1, preset="muon")
    plain = NovoGrad(
        [{"params": others[:1]}, {"params": others[1:]}], lr=0.2, preset="muon", orthogonalize=False
    )
    train(plain, others, gradients(others, 2))
    saved = plain.state_dict()
    del saved["param_groups"][0]["orthogonalize"]  # as of before there was the option
    optimizer.load_state_dict(saved)
    assert [(g["orthogonalize"], g["lr"]) for g in optimizer.param_groups] == [(True, 0.2), (False, 0.2)]
    train(optimizer, params, gradients(params, 1))


def test_int4_is_taken_with_one_line_and_int8_without():
    with pytest.warns(UserWarning, match="int8 ends nearer to float32") as said:
        NovoGrad(parameters([(4, 6)]), lr=0.1, momentum_dtype="int4", **HIDDEN)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NovoGrad(parameters([(4, 6)]), lr=0.1, momentum_dtype="int8", **HIDDEN)
        NovoGrad(parameters([(4, 6)]), lr=0.1, momentum_dtype="int4")


def test_row_normalize_without_directions_is_refused_and_no_state_of_them_is_a_start():
    with pytest.raises(ValueError, match="row_normalize=True is for the rows of orthogonal directions"):
        NovoGrad(parameters([(4, 6)]), lr=0.1, row_normalize=True)
    params, others = parameters([(4, 6)]), parameters([(4, 6)])
    grads = gradients(params, 2)
    optimizer, other = (
        NovoGrad(p, lr=0.1, row_normalize=n, **HIDDEN) for p, n in ((params, False), (others, True))
    )
    train(optimizer, params, grads[:1])
    saved = optimizer.state_dict()
    saved["param_groups"][0]["row_normalize"] = True
    other.load_state_dict(saved)
    train(other, others, grads[1:])
    assert other.state[others[0]]["direction_avg_sq"].shape == (4,)
    wrong = other.state_dict()
    wrong["state"][0]["direction_avg_sq"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"direction_avg_sq of .* has 3 elements"):
        other.load_state_dict(wrong)


def test_a_vector_that_is_to_be_orthogonalised_is_refused_at_the_step():
    (p,) = parameters([(6,)])
    optimizer = NovoGrad([p], lr=0.1, preset="muon", orthogonalize=False)
    optimizer.param_groups[0]["orthogonalize"] = True
    p.grad = torch.ones(6)
    before = p.detach().clone()
    with pytest.raises(ValueError, match="orthogonalize=True is for matrices"):
        optimizer.step()
    assert torch.equal(p, before)
