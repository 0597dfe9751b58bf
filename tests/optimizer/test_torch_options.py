"""What torch's own tests ask of an optimizer's numbers, param groups and schedulers; what it refuses.

See test_torch_optim.py.
"""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch_promises import (
    IMPLEMENTATIONS,
    OPTIONS,
    Problem,
    each_implementation,
    everywhere,
    needs_compiler,
    options_of,
    through_file,
)

from novoscale import NovoGrad

SCHEDULERS = {
    "step": partial(lr_scheduler.StepLR, gamma=0.9, step_size=3),
    "multi-step": partial(lr_scheduler.MultiStepLR, milestones=[2, 5]),
    "linear": lr_scheduler.LinearLR,
    "constant": lr_scheduler.ConstantLR,
    "exponential": partial(lr_scheduler.ExponentialLR, gamma=0.9),
    "polynomial": partial(lr_scheduler.PolynomialLR, total_iters=8),
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=8),
    "warm restarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3),
    "one cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.01, total_steps=12),
    "cyclic": partial(lr_scheduler.CyclicLR, base_lr=0.001, max_lr=0.01, step_size_up=3),
    "plateau": partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=10.0),
    "NumPy's numbers": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: np.float32(0.9**step)),
}


@everywhere
@pytest.mark.parametrize(
    "lr",
    [
        torch.tensor(0.125),
        torch.tensor([0.125]),
        torch.tensor([[0.125]], dtype=torch.float64),
        np.float32(0.125),
    ],
    ids=["0 dimensions", "1 dimension", "2 dimensions", "NumPy"],
)
def test_a_learning_rate_of_any_kind_is_that_number(options, implementation, lr):
    problem, twin = Problem(), Problem()
    chosen = options_of(options, implementation)
    problem.train(NovoGrad(problem.params, **{"preset": "paper", **chosen | {"lr": lr}}))
    assert problem.same_bits(
        twin.train(NovoGrad(twin.params, **{"preset": "paper", **chosen | {"lr": 0.125}}))
    )


@each_implementation
@pytest.mark.parametrize("kind", [torch.tensor, lambda n: torch.tensor([n]), np.float32])
def test_betas_of_any_kind_are_those_numbers(implementation, kind):
    problem, twin = Problem(), Problem()
    optimizer = NovoGrad(
        problem.params,
        betas=(kind(0.5), kind(0.75)),
        **{"preset": "paper", **IMPLEMENTATIONS[implementation]},
    )
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.75)
    problem.train(optimizer)
    expected = NovoGrad(
        twin.params, betas=(0.5, 0.75), **{"preset": "paper", **IMPLEMENTATIONS[implementation]}
    )
    assert problem.same_bits(twin.train(expected))


@everywhere
def test_groups_are_as_an_optimizer_each(options, implementation):
    chosen = options_of(options, implementation)
    chosen["max_grad_norm"] = None  # it is of all groups together
    own = {"lr": 0.03125, "weight_decay": 0.25}
    together, apart = Problem(), Problem()
    optimizer = NovoGrad(
        [{"params": [together.weight]}, {"params": [together.bias], **own}], **{"preset": "paper", **chosen}
    )
    first = NovoGrad([apart.weight], **{"preset": "paper", **copy.deepcopy(chosen)})
    second = NovoGrad([apart.bias], **{"preset": "paper", **copy.deepcopy(chosen) | own})
    second.number_as([*first.param_groups, *second.param_groups])
    for _ in range(3):
        optimizer.step(together.loss)
        apart.loss()
        first.step()
        second.step()
    assert together.same_bits(apart)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("options", ["paper", "tensor lr", "int8", "adamw"])
