"""NovoGrad in one process: Algorithm 1, its rules, and what torch's users expect of an optimizer."""

import copy
import itertools

import pytest
import torch
from oracle import Oracle, clipped, deviation
from stepping import gradients, parameters, run, set_gradients, worst
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from novoscale import NovoGrad

# ---- Algorithm 1 ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "grad_averaging": True},
        {"betas": (0.95, 0.0)},
        {"betas": (0.0, 0.98), "weight_decay": 0.1},
        {"betas": (0.0, 0.0), "eps": 0.0},
        {"init_zero": True},
        {"norm_type": 0},
        {"maximize": True, "weight_decay": 0.1},
        {"eps": 10.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.float64, 2e-7)])
def test_follows_algorithm_1(options, dtype, bound):
    # The bound of float64 is that of v, which is kept in float32.
    params = parameters(dtype)
    oracle = Oracle([p.detach().numpy() for p in params], lr=0.03, **options)
    run(params, NovoGrad(params, lr=0.03, **{"preset": "paper", **options}), oracle)
    assert worst(params, oracle) < bound


# bfloat16 is rounded stochastically, by less than one unit in the last place; float16 by half of one.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-11)])
def test_low_precision_weights_differ_by_their_own_rounding_only(dtype, bound):
    params = parameters(dtype)
    oracle = Oracle([p.detach().double().numpy() for p in params], lr=0.03)
    optimizer = NovoGrad(params, lr=0.03, preset="paper")
    grads = set_gradients(params, gradients(0))
    optimizer.step()
    oracle.step(grads)
    assert worst(params, oracle) <= bound
    for p, m in zip(params, oracle.m, strict=True):
        assert optimizer.state[p]["exp_avg"].dtype == torch.float32
        assert deviation(optimizer.state[p]["exp_avg"].numpy(), m) < 1e-6


def test_statistic_of_float16_gradients_does_not_overflow():
    p = nn.Parameter(torch.zeros(100, dtype=torch.float16))
    p.grad = torch.full_like(p, 60000.0)
    optimizer = NovoGrad([p], lr=1.0, preset="paper")
    optimizer.step()
    assert optimizer.state[p]["exp_avg_sq"].item() == pytest.approx(100 * 60000.0**2, rel=1e-2)
    assert torch.allclose(p, torch.full_like(p, -0.1), rtol=1e-3)


@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_max_grad_norm_is_clip_grad_norm(limit):
    ours, theirs = parameters(), parameters()
    optimizer, plain = (
        NovoGrad(ours, lr=0.03, max_grad_norm=limit, preset="paper"),
        NovoGrad(theirs, lr=0.03, preset="paper"),
    )
    oracle = Oracle([p.detach().numpy() for p in ours], lr=0.03)
    for step in range(5):
        grads = set_gradients(ours, gradients(step))
        set_gradients(theirs, gradients(step))
        oracle.step(clipped(grads, limit))
        optimizer.step()
        nn.utils.clip_grad_norm_(theirs, limit)
        plain.step()
    assert worst(ours, oracle) < 2e-6
    for a, b in zip(ours, theirs, strict=True):
        assert deviation(a.detach().numpy(), b.detach().numpy()) < 5e-6


def test_max_grad_norm_counts_all_groups_together():
    params = parameters()
    groups = [{"params": params[:2], "lr": 0.03}, {"params": params[2:], "lr": 0.03}]
    oracle = Oracle([p.detach().numpy() for p in params], lr=0.03)
    run(params, NovoGrad(groups, max_grad_norm=0.1, preset="paper"), oracle, clip=0.1)
    assert worst(params, oracle) < 2e-6


