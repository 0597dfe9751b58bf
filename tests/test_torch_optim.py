"""What torch's own tests ask of every optimizer in torch.optim, asked of NovoGrad.

After TestOptimRenewed of torch's test/test_optim.py: each promise for each set of options and each
implementation. Where torch allows a tolerance, NovoGrad promises the same bits.
"""

import copy
import io
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from novoscale import NovoGrad, foreign, kernels

OPTIONS = {
    "paper": {},
    "lr": {"lr": 0.01},
    "tensor lr": {"lr": torch.tensor(0.001)},
    "decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "maximize, decay": {"maximize": True, "weight_decay": 0.1},
    "no first moment": {"betas": (0.0, 0.98)},
    "no moments": {"betas": (0.0, 0.0)},
    "bias correction": {"bias_correction": True, "grad_averaging": True},
    "start at zero": {"init_zero": True},
    "largest magnitude": {"norm_type": 0},
    "outside the moment": {"reg_inside_moment": False, "weight_decay": 0.1},
    "clipped": {"max_grad_norm": 1.0},
    "rows": {"granularity": "row", "normalize": "rms"},
    "clipped update": {"normalize": "rms", "clip_threshold": 1.0, "scale_parameter": True},
    "nesterov": {"nesterov": True},
    "bfloat16": {"momentum_dtype": "bfloat16"},
    "int8": {"momentum_dtype": "int8"},
    "int4": {"momentum_dtype": "int4", "granularity": "row"},
    "adamw": {"preset": "adamw", "weight_decay": 0.1},
    "adamw, int8": {"preset": "adamw", "momentum_dtype": "int8"},
}
IMPLEMENTATIONS = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
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

needs_compiler = pytest.mark.skipif(kernels.fused("cpu") is None, reason="no C++ compiler")
each_implementation = pytest.mark.parametrize(
    "implementation",
    [pytest.param(name, marks=needs_compiler if name == "fused" else ()) for name in IMPLEMENTATIONS],
)


def everywhere(test):
    """Run a test with each set of options, in each implementation."""
    return each_implementation(pytest.mark.parametrize("options", OPTIONS)(test))


def options_of(options, implementation):
    # A scheduler or a test may change an lr that is a tensor in place.
    return copy.deepcopy(OPTIONS[options]) | IMPLEMENTATIONS[implementation]


class Problem:
    """A matrix large enough for the formats in blocks, a vector, and a loss with one minimum."""

    def __init__(self, contiguous=True):
        random = torch.Generator().manual_seed(0)
        make = partial(torch.randn, generator=random)
        if contiguous:
            self.weight, self.bias = nn.Parameter(make(64, 65)), nn.Parameter(make(64))
        else:
            self.weight, self.bias = nn.Parameter(make(64, 65, 2)[..., 0]), nn.Parameter(make(64, 2)[..., 0])
        self.input = make(65)

    @property
    def params(self):
        return [self.weight, self.bias]

    @property
    def named(self):
        return [("weight", self.weight), ("bias", self.bias)]

    def loss(self):
        """With new gradients."""
        for p in self.params:
            p.grad = None
        loss = (self.weight.mv(self.input) + self.bias).square().sum()
        loss.backward()
        return loss

    def train(self, optimizer, steps=3):
        for _ in range(steps):
            optimizer.step(self.loss)
        return self

    def same_bits(self, other):
        return all(torch.equal(a, b) for a, b in zip(self.params, other.params, strict=True))

    def twin(self):
        return copy.deepcopy(self)


def trained(options, implementation, steps=3):
    problem = Problem()
    optimizer = NovoGrad(problem.params, **options_of(options, implementation))
    problem.train(optimizer, steps)
    return problem, optimizer


