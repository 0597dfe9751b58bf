"""Bad input gets one clear error that names it, before anything is changed."""

import numpy as np
import pytest
import torch
from torch import nn

from novoscale import NovoGrad


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"lr": -1.0}, ValueError, "lr must be a finite number of at least 0, got -1.0"),
        ({"lr": float("nan")}, ValueError, "lr must be"),
        ({"lr": "1e-3"}, TypeError, "lr must be a number, got '1e-3'"),
        ({"lr": torch.tensor([0.1, 0.2])}, ValueError, "Tensor lr must be 1-element"),
        ({"lr": torch.tensor(-0.1)}, ValueError, "lr must be a finite number of at least 0, got -0.1"),
        ({"lr": torch.tensor(float("nan"))}, ValueError, "lr must be a finite number of at least 0, got nan"),
        ({"lr": np.float32("inf")}, ValueError, "lr must be a finite number of at least 0, got inf"),
        ({"lr": np.ones(2)}, TypeError, "lr must be a number, got array"),
        ({"lr": True}, TypeError, "lr must be a number, got True"),
        ({"betas": (torch.ones(2), 0.9)}, TypeError, r"betas\[0\] must be a number, got tensor"),
        ({"betas": (0.9, torch.tensor(1.0))}, ValueError, r"betas\[1\] must be at least 0 and below 1"),
        ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] must be at least 0 and below 1"),
        ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\]"),
        ({"betas": 0.9}, TypeError, "betas must be two numbers"),
        ({"eps": -1e-8}, ValueError, "eps must be"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be"),
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm must be"),
        ({"max_grad_norm": 1.0, "norm_type": 0}, ValueError, "max_grad_norm needs norm_type=2"),
        ({"norm_type": 1}, ValueError, "norm_type must be 2"),
        ({"grad_averaging": "false"}, TypeError, "grad_averaging must be True or False"),
        ({"beta": 0.9}, TypeError, "no option 'beta': did you mean 'betas'"),
        ({"amsgrad": True}, TypeError, "no AMSGrad variant"),
        ({"block_size": 64}, TypeError, "no option 'block_size': the blocks of .* have 128 elements"),
        ({"momentum_dtype": "int16"}, ValueError, r"one of float32, bfloat16, int8, int4, got 'int16' \(did"),
        ({"momentum_dtype": torch.float16}, ValueError, "momentum_dtype must be one of"),
        ({"granularity": "rows"}, ValueError, 'granularity must be "tensor", "row" or the number'),
        ({"granularity": 0}, ValueError, "granularity must be"),
        (
            {"granularity": 3},
            ValueError,
            r"parameter 0 of .*: granularity=3 .* its shape \(2,\) does not allow",
        ),
        ({"normalize": "mean"}, ValueError, 'normalize must be "norm" or "rms"'),
        ({"normalize": "rms", "norm_type": 0}, ValueError, 'normalize="rms" .* needs norm_type=2'),
        ({"stochastic_rounding": 1}, TypeError, "stochastic_rounding must be True or False"),
        ({"seed": -1}, ValueError, "seed must be an integer"),
    ],
    ids=str,
)
def test_bad_option_is_named(options, error, says):
    with pytest.raises(error, match=says):
        NovoGrad([nn.Parameter(torch.ones(2))], **{"preset": "paper", **options})
    if "lr" in options or "betas" in options:
        with pytest.raises(error, match=says):
            NovoGrad([{"params": [nn.Parameter(torch.ones(2))], **options}], preset="paper")


@pytest.mark.parametrize(
    ("parameter", "says"),
    [
        (lambda: nn.Parameter(torch.ones(2)) * 2, "non-leaf"),
        (lambda: torch.ones(2, dtype=torch.int64), "dtype torch.int64"),
        (lambda: torch.ones(2, dtype=torch.complex64), "dtype torch.complex64"),
        (lambda: torch.ones(2).to_sparse(), "not a dense tensor"),
    ],
)
def test_bad_parameter_is_named_and_not_added(parameter, says):
    good = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=f"parameter 1 of param group 0.*{says}"):
        NovoGrad([good, parameter()], preset="paper")
    optimizer = NovoGrad([("good", good)], preset="paper")
    with pytest.raises(ValueError, match=f"odd.*{says}"):
        optimizer.add_param_group({"params": [("odd", parameter())]})
    assert len(optimizer.param_groups) == 1


