"""A training that goes on under NovoGrad from the state of an Adam: v, and the next steps."""

import math

import numpy as np
import pytest
import torch
from adam import MAGNITUDES, constant_magnitudes
from oracle import FactoredOracle, Oracle, RowOracle, deviation
from taken_over import (
    COLLECTED,
    FURTHER,
    LR,
    SHAPES,
    changing_gradients,
    exact,
    parameters,
    state_dict_of_adam,
    taken_over,
    weights,
)
from test_implementations import Apex
from torch import nn

from novoscale import NovoGrad
from novoscale.checkpoint.imported import from_adam
from novoscale.checkpoint.imported.from_adam import novograd_state
from novoscale.sharding.layers import describe
from novoscale.sharding.partition import one_after_another, partition
from novoscale.state import momentum

# ---- v: what NovoGrad would have collected from the same gradients -------------------------------------


def test_second_moments_of_the_adamw_preset_are_those_that_it_would_have_collected():
    gradients = changing_gradients()
    oracle = FactoredOracle(weights(), lr=0.0)
    for grads in gradients:
        oracle.step(grads)
    optimizer = taken_over(state_dict_of_adam(gradients), preset="adamw")
    for (p, state), r, c in zip(optimizer.state.items(), oracle.r, oracle.c, strict=True):
        assert state["step"].tolist() == [COLLECTED]
        if p.ndim > 1:
            assert deviation(state["exp_avg_sq_row"].flatten(), r) < 1e-5  # Adam's own rounding, in float32
            assert deviation(state["exp_avg_sq_col"].flatten(), c) < 1e-5
        else:
            assert deviation(state["exp_avg_sq"], r) < 1e-5


@pytest.mark.parametrize("normalize", ["norm", "rms"])
@pytest.mark.parametrize("granularity", ["tensor", "row", 2])
def test_second_moments_of_layers_are_those_that_they_would_have_collected(granularity, normalize):
    shapes = SHAPES[:2]
    gradients = [g[:2] for g in changing_gradients()]
    params = parameters()[:2]
    options = {"lr": 0.0, "init_zero": True, "normalize": normalize}
    if granularity == "tensor":
        inner = oracle = Oracle(weights()[:2], **options)
    else:
        oracle = RowOracle(weights()[:2], splits=None if granularity == "row" else 2, **options)
        inner = oracle.inner
    for grads in gradients:
        oracle.step(grads)
    saved = state_dict_of_adam(gradients, params=params)
    optimizer = taken_over(saved, params, granularity=granularity, normalize=normalize, init_zero=True)
    found = torch.cat([optimizer.state[p]["exp_avg_sq"] for p in params])
    assert len(found) == len(inner.v)
    assert deviation(found, inner.v) < 1e-5
    assert [optimizer.state[p]["exp_avg"].shape for p in params] == [torch.Size(s) for s in shapes]


# ---- the next steps: exactly NovoGrad's, where the magnitudes of the gradients do not change -----------

LAYERS = [
    {"granularity": granularity, "normalize": normalize, "grad_averaging": averaging, "betas": betas}
    for granularity in ("tensor", "row")
    for normalize in ("norm", "rms")
    for averaging in (False, True)
    for betas in ((0.9, 0.98), (0.9, 0.5), (0.0, 0.98))
]
FACTORED = [
    {},
    {"betas": (0.9, 0.999)},
    {"init_zero": False, "bias_correction": False},
    {"reg_inside_moment": False, "weight_decay": 0.1},
    {"nesterov": False},
    {"grad_averaging": False},
    {"clip_threshold": 0.5},
    {"scale_parameter": True},
    {"scale_parameter": True, "clip_threshold": 0.5, "maximize": True},
]


def steps_on(optimizer, oracle, gradients):
    """The largest deviation from the oracle of the weights' changes in further steps."""
    before = weights()
    params = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["lr"] = LR
    for grads in gradients:
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.tensor(g, dtype=p.dtype)
        optimizer.step()
        oracle.step(grads)
    return max(
        deviation(p.detach().numpy() - w, o - w)
        for p, o, w in zip(params, oracle.weights, before, strict=True)
    )


BOUND = 1e-6  # v in float32


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_the_next_steps_are_those_of_a_novograd_that_collected_itself(options):
    signs = constant_magnitudes(SHAPES, COLLECTED + FURTHER)
    kept = {key: value for key, value in options.items() if key != "granularity"}
    kind = Oracle if options["granularity"] == "tensor" else RowOracle
    oracle = kind(weights(), lr=0.0, **kept)
    for grads in signs[:COLLECTED]:
        oracle.step(grads)
    optimizer = taken_over(state_dict_of_adam(signs[:COLLECTED], params=exact()), exact(), **options)
    getattr(oracle, "inner", oracle).lr = LR
    assert steps_on(optimizer, oracle, signs[COLLECTED:]) < BOUND


@pytest.mark.parametrize("options", FACTORED, ids=str)
def test_the_next_steps_of_the_adamw_preset(options):
    signs = constant_magnitudes(SHAPES, COLLECTED + FURTHER, rank_one=True)
    oracle = FactoredOracle(weights(), lr=0.0, **options)
    for grads in signs[:COLLECTED]:
        oracle.step(grads)
    saved = state_dict_of_adam(
        signs[:COLLECTED],
        params=exact(),
        weight_decay=options.get("weight_decay", 0.0),
        maximize=options.get("maximize", False),
    )
    optimizer = taken_over(saved, exact(), preset="adamw", **options)
    oracle.options["lr"] = LR
    assert steps_on(optimizer, oracle, signs[COLLECTED:]) < BOUND