def through_file(state_dict):
    """Saved, and loaded as torch.load does by default: tensors and plain values only."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(found, expected):
    """Two state dicts, to the bit."""
    torch.testing.assert_close(found["state"], expected["state"], rtol=0, atol=0)
    assert found["param_groups"] == expected["param_groups"]


# ---- the step -------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_loss_goes_the_right_way(options, implementation, contiguous):
    problem = Problem(contiguous)
    optimizer = NovoGrad(problem.params, **options_of(options, implementation))
    before = problem.loss().item()
    if implementation == "fused" and not contiguous:
        with pytest.raises(RuntimeError, match=r"fused.*dense tensors of .* equal strides.*Leave fused out"):
            optimizer.step()
        assert problem.same_bits(Problem(contiguous))
        return
    problem.train(optimizer, 10)
    after = problem.loss().item()
    assert after > before if optimizer.defaults["maximize"] else after < before


@pytest.mark.parametrize("options", OPTIONS)
def test_every_implementation_gives_the_same_bits_and_state(options):
    (expected, reference), *others = (
        trained(options, name) for name in IMPLEMENTATIONS if name != "fused" or kernels.fused("cpu")
    )
    for problem, optimizer in others:
        assert problem.same_bits(expected)
        torch.testing.assert_close(
            optimizer.state_dict()["state"], reference.state_dict()["state"], rtol=0, atol=0
        )


@everywhere
def test_parameters_of_several_dtypes_are_stepped_as_each_by_itself(options, implementation):
    chosen = options_of(options, implementation)
    if chosen.get("max_grad_norm"):
        chosen["max_grad_norm"] = 1e9  # it is of all parameters together
    dtypes = [torch.float32, torch.bfloat16, torch.float16]

    def made():
        random = torch.Generator().manual_seed(1)
        params = [nn.Parameter(torch.randn(64, 65, generator=random).to(dtype)) for dtype in dtypes]
        for p in params:
            p.grad = torch.randn(p.shape, generator=random).to(p.dtype)
        return params

    together, apart = made(), made()
    optimizers = [NovoGrad(together, **chosen)]
    optimizers += [NovoGrad([p], **copy.deepcopy(chosen), seed=0) for p in apart]
    for optimizer, (number, p) in zip(optimizers[1:], enumerate(apart), strict=True):
        # The random bits depend on the number of the parameter.
        optimizer.number_as([{"params": [*apart[:number], p]}])
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


@everywhere
def test_a_step_without_gradients_changes_nothing_and_makes_no_state(options, implementation):
    problem = Problem()
    before = problem.twin()
    optimizer = NovoGrad(problem.params, **options_of(options, implementation))
    optimizer.step()
    assert problem.same_bits(before)
    assert not optimizer.state


@everywhere
def test_a_step_with_gradients_of_zero_changes_nothing(options, implementation):
    problem = Problem()
    before = problem.twin()
    optimizer = NovoGrad(problem.params, **options_of(options, implementation))
    for p in problem.params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert problem.same_bits(before)


@everywhere
def test_every_stepped_parameter_has_state(options, implementation):
    problem, optimizer = trained(options, implementation, steps=1)
    assert all(len(optimizer.state[p]) > 0 for p in problem.params)


@each_implementation
@pytest.mark.parametrize("options", ["paper", "rows", "adamw", "adamw, int8", "clipped update"])
def test_an_empty_parameter_does_not_disturb_the_others(options, implementation):
    alone, _ = trained(options, implementation)
    problem, empty = Problem(), nn.Parameter(torch.empty(0, 5))
    optimizer = NovoGrad([*problem.params, empty], **options_of(options, implementation))
    empty.grad = torch.empty(0, 5)
    problem.train(optimizer)
    assert problem.same_bits(alone)


@everywhere
def test_a_step_is_skipped_when_a_grad_scaler_has_found_an_infinity(options, implementation):
    problem, optimizer = trained(options, implementation)
    problem.loss()
    before, state = problem.twin(), copy.deepcopy(optimizer.state_dict())
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    optimizer.step()
    assert problem.same_bits(before)
    assert_same(optimizer.state_dict(), state)


@everywhere
def test_the_default_dtype_does_not_matter(options, implementation):
    expected, _ = trained(options, implementation)
    problem = Problem()
    torch.set_default_dtype(torch.float64)
    try:
        problem.train(NovoGrad(problem.params, **options_of(options, implementation)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert problem.same_bits(expected)


# ---- numbers, param groups, schedulers --------------------------------------------------------------


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
    problem.train(NovoGrad(problem.params, **chosen | {"lr": lr}))
    assert problem.same_bits(twin.train(NovoGrad(twin.params, **chosen | {"lr": 0.125})))


@each_implementation
@pytest.mark.parametrize("kind", [torch.tensor, lambda n: torch.tensor([n]), np.float32])
def test_betas_of_any_kind_are_those_numbers(implementation, kind):
    problem, twin = Problem(), Problem()
    optimizer = NovoGrad(problem.params, betas=(kind(0.5), kind(0.75)), **IMPLEMENTATIONS[implementation])
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.75)
    problem.train(optimizer)
    expected = NovoGrad(twin.params, betas=(0.5, 0.75), **IMPLEMENTATIONS[implementation])
    assert problem.same_bits(twin.train(expected))


@everywhere
def test_groups_are_as_an_optimizer_each(options, implementation):
    chosen = options_of(options, implementation)
    chosen["max_grad_norm"] = None  # it is of all groups together
    own = {"lr": 0.03125, "weight_decay": 0.25}
    together, apart = Problem(), Problem()
    optimizer = NovoGrad([{"params": [together.weight]}, {"params": [together.bias], **own}], **chosen)
    first = NovoGrad([apart.weight], **copy.deepcopy(chosen))
    second = NovoGrad([apart.bias], **copy.deepcopy(chosen) | own)
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
        optimizer = NovoGrad(problem.params, **copy.deepcopy(OPTIONS[options]))
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
        problem.params, lr=np.float64(0.1), eps=np.float32(0), weight_decay=torch.tensor(0.5), max_grad_norm=1
    )
    optimizer.param_groups[0]["lr"] = np.float32(0.25)  # as a scheduler leaves it
    (group,) = through_file(optimizer.state_dict())["param_groups"]
    numbers = [group[name] for name in ("lr", "eps", "weight_decay", "max_grad_norm")]
    assert numbers == [0.25, 0.0, 0.5, 1.0]
    assert {type(number) for number in numbers} == {float}


# ---- state in and out -------------------------------------------------------------------------------


@everywhere
def test_a_loaded_optimizer_goes_on_with_the_same_bits_and_leaves_the_state_dict_alone(
    options, implementation
):
    problem, optimizer = trained(options, implementation)
    resumed = problem.twin()
    again = NovoGrad(resumed.params, **options_of(options, implementation))
    saved = through_file(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    again.load_state_dict(saved)
    assert_same(again.state_dict(), optimizer.state_dict())
    problem.train(optimizer)
    assert resumed.train(again).same_bits(problem)
    assert_same(again.state_dict(), optimizer.state_dict())
    assert_same(saved, kept)


@everywhere
def test_a_state_dict_of_before_the_options_were_made_loads(options, implementation):
    problem, optimizer = trained(options, implementation)
    saved = copy.deepcopy(optimizer.state_dict())
    (group,) = saved["param_groups"]
    saved["param_groups"] = [{name: group[name] for name in ("params", foreign.OWN)}]
    resumed = problem.twin()
    again = NovoGrad(resumed.params, **options_of(options, implementation))
    again.load_state_dict(saved)
    problem.train(optimizer)
    assert resumed.train(again).same_bits(problem)


@everywhere
def test_a_count_of_steps_that_is_a_number_loads(options, implementation):
    problem, optimizer = trained(options, implementation)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = state["step"].view(-1)[0].item()
    resumed = problem.twin()
    again = NovoGrad(resumed.params, **options_of(options, implementation))
    again.load_state_dict(saved)
    problem.train(optimizer)
    assert resumed.train(again).same_bits(problem)


@pytest.mark.parametrize(("from_names", "to_names"), [(True, False), (False, True), (True, True)])
def test_names_do_not_decide_what_is_loaded(from_names, to_names):
    problem = Problem()
    optimizer = NovoGrad(problem.named if from_names else problem.params)
    problem.train(optimizer)
    resumed = problem.twin()
    again = NovoGrad(resumed.named if to_names else resumed.params)
    again.load_state_dict(through_file(optimizer.state_dict()))
    assert again.param_groups[0].get("param_names") == ["weight", "bias"]
    problem.train(optimizer)
    assert resumed.train(again).same_bits(problem)


@everywhere
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_a_copy_goes_on_with_the_same_bits_and_shares_nothing(options, implementation, copied):
    problem, optimizer = trained(options, implementation)
    optimizer.param_groups[0]["theirs"] = "kept"
    other, again = copied((problem, optimizer))
    public = [{key for key in vars(each) if key[0] != "_"} for each in (optimizer, again)]
    assert public[0] == public[1]
    assert again.param_groups[0]["theirs"] == "kept"
    problem.train(optimizer)
    assert not other.same_bits(problem)
    assert other.train(again).same_bits(problem)


# ---- hooks ------------------------------------------------------------------------------------------


def test_hooks_are_called_in_order():
    problem = Problem()
    optimizer = NovoGrad(problem.params)
    calls = []
    note = lambda what: lambda *_: calls.append(what)  # noqa: E731
    optimizer.register_step_pre_hook(note("before the step"))
    optimizer.register_step_post_hook(note("after the step"))
    everyones = [
        register_optimizer_step_pre_hook(note("before any step")),
        register_optimizer_step_post_hook(note("after any step")),
    ]
    try:
        optimizer.step(problem.loss)
    finally:
        for handle in everyones:
            handle.remove()
    optimizer.step()
    assert calls == [
        *("before any step", "before the step", "after the step", "after any step"),
        *("before the step", "after the step"),
    ]


def test_hooks_of_the_state_dict_may_change_it():
    problem, optimizer = trained("paper", "default")
    optimizer.register_state_dict_pre_hook(lambda o: o.param_groups[0].update(lr=0.5))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "more": 1})
    optimizer.register_state_dict_post_hook(lambda _, saved: saved.update(first=True), prepend=True)
    saved = optimizer.state_dict()
    assert (saved["param_groups"][0]["lr"], saved["more"], saved["first"]) == (0.5, 1, True)

    again, calls = NovoGrad(problem.twin().params), []

    def doubled(_, given):
        calls.append("second")
        given["param_groups"][0]["lr"] *= 2

    again.register_load_state_dict_pre_hook(doubled)
    again.register_load_state_dict_pre_hook(lambda *_: calls.append("first"), prepend=True)
    again.register_load_state_dict_post_hook(lambda _: calls.append("after"))
    again.load_state_dict(copy.deepcopy(saved))
    assert calls == ["first", "second", "after"]
    assert again.param_groups[0]["lr"] == 1.0


# ---- what is accepted and refused -------------------------------------------------------------------


@everywhere
def test_it_can_be_printed(options, implementation):
    assert "lr: " in repr(NovoGrad(Problem().params, **options_of(options, implementation)))


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
        NovoGrad(params(nn.Parameter(torch.ones(2))))


def test_a_parameter_given_twice_is_warned_of():
    p = nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        NovoGrad([p, p])


@pytest.mark.parametrize("given", [{"capturable": True}, {"capturable": False}, {"differentiable": False}])
def test_options_of_ported_code_that_change_nothing_are_taken(given):
    problem, twin = Problem(), Problem()
    problem.train(NovoGrad(problem.params, **given))
    assert problem.same_bits(twin.train(NovoGrad([{"params": twin.params, **given}])))


def test_a_step_is_not_differentiable():
    with pytest.raises(ValueError, match="NovoGrad: differentiable=True"):
        NovoGrad(Problem().params, differentiable=True)
    with pytest.raises(ValueError, match="param group 0: differentiable=True"):
        NovoGrad([{"params": Problem().params, "differentiable": True}])


def test_foreach_and_fused_together_are_refused():
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        NovoGrad(Problem().params, foreach=True, fused=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"fused": True}, "`fused=True` requires all the params to be"), ({}, "is on the device meta")],
)
def test_parameters_without_memory_are_refused_at_the_step(options, says):
    p = nn.Parameter(torch.ones(2, device="meta"))
    optimizer = NovoGrad([p], **options)
    optimizer.step()
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=says):
        optimizer.step()
    assert not optimizer.state


@needs_compiler
def test_parameters_that_get_memory_in_their_place_are_stepped():
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    optimizer = NovoGrad(model.named_parameters(), fused=True)
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