def test_bad_gradient_is_named_and_nothing_changed():
    embedding = nn.Embedding(5, 3, sparse=True)
    other = nn.Parameter(torch.ones(2))
    optimizer = NovoGrad([("other", other), ("table", embedding.weight)], lr=0.1, preset="paper")
    other.grad = torch.ones(2)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="table: NovoGrad does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(other, torch.ones(2))
    assert not optimizer.state


def test_groups_that_disagree_on_max_grad_norm_are_refused():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="max_grad_norm clips the gradient of the whole model"):
        NovoGrad(
            [{"params": [a], "max_grad_norm": 1.0}, {"params": [b], "max_grad_norm": 2.0}], preset="paper"
        )


@pytest.mark.parametrize("numel", [6, 9])
def test_flat_tensor_of_unknown_origin_is_refused(numel):
    model = nn.Linear(2, 2)
    optimizer = NovoGrad(model.named_parameters(), lr=0.1, preset="paper")
    flat = torch.zeros(numel, requires_grad=True)
    flat.grad = torch.ones(numel)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(
        RuntimeError, match=r"weight: .* is not what NovoGrad was given.*novoscale.integrations.deepspeed"
    ):
        optimizer.step()
    assert not flat.any()
    assert not optimizer.state


def test_parameter_that_changed_its_size_is_refused():
    p = nn.Parameter(torch.ones(4))
    optimizer = NovoGrad([("p", p)], lr=0.1, preset="paper")
    p.data = torch.ones(6)
    p.grad = torch.ones(6)
    with pytest.raises(RuntimeError, match=r"p: .*had 4 elements when NovoGrad was given it and has 6 now"):
        optimizer.step()


@pytest.mark.parametrize(("option", "value"), [("granularity", "row"), ("granularity", 2)])
def test_a_granularity_that_is_changed_while_it_is_in_use_is_refused(option, value):
    p = nn.Parameter(torch.ones(4, 2))
    optimizer = NovoGrad([("p", p)], lr=0.1, preset="paper")
    p.grad = torch.ones(4, 2)
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0][option] = value
    with pytest.raises(RuntimeError, match=f"p: the {option} of its param group was .* load_state_dict"):
        optimizer.step()
    assert torch.equal(p, before)


def test_a_learning_rate_on_the_cpu_is_read_at_each_step_and_one_on_a_device_never():
    p = nn.Parameter(torch.ones(2))
    rate = torch.tensor(0.1)
    optimizer = NovoGrad([p], lr=rate, preset="paper")
    p.grad = torch.ones(2)
    rate.fill_(float("nan"))
    with pytest.raises(ValueError, match="param group 0: lr must be a finite number of at least 0, got nan"):
        optimizer.step()
    assert torch.equal(p, torch.ones(2))
    NovoGrad([p], lr=torch.tensor(-0.1, device="meta"), preset="paper")  # which has nothing to read


def test_numbers_of_a_part_are_refused_where_they_are_not_known():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = NovoGrad([("a", a)], preset="paper")
    with pytest.raises(ValueError, match="a is not in the param groups that number_as was given"):
        optimizer.number_as([{"params": [b]}])
    optimizer.number_as([{"params": [b, a]}])
    with pytest.raises(ValueError, match=r"c is not in .* number_as"):
        optimizer.add_param_group({"params": [("c", nn.Parameter(torch.ones(2)))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("momentum_dtype", ["bfloat16", "int8", "int4"])
def test_copies_that_have_other_places_stay_the_same_if_they_are_numbered_as_in_the_full_model(
    momentum_dtype,
):
    def stages(numbered):
        """A weight on two stages of a pipeline, each with an optimizer of other parameters."""
        torch.manual_seed(0)
        tied = torch.randn(64, 80)
        first, last = nn.Parameter(tied.clone()), nn.Parameter(tied.clone())
        layer, head = nn.Parameter(torch.zeros(80)), nn.Parameter(torch.zeros(64))
        options = {"lr": 0.01, "preset": "adamw", "momentum_dtype": momentum_dtype}
        optimizers = (
            NovoGrad([first, layer], **{"preset": "paper", **options}),
            NovoGrad([head, last], **{"preset": "paper", **options}),
        )
        if numbered:
            optimizers[0].number_as([{"params": [first, layer, "of another stage"]}])
            optimizers[1].number_as([{"params": [last, "of another stage", head]}])
        for _ in range(4):
            first.grad = torch.randn(64, 80)
            last.grad = first.grad.clone()
            layer.grad, head.grad = torch.randn(80), torch.randn(64)
            for optimizer in optimizers:
                optimizer.step()
        return first, last

    assert torch.equal(*stages(numbered=True))
    assert not torch.equal(*stages(numbered=False))