def test_groups_have_their_own_options():
    params = parameters()
    groups = [
        {"params": params[:3], "lr": 0.1, "weight_decay": 0.2, "betas": [0.5, 0.7]},
        {"params": params[3:], "grad_averaging": True, "norm_type": 0},
    ]
    optimizer = NovoGrad(groups, lr=0.01, preset="paper")
    first = Oracle([p.detach().numpy() for p in params[:3]], lr=0.1, weight_decay=0.2, betas=(0.5, 0.7))
    second = Oracle([p.detach().numpy() for p in params[3:]], lr=0.01, grad_averaging=True, norm_type=0)
    for step in range(6):
        grads = set_gradients(params, gradients(step))
        optimizer.step()
        first.step(grads[:3])
        second.step(grads[3:])
    assert max(worst(params[:3], first), worst(params[3:], second)) < 2e-6


# ---- the rules that frameworks and real models need -------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"reg_inside_moment": False}, {"bias_correction": True}, {"init_zero": True}], ids=str
)
def test_layer_without_gradient_from_the_start_is_bit_for_bit_unchanged(options):
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = NovoGrad(params, lr=0.1, weight_decay=0.5, **{"preset": "paper", **options})
    for step in range(3):
        set_gradients(params, gradients(step))
        params[0].grad.zero_()
        optimizer.step()
    assert torch.equal(params[0], before[0])
    assert not any(t.any() for t in optimizer.state[params[0]].values())
    assert not torch.equal(params[1], before[1])


def test_late_layer_starts_as_if_it_were_the_first_step():
    late, fresh = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer, other = (
        NovoGrad([late], lr=0.1, bias_correction=True, preset="paper"),
        NovoGrad([fresh], lr=0.1, bias_correction=True, preset="paper"),
    )
    for _ in range(5):
        late.grad = torch.zeros(4)
        optimizer.step()
    late.grad = fresh.grad = torch.arange(4.0)
    optimizer.step()
    other.step()
    assert torch.equal(late, fresh)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("norm_type", [0, 2])
@pytest.mark.parametrize("when", [0, 2])
def test_nonfinite_gradient_changes_nothing_and_is_told_by_name(value, norm_type, when):
    named = dict(zip(["a", "b", "c", "d", "e", "f"], parameters(), strict=True))
    params = list(named.values())
    optimizer = NovoGrad(named.items(), lr=0.1, weight_decay=0.1, norm_type=norm_type, preset="paper")
    for step in range(when):
        set_gradients(params, gradients(step))
        optimizer.step()
    before = copy.deepcopy([[p.detach(), dict(optimizer.state[p])] for p in params])
    set_gradients(params, gradients(9))
    named["c"].grad[1, 1, 0] = value
    optimizer.step()
    for p, (weight, state) in zip(params, before, strict=True):
        assert torch.equal(p, weight)
        for key, kept in state.items():
            assert torch.equal(optimizer.state[p][key], kept)
        assert when or not any(t.any() for t in optimizer.state[p].values())
    assert optimizer.skipped_steps == 1
    assert optimizer.skipped_layers() == ["c"]
    set_gradients(params, gradients(10))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert not torch.equal(params[0], before[0][0])


def test_statistic_beyond_float32_skips_the_step_rather_than_poison_v():
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = NovoGrad([p], lr=0.1, preset="paper")
    p.grad = torch.full_like(p, 1e30)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert not p.any()


def test_gradients_are_never_written_to():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        params = parameters(dtype)
        optimizer = NovoGrad(
            params, lr=0.1, weight_decay=0.1, max_grad_norm=0.1, maximize=True, preset="paper"
        )
        for step in range(2):
            set_gradients(params, gradients(step))
            kept = [p.grad.clone() for p in params]
            optimizer.step()
            assert all(torch.equal(p.grad, g) for p, g in zip(params, kept, strict=True))


def test_parameters_without_gradient_get_no_state():
    params = parameters()
    optimizer = NovoGrad(params, lr=0.1, preset="paper")
    optimizer.step()
    assert not optimizer.state
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert list(optimizer.state) == [params[1]]
    assert optimizer.layer_norms() == {"parameter 1 of param group 0": pytest.approx(7**0.5)}