def test_the_next_steps_of_apex_defaults():
    signs = constant_magnitudes(SHAPES, COLLECTED + FURTHER)
    theirs, expected = [Apex() for _ in SHAPES], weights()
    for grads in signs[:COLLECTED]:
        for apex, w, g in zip(theirs, expected, grads, strict=True):
            apex(w, g, 0.0)
    apex_options = {"bias_correction": True, "grad_averaging": True, "reg_inside_moment": False}
    optimizer = taken_over(
        state_dict_of_adam(signs[:COLLECTED], betas=(0.9, 0.95), params=exact()),
        exact(),
        betas=(0.9, 0.999),
        weight_decay=0.03,
        **apex_options,
    )
    for grads in signs[COLLECTED:]:
        expected = [a(w, g, LR) for a, w, g in zip(theirs, expected, grads, strict=True)]
        for p, g in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            p.grad = torch.tensor(g, dtype=p.dtype)
        optimizer.step()
    for p, w, before in zip(optimizer.param_groups[0]["params"], expected, weights(), strict=True):
        assert deviation(p.detach().numpy() - before, w - before) < BOUND


def test_where_beta1_differs_a_steady_gradient_goes_on_as_it_was():
    steady = [MAGNITUDES(SHAPES)] * (COLLECTED + FURTHER)
    oracle = Oracle(weights(), lr=0.0, betas=(0.95, 0.98))
    for grads in steady[:COLLECTED]:
        oracle.step(grads)
    optimizer = taken_over(
        state_dict_of_adam(steady[:COLLECTED], betas=(0.8, 0.999), params=exact()), exact()
    )
    oracle.lr = LR
    assert steps_on(optimizer, oracle, steady[COLLECTED:]) < BOUND


# ---- formats, dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum_dtype", ["bfloat16", "int8", "int4"])
def test_the_first_moment_is_rounded_to_the_format(momentum_dtype):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(70, 128)), nn.Parameter(torch.randn(33, 131))]
    gradients = [[np.random.default_rng(i).standard_normal(p.shape) for p in params] for i in range(5)]
    saved = state_dict_of_adam(gradients, params=params)
    exact, rounded = (
        taken_over(saved, params, preset="adamw", momentum_dtype=name) for name in ("float32", momentum_dtype)
    )
    spacing = {"bfloat16": 2**-8, "int8": 1 / 127, "int4": 1 / 7}[momentum_dtype]
    for p in params:
        state = rounded.state[p]
        mine = momentum.read(state["exp_avg"], state.get("exp_avg_scale"), 0, 0, p.numel()).float()
        its = exact.state[p]["exp_avg"].flatten()
        assert 0 < (mine - its).abs().max() <= spacing * its.abs().max()
        assert torch.equal(state["exp_avg_sq_row"], exact.state[p]["exp_avg_sq_row"])


def test_a_bfloat16_model_keeps_its_second_moment_in_float32_and_a_float64_one_its_first_in_float64():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        params = [nn.Parameter(p.detach().to(dtype)) for p in parameters()]
        optimizer = taken_over(state_dict_of_adam(changing_gradients(3), params=params), params)
        for state in optimizer.state.values():
            assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (expected, torch.float32)


def test_one_whole_parameter_by_itself():
    gradients = changing_gradients()
    saved = state_dict_of_adam(gradients)
    optimizer = taken_over(saved, preset="adamw")
    for index, p in enumerate(optimizer.param_groups[0]["params"]):
        state = novograd_state(
            "a", saved["state"][index], saved["param_groups"][0], optimizer.param_groups[0]
        )
        assert state.keys() == optimizer.state[p].keys()
        for key, value in state.items():
            assert value.shape == optimizer.state[p][key].shape
            assert torch.equal(value, optimizer.state[p][key])


@pytest.mark.parametrize("preset", ["adamw", "paper"])
def test_a_flat_partition_of_several_parameters(preset):
    # As under ZeRO, where a tensor has the elements of several parameters, and padding.
    gradients = changing_gradients()
    saved = state_dict_of_adam(gradients)
    options = NovoGrad(parameters(), preset=preset, allow_lossy_load=True).param_groups[0]
    sizes = [math.prod(shape) for shape in SHAPES]
    whole = [describe(str(n), shape, options["granularity"], n) for n, shape in enumerate(SHAPES)]
    numel = sum(sizes) + 3
    flat = {
        key: torch.cat([*(saved["state"][n][key].flatten() for n in range(len(SHAPES))), torch.ones(3)])
        for key in ("exp_avg", "exp_avg_sq")
    }
    layout = partition(whole, one_after_another(sizes, numel, 1), rank=0, numel=numel)
    target = from_adam.Target("flat", torch.zeros(numel), layout, options)
    (found,) = from_adam.converted([target], [{**flat, "step": COLLECTED}], saved["param_groups"])
    apart = [
        novograd_state(str(n), saved["state"][n], saved["param_groups"][0], options)
        for n in range(len(SHAPES))
    ]
    assert torch.equal(found["exp_avg"][:-3], torch.cat([s["exp_avg"].flatten() for s in apart]))
    assert not found["exp_avg"][-3:].any()
    for key in ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"):
        expected = [s[key].flatten() for s in apart if key in s]
        assert (key in found) == bool(expected)
        if expected:
            assert torch.equal(found[key], torch.cat(expected))