def test_schedulers_lower_the_loss_and_resume_to_the_bit(options, scheduler):
    def made(problem):
        optimizer = NovoGrad(problem.params, **{"preset": "paper", **copy.deepcopy(OPTIONS[options])})
        return optimizer, SCHEDULERS[scheduler](optimizer)

    def train(problem, optimizer, schedule, steps):
        for _ in range(steps):
            loss = optimizer.step(problem.loss)
            schedule.step(*([loss.item()] if scheduler == "plateau" else []))

    problem = Problem()
    before = problem.loss().item()
    optimizer, schedule = made(problem)
    train(problem, optimizer, schedule, 4)
    resumed = problem.twin()
    again, its_schedule = made(resumed)
    again.load_state_dict(through_file(optimizer.state_dict()))
    its_schedule.load_state_dict(copy.deepcopy(schedule.state_dict()))
    for each in ((problem, optimizer, schedule), (resumed, again, its_schedule)):
        train(*each, 4)
    assert problem.loss().item() < before
    assert resumed.same_bits(problem)


def test_options_are_saved_as_plain_numbers():
    problem = Problem()
    optimizer = NovoGrad(
        problem.params,
        lr=np.float64(0.1),
        eps=np.float32(0),
        weight_decay=torch.tensor(0.5),
        max_grad_norm=1,
        preset="paper",
    )
    optimizer.param_groups[0]["lr"] = np.float32(0.25)  # as a scheduler leaves it
    (group,) = through_file(optimizer.state_dict())["param_groups"]
    numbers = [group[name] for name in ("lr", "eps", "weight_decay", "max_grad_norm")]
    assert numbers == [0.25, 0.0, 0.5, 1.0]
    assert {type(number) for number in numbers} == {float}


# ---- what is accepted and refused -------------------------------------------------------------------


@everywhere
def test_it_can_be_printed(options, implementation):
    assert "lr: " in repr(
        NovoGrad(Problem().params, **{"preset": "paper", **options_of(options, implementation)})
    )


@pytest.mark.parametrize(
    ("params", "error", "says"),
    [
        (lambda p: p, TypeError, "iterable of Tensors or dicts"),
        (lambda p: [], ValueError, "empty parameter list"),
        (lambda p: [0.0], TypeError, "can only optimize Tensors"),
        (lambda p: [{"params": {p}}], TypeError, "ordered collections"),
        (lambda p: [{"params": [p]}, {"params": [p]}], ValueError, "more than one parameter group"),
        (lambda p: [("p", p), nn.Parameter(torch.ones(2))], ValueError, "names are missing"),
    ],
)
def test_parameters_are_refused_as_torch_does(params, error, says):
    with pytest.raises(error, match=says):
        NovoGrad(params(nn.Parameter(torch.ones(2))), preset="paper")


def test_a_parameter_given_twice_is_warned_of():
    p = nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        NovoGrad([p, p], preset="paper")


@pytest.mark.parametrize("given", [{"capturable": True}, {"capturable": False}, {"differentiable": False}])
def test_options_of_ported_code_that_change_nothing_are_taken(given):
    problem, twin = Problem(), Problem()
    problem.train(NovoGrad(problem.params, **{"preset": "paper", **given}))
    assert problem.same_bits(twin.train(NovoGrad([{"params": twin.params, **given}], preset="paper")))


def test_a_step_is_not_differentiable():
    with pytest.raises(ValueError, match="NovoGrad: differentiable=True"):
        NovoGrad(Problem().params, differentiable=True, preset="paper")
    with pytest.raises(ValueError, match="param group 0: differentiable=True"):
        NovoGrad([{"params": Problem().params, "differentiable": True}], preset="paper")


def test_foreach_and_fused_together_are_refused():
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        NovoGrad(Problem().params, foreach=True, fused=True, preset="paper")


@pytest.mark.parametrize(
    ("options", "says"),
    [({"fused": True}, "`fused=True` requires all the params to be"), ({}, "is on the device meta")],
)
def test_parameters_without_memory_are_refused_at_the_step(options, says):
    p = nn.Parameter(torch.ones(2, device="meta"))
    optimizer = NovoGrad([p], **{"preset": "paper", **options})
    optimizer.step()
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=says):
        optimizer.step()
    assert not optimizer.state


@needs_compiler
def test_parameters_that_get_memory_in_their_place_are_stepped():
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    optimizer = NovoGrad(model.named_parameters(), fused=True, preset="paper")
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    model.reset_parameters()
    before = model.weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)