def test_state_is_4_bytes_per_parameter_and_4_per_layer():
    from novoscale.memory import optimizer_state_bytes

    params = parameters()
    for options, expected in (({}, 4), ({"betas": (0, 0.98)}, 0)):
        optimizer = NovoGrad(params, lr=0.1, **{"preset": "paper", **options})
        set_gradients(params, gradients(0))
        optimizer.step()
        elements = sum(p.numel() for p in params)
        assert optimizer_state_bytes(optimizer).total == expected * elements + 4 * len(params)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "sliced", "gradient only"])
def test_any_memory_layout(layout):
    torch.manual_seed(0)
    base = {
        "transposed": lambda: torch.randn(700, 300).t(),
        "channels_last": lambda: torch.randn(6, 50, 20, 30).to(memory_format=torch.channels_last),
        "sliced": lambda: torch.randn(300, 1400)[:, ::2],
        "gradient only": lambda: torch.randn(300, 700),
    }[layout]()
    p = base.requires_grad_() if base.is_leaf else base.detach().requires_grad_()
    oracle = Oracle([p.detach().numpy()], lr=0.1, weight_decay=0.1)
    optimizer = NovoGrad([p], lr=0.1, weight_decay=0.1, preset="paper")
    for _ in range(3):
        g = torch.randn(p.shape)
        p.grad = g.t().contiguous().t() if layout == "gradient only" else g
        oracle.step([g.numpy()])
        optimizer.step()
    assert worst([p], oracle) < 2e-6


# ---- as torch's optimizers behave -----------------------------------------------------------------


def test_schedulers_and_tensor_learning_rates():
    for lr in (0.1, torch.tensor(0.1), torch.tensor([0.1], dtype=torch.float64)):
        params = parameters()
        optimizer = NovoGrad(params, lr=lr, preset="paper")
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        oracle = Oracle([p.detach().numpy() for p in params], lr=0.1)
        for step in range(4):
            oracle.lr = 0.1 / (1 + step)
            grads = set_gradients(params, gradients(step))
            optimizer.step()
            oracle.step(grads)
            scheduler.step()
        assert worst(params, oracle) < 2e-6


def test_one_cycle_momentum():
    params = parameters()
    optimizer = NovoGrad(params, lr=0.1, preset="paper")
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    oracle = Oracle([p.detach().numpy() for p in params], lr=0.1)
    for step in range(8):
        group = optimizer.param_groups[0]
        oracle.lr, oracle.betas = group["lr"], tuple(group["betas"])
        grads = set_gradients(params, gradients(step))
        optimizer.step()
        oracle.step(grads)
        scheduler.step()
    assert worst(params, oracle) < 2e-6


def test_closure_is_evaluated_with_gradients_and_its_loss_returned():
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = NovoGrad([p], lr=0.5, preset="paper")

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert p.item() == pytest.approx(2.5)


def test_step_hooks_and_named_parameters():
    model = nn.Linear(3, 2)
    optimizer = NovoGrad(model.named_parameters(), lr=0.1, preset="paper")
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert calls == ["pre", "post"]
    assert set(optimizer.layer_norms()) == {"weight", "bias"}
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_added_group_is_stepped():
    params = parameters()
    optimizer = NovoGrad(params[:2], lr=0.03, preset="paper")
    optimizer.add_param_group({"params": params[2:]})
    oracle = Oracle([p.detach().numpy() for p in params], lr=0.03)
    run(params, optimizer, oracle)
    assert worst(params, oracle) < 2e-6


def test_optimizer_keeps_no_parameter_alive():
    import gc
    import weakref

    p = nn.Parameter(torch.ones(3))
    optimizer = NovoGrad([p], lr=0.1, preset="paper")
    p.grad = torch.ones(3)
    optimizer.step()
    gone = weakref.ref(p)
    optimizer.param_groups[0]["params"] = []
    optimizer.state.clear()
    del p
    gc.collect()
    assert gone() is None


def test_loss_goes_down_on_a_real_problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    x = torch.randn(256, 8)
    y = torch.sin(x.sum(1, keepdim=True))
    optimizer = NovoGrad(model.parameters(), lr=0.01, betas=(0.9, 0.98), preset="paper")
    losses = []
    for _ in itertools.repeat(None, 300):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
