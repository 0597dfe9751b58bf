"""What torch's own tests ask of a step of every optimizer in torch.optim, asked of NovoGrad.

After TestOptimRenewed of torch's test/test_optim.py: each promise for each set of options and each
implementation. Where torch allows a tolerance, NovoGrad promises the same bits.
"""

import copy

import pytest
import torch
from torch import nn
from torch_promises import (
    IMPLEMENTATIONS,
    OPTIONS,
    Problem,
    assert_same,
    each_implementation,
    everywhere,
    options_of,
    trained,
)

from novoscale import NovoGrad, kernels


@everywhere
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_loss_goes_the_right_way(options, implementation, contiguous):
    problem = Problem(contiguous)
    optimizer = NovoGrad(problem.params, **{"preset": "paper", **options_of(options, implementation)})
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
    optimizers = [NovoGrad(together, **{"preset": "paper", **chosen})]
    optimizers += [NovoGrad([p], **{"preset": "paper", **copy.deepcopy(chosen)}, seed=0) for p in apart]
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
    optimizer = NovoGrad(problem.params, **{"preset": "paper", **options_of(options, implementation)})
    optimizer.step()
    assert problem.same_bits(before)
    assert not optimizer.state


@everywhere
def test_a_step_with_gradients_of_zero_changes_nothing(options, implementation):
    problem = Problem()
    before = problem.twin()
    optimizer = NovoGrad(problem.params, **{"preset": "paper", **options_of(options, implementation)})
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
    optimizer = NovoGrad(
        [*problem.params, empty], **{"preset": "paper", **options_of(options, implementation)}
    )
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
        problem.train(NovoGrad(problem.params, **{"preset": "paper", **options_of(options, implementation)}))
    finally:
        torch.set_default_dtype(torch.float32)
    assert problem.same_bits(expected)
