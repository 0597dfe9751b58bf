"""Tables are made once, and again whenever anything has moved: the training never notices."""

import copy
import weakref
from unittest import mock

import numpy as np
import pytest
import torch
from oracle import Oracle, deviation
from torch import nn

from novoscale import NovoGrad, kernels
from novoscale.optimizer import step_tables

SHAPES = ((3, 4), (5,), (1,), (20, 7))


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def move_parameters(params, optimizer):
    for p in params:
        p.data = p.data.clone()


def move_first_moments(params, optimizer):
    for state in optimizer.state.values():
        state["exp_avg"].data = state["exp_avg"].clone()  # as DeepSpeed's engine.offload_states


def replace_states(params, optimizer):
    for p in params:
        optimizer.state[p] = {name: t.clone() for name, t in optimizer.state[p].items()}


def replace_one_second_moment(params, optimizer):
    optimizer.state[params[1]]["exp_avg_sq"] = optimizer.state[params[1]]["exp_avg_sq"].clone()


def reload(params, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def strided_gradients(params, optimizer):
    params[0].grad = params[0].grad.t().contiguous().t()


def replace_by_copies(params, optimizer):
    """New parameters in place of the old, in the same param group, as a user would."""
    new = [nn.Parameter(p.detach().clone()) for p in params]
    for p, q in zip(params, new, strict=True):
        q.grad, optimizer.state[q] = p.grad, optimizer.state.pop(p)
    optimizer.param_groups[0]["params"] = []
    optimizer.add_param_group({"params": new, "lr": 0.1})
    params[:] = new


CHANGES = [
    move_parameters,
    move_first_moments,
    replace_states,
    replace_one_second_moment,
    reload,
    strided_gradients,
    replace_by_copies,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("keep", [True, False], ids=["same gradient tensors", "new gradient tensors"])
def test_training_goes_on_when_something_has_moved(change, keep):
    params = parameters()
    oracle = Oracle([p.detach().numpy() for p in params], lr=0.1)
    optimizer = NovoGrad(params, lr=0.1, preset="paper")
    for step in range(6):
        for p, g in zip(params, gradients(step), strict=True):
            if keep and p.grad is not None:
                p.grad.copy_(g)
            else:
                p.grad = g
        if step in (2, 4):
            change(params, optimizer)
        optimizer.step()
        oracle.step([g.numpy() for g in gradients(step)])
        for p, w in zip(params, oracle.weights, strict=True):
            assert deviation(p.detach().numpy(), w) < 2e-6


def test_a_cleared_state_starts_anew():
    params = parameters()
    optimizer = NovoGrad(params, lr=0.1, preset="paper")
    for p, g in zip(params, gradients(0), strict=True):
        p.grad = g
    optimizer.step()
    optimizer.state.clear()
    oracle = Oracle([p.detach().numpy() for p in params], lr=0.1)
    optimizer.step()
    oracle.step([g.numpy() for g in gradients(0)])
    assert all(deviation(p.detach().numpy(), w) < 2e-6 for p, w in zip(params, oracle.weights, strict=True))


def test_a_parameter_that_shrinks_in_place_is_refused_by_name():
    params = parameters()
    optimizer = NovoGrad([(f"p{i}", p) for i, p in enumerate(params)], lr=0.1, preset="paper")
    for p, g in zip(params, gradients(0), strict=True):
        p.grad = g
    optimizer.step()
    params[1].grad = None
    params[1].data = params[1].data[:3]  # at the same address
    params[1].grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"p1: the tensor in param_groups had 5 elements .* and has 3 now"):
        optimizer.step()


def test_options_and_the_set_of_gradients_may_change_from_step_to_step():
    params = parameters()
    optimizer = NovoGrad(params, lr=0.1, preset="paper")
    oracles = [Oracle([p.detach().numpy()], lr=0.1) for p in params]
    rng = np.random.default_rng(0)
    for step in range(12):
        optimizer.param_groups[0]["weight_decay"] = decay = 0.1 * (step % 3)
        present = rng.random(len(params)) < 0.6
        for p, g, oracle, has in zip(params, gradients(step), oracles, present, strict=True):
            p.grad = g if has else None
            oracle.weight_decay = decay
            if has:
                oracle.step([g.numpy()])
        optimizer.step()
    for p, oracle in zip(params, oracles, strict=True):
        assert deviation(p.detach().numpy(), oracle.weights[0]) < 4e-6


def test_a_schedule_of_an_option_makes_no_new_plan():
    params = parameters()
    optimizer = NovoGrad(params, lr=0.1, preset="paper")
    with mock.patch.object(step_tables, "plan", wraps=step_tables.plan) as plans:
        for step in range(5):
            optimizer.param_groups[0]["weight_decay"] = 0.1 * step
            for p, g in zip(params, gradients(step), strict=True):
                p.grad = g
            optimizer.step()
    assert plans.call_count == 1
    assert len(optimizer._step_tables) == 1


@pytest.mark.skipif(kernels.fused("cpu") is None, reason="no C++ compiler")
@pytest.mark.parametrize("options", [{}, {"preset": "adamw", "scale_parameter": True}], ids=str)
def test_tables_are_made_once(options):
    params = parameters()
    optimizer = NovoGrad(params, lr=0.1, **{"preset": "paper", **options})
    with mock.patch.object(step_tables, "build", wraps=step_tables.build) as made:
        for step in range(4):
            for p, g in zip(params, gradients(step), strict=True):
                if p.grad is None:
                    p.grad = g
                else:
                    p.grad.copy_(g)
            optimizer.step()
    assert made.call_count == 1


def test_the_state_of_each_tensor_is_its_own():
    """No view of a vector of all: it can be saved, copied and moved by itself."""
    params = parameters()
    optimizer = NovoGrad(params, lr=0.1, bias_correction=True, preset="paper")
    for p, g in zip(params, gradients(0), strict=True):
        p.grad = g
    optimizer.step()
    for name in ("exp_avg_sq", "step"):
        states = [optimizer.state[p][name] for p in params]
        assert len({t.untyped_storage().data_ptr() for t in states}) == len(params)
        assert all(t.shape == (1,) and t.untyped_storage().nbytes() == 4 for t in states)
    assert [optimizer.state[p]["exp_avg_sq"].item() for p in params] == pytest.approx(
        [g.double().square().sum().item() for g in gradients(0)]
    )


def contiguous(g):
    return g.contiguous()


def channels_last(g):
    return g.contiguous(memory_format=torch.channels_last)


def expanded(g):
    return g.flatten()[:1].view(1, 1, 1, 1).expand(g.shape)


def of_a_larger_tensor(g):
    return torch.cat((g, g), dim=1)[:, : g.shape[1]]


def transposed(g):
    return g.transpose(0, 1).contiguous().transpose(0, 1)


ORDERS = [contiguous, channels_last, expanded, of_a_larger_tensor, transposed]


@pytest.mark.parametrize("of_param", [contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum_dtype": "int8"}, {"granularity": "row", "normalize": "rms"}, {"preset": "adamw"}],
    ids=str,
)
def test_gradients_may_have_any_order_and_another_at_each_step(of_param, options):
    """Dense in another order, expanded from one element: the step is that of a contiguous copy."""
    torch.manual_seed(0)
    weight = of_param(torch.randn(16, 8, 9, 16))
    optimizers = [
        NovoGrad([nn.Parameter(weight.clone())], lr=0.1, **{"preset": "paper", **options}) for _ in range(2)
    ]
    params = [optimizer.param_groups[0]["params"][0] for optimizer in optimizers]
    for step in range(2 * len(ORDERS)):
        params[0].grad = ORDERS[(3 * step) % len(ORDERS)](torch.randn(weight.shape))
        params[1].grad = params[0].grad.clone(memory_format=torch.contiguous_format)
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(*params)
        for name, state in optimizers[0].state[params[0]].items():
            assert torch.equal(state, optimizers[1].state[params[1]][name]), name


COST = {
    "a schedule of the weight decay": lambda group, step: group.update(weight_decay=0.01 * step),
    "cycled betas": lambda group, step: group.update(betas=(0.9 + 0.001 * step, 0.98)),
    "a schedule of eps, seed and clipping": lambda group, step: group.update(
        eps=1e-8 * step, seed=step, max_grad_norm=1.0 * step
    ),
}


@pytest.mark.skipif(kernels.fused("cpu") is None, reason="no C++ compiler")
@pytest.mark.parametrize("change", COST.values(), ids=COST)
def test_options_that_change_make_no_new_tables(change):
    params = parameters()
    optimizer = NovoGrad(params, lr=0.1, weight_decay=1.0, preset="paper")
    with mock.patch.object(step_tables, "build", wraps=step_tables.build) as made:
        for step in range(1, 6):
            change(optimizer.param_groups[0], step)
            for p, g in zip(params, gradients(step), strict=True):
                p.grad = g
            optimizer.step()
    assert made.call_count == 1


def test_sets_of_tensors_that_take_turns_have_their_tables():
    params = parameters()
    optimizer = NovoGrad(params, lr=0.1, preset="adamw")
    with mock.patch.object(step_tables, "build", wraps=step_tables.build) as made:
        for step in range(12):
            for i, (p, g) in enumerate(zip(params, gradients(step), strict=True)):
                p.grad = None if i == step % 3 else g
            optimizer.step()
    assert made.call_count == 3


def test_one_tensor_for_the_reference_does_not_cost_the_others_their_tables(monkeypatch):
    """A transposed parameter that is rounded: memory is not in the order of its elements."""
    optimizers, made, build = [], [], step_tables.build
    monkeypatch.setattr(step_tables, "build", lambda *args: made.append(1) or build(*args))
    for fused in (None, False):
        params = [*parameters(), nn.Parameter(torch.ones(4, 6).t())]
        optimizers.append(
            (NovoGrad(params, lr=0.1, momentum_dtype="bfloat16", fused=fused, preset="paper"), params)
        )
    for step in range(4):
        for optimizer, params in optimizers:
            for p, g in zip(params, [*gradients(step), torch.full((6, 4), 0.1 * step)], strict=True):
                p.grad = g
            del g
            optimizer.step()
            # Its tensors are held for the step only.
            alive = weakref.ref(params[-1].grad)
            params[-1].grad = None
            assert alive() is None
    assert len(made) == 2
    for p, q in zip(*(params for _, params in optimizers), strict=True):
        assert torch.equal(p, q)
