"""A training that goes on under NovoGrad from the state of an Adam."""

import copy
import math
import warnings

import adam
import numpy as np
import pytest
import torch
from adam import MAGNITUDES, constant_magnitudes
from oracle import FactoredOracle, Oracle, RowOracle, deviation
from test_implementations import Apex
from torch import nn

from novoscale import NovoGrad, from_adam, momentum
from novoscale.from_adam import novograd_state
from novoscale.layout import describe, one_after_another, partition

SHAPES = [(6, 10), (4, 3, 8), (7,), (1,)]
COLLECTED, FURTHER = 25, 3  # of three steps with one magnitude no sum is 0
LR = 0.02


def weights():
    rng = np.random.default_rng(5)
    return [rng.standard_normal(shape) for shape in SHAPES]


def parameters(dtype=torch.float32):
    return [nn.Parameter(torch.tensor(w, dtype=dtype)) for w in weights()]


def exact():
    """In float64, so that a deviation is not one of the weights' last bits; v is in float32 all the same."""
    return parameters(torch.float64)


def state_dict_of_adam(gradients, betas=(0.9, 0.98), params=None, kind=torch.optim.AdamW, **options):
    """The state dict of torch's Adam after steps that changed no weight."""
    params = params or parameters()
    optimizer = kind(params, lr=0.0, betas=betas, **{"weight_decay": 0.0, **options})
    for grads in gradients:
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.tensor(g, dtype=p.dtype)
        optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = LR
    return saved


def taken_over(saved, params=None, **options):
    optimizer = NovoGrad(params or parameters(), **{"lr": LR, "allow_lossy_load": True, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        optimizer.load_state_dict(saved)
    return optimizer


def changing_gradients(steps=COLLECTED):
    rng = np.random.default_rng(1)
    return [[rng.standard_normal(s) * 10 ** rng.uniform(-2, 1) for s in SHAPES] for _ in range(steps)]


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


# ---- the forms of Adam's state -------------------------------------------------------------------------


@pytest.mark.parametrize("form", adam.FORMS)
def test_every_form_of_the_state_of_an_adam_is_taken(form):
    saved = state_dict_of_adam(changing_gradients())
    expected = taken_over(saved, preset="adamw")
    optimizer = taken_over(adam.FORMS[form](copy.deepcopy(saved)), preset="adamw")
    for mine, its in zip(optimizer.state.values(), expected.state.values(), strict=True):
        assert all(torch.equal(mine[key], its[key]) for key in its)


@pytest.mark.parametrize("name", ["NAdam", "RAdam", "Adam"])
def test_torch_adams_of_the_same_moments(name):
    saved = state_dict_of_adam(changing_gradients(3), kind=getattr(torch.optim, name))
    optimizer = taken_over(saved, preset="adamw")
    for state, adams in zip(optimizer.state.values(), saved["state"].values(), strict=True):
        assert (state["step"] == 3).all()
        assert torch.equal(state["exp_avg"] == 0, adams["exp_avg"] == 0)
    optimizer.step()


def test_bitsandbytes_in_eight_bits_is_dequantised_as_it_does():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    params = [nn.Parameter(torch.randn(70, 129)), nn.Parameter(torch.randn(9))]
    optimizer = bitsandbytes.optim.AdamW8bit(params, lr=1e-3, betas=(0.9, 0.98))
    for step in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    plain = {}
    for index, p in enumerate(params):
        state = optimizer.state[p]
        plain[index] = {"step": 3}
        for nth, key in enumerate(("exp_avg", "exp_avg_sq"), start=1):
            value = state[f"state{nth}"]
            if value.dtype == torch.uint8:
                value = bitsandbytes.functional.dequantize_blockwise(
                    value, absmax=state[f"absmax{nth}"], code=state[f"qmap{nth}"], blocksize=256
                )
            plain[index][key] = value
    saved = optimizer.state_dict()
    expected = taken_over({**saved, "state": plain}, params, preset="adamw")
    found = taken_over(saved, params, preset="adamw")
    for p in params:
        for key, value in expected.state[p].items():
            assert torch.equal(found.state[p][key], value)
            assert key == "step" or value.abs().max() > 0


def test_steps_that_only_the_last_tensor_of_a_group_has_are_those_of_all():
    saved = state_dict_of_adam(changing_gradients())
    for index in range(len(SHAPES) - 1):  # DeepSpeed's FusedAdam without ZeRO
        saved["state"][index]["step"] = 0
    optimizer = taken_over(saved, preset="adamw")
    assert all(state["step"].tolist() == [COLLECTED] for state in optimizer.state.values())


def test_parameters_that_had_no_gradient_start_anew():
    gradients = changing_gradients(3)
    saved = state_dict_of_adam([[*g[:3], 0 * g[3]] for g in gradients])
    del saved["state"][0]
    optimizer = taken_over(saved, preset="adamw")
    params = optimizer.param_groups[0]["params"]
    assert params[0] not in optimizer.state
    assert optimizer.state[params[3]]["step"].tolist() == [0]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(p.isfinite().all() for p in params)
    change = (params[3].detach() - torch.tensor(weights()[3])).abs().item()
    assert change == pytest.approx(LR * (1 + 0.9 * 0.1 / 0.19), rel=1e-3)  # Nesterov's first step


# ---- options, and what is said -------------------------------------------------------------------------


def test_learning_rate_and_decay_go_over_where_they_mean_the_same_and_no_other_option_does():
    params = parameters()
    groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=3e-4, betas=(0.8, 0.9), eps=1e-6)
    params[0].grad = torch.ones_like(params[0])
    adamw.step()
    scheduler = torch.optim.lr_scheduler.LinearLR(adamw, 0.5)
    saved = adamw.state_dict()
    saved["param_groups"][0]["my own"] = 1

    def mine():
        return [{"params": params[:2]}, {"params": params[2:]}]

    optimizer = NovoGrad(mine(), lr=1.0, preset="adamw", momentum_dtype="int8", allow_lossy_load=True)
    optimizer.load_state_dict(saved)
    first, second = optimizer.param_groups
    assert (first["lr"], first["initial_lr"]) == (1.5e-4, 3e-4)
    assert (first["weight_decay"], second["weight_decay"]) == (0.1, 0.0)
    assert (first["betas"], first["eps"], first["preset"]) == ((0.9, 0.98), 1e-8, "adamw")
    assert (first["momentum_dtype"], first["my own"]) == ("int8", 1)
    assert not {"amsgrad", "capturable", "decoupled_weight_decay"} & first.keys()
    torch.optim.lr_scheduler.LinearLR(optimizer, 0.5).load_state_dict(scheduler.state_dict())
    paper = NovoGrad(mine(), lr=1.0, weight_decay=0.5, allow_lossy_load=True)
    paper.load_state_dict(saved)
    assert [(g["lr"], g["weight_decay"]) for g in paper.param_groups] == [(1.0, 0.5)] * 2


def test_an_l2_penalty_is_no_weight_decay():
    saved = state_dict_of_adam(changing_gradients(3), kind=torch.optim.Adam, weight_decay=0.3)
    assert taken_over(saved, preset="adamw", weight_decay=0.1).param_groups[0]["weight_decay"] == 0.1


def test_what_was_converted_is_said_in_one_line():
    saved = state_dict_of_adam(changing_gradients(3))
    optimizer = NovoGrad(parameters(), preset="adamw", allow_lossy_load=True)
    with pytest.warns(UserWarning, match=r"^NovoGrad has taken over .* an Adam for 4 parameters.*$") as said:
        optimizer.load_state_dict(saved)
    assert len(said) == 1
    assert said[0].filename == __file__
    assert "lr and weight_decay from the state dict" in str(said[0].message)
    with pytest.warns(UserWarning, match="; all other options as NovoGrad was made"):
        NovoGrad(parameters(), allow_lossy_load=True).load_state_dict(saved)


# ---- refusals ------------------------------------------------------------------------------------------


def of_kind(kind, **options):
    params = parameters()
    optimizer = getattr(torch.optim, kind)(params, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer.state_dict()


def altered(**changes):
    saved = state_dict_of_adam(changing_gradients(3))
    saved["state"][1] |= changes
    return saved


def grouped(**changes):
    saved = state_dict_of_adam(changing_gradients(3))
    saved["param_groups"][0] |= changes
    return saved


def without_steps():
    saved = state_dict_of_adam(changing_gradients(3))
    for state in saved["state"].values():
        del state["step"]
    return saved


def one_group_more():
    params = parameters()
    return torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}]).state_dict()


BAD = {
    "SGD": (
        lambda: of_kind("SGD", lr=0.1, momentum=0.9),
        {},
        r"of SGD or Muon: parameter 0 .* takes its own",
    ),
    "SGD without state": (lambda: of_kind("SGD", lr=0.1), {}, r"param group 0 has .*nesterov.* no betas"),
    "Adafactor": (lambda: of_kind("Adafactor"), {}, "of Adafactor: parameter 0 of param group 0 has"),
    "Adamax": (lambda: of_kind("Adamax"), {}, "of Adamax"),
    "Lion": (
        lambda: {**grouped(), "state": {0: {"exp_avg": torch.ones(6, 10)}}},
        {},
        "of Lion: parameter 0 of param group 0 has exp_avg",
    ),
    "AMSGrad": (lambda: of_kind("AdamW", amsgrad=True), {}, "parameter 0 .* AMSGrad .*take max_exp_avg_sq"),
    "another shape": (
        lambda: altered(exp_avg=torch.ones(4, 24)),
        {},
        r"exp_avg of parameter 1 of param group 0 has the shape \(4, 24\), .* \(4, 3, 8\)",
    ),
    "a group more": (
        one_group_more,
        {},
        "2 param groups of 1, 3 parameters, and this NovoGrad 1 param",
    ),
    "not a number": (
        lambda: altered(exp_avg_sq=torch.full((4, 3, 8), float("nan"))),
        {},
        "exp_avg_sq of parameter 1 of param group 0 is not a finite number",
    ),
    "no steps": (
        without_steps,
        {},
        "parameter 0 of param group 0: neither its state nor its param group says",
    ),
    "largest magnitudes": (
        grouped,
        {"norm_type": 0, "preset": "paper"},
        "parameter 0 .*: norm_type=0 averages",
    ),
    "the other way": (
        lambda: grouped(maximize=True),
        {},
        "maximize is True in the state dict and False here",
    ),
    "not allowed": (
        grouped,
        {"allow_lossy_load": False},
        r"an Adam. Of parameter 0 of param group 0, .*\(here 16 of 60\).*allow_lossy_load=True",
    ),
    "a subclass": (
        lambda: altered(exp_avg=torch.ones(4, 3, 8).as_subclass(type("Odd", (torch.Tensor,), {}))),
        {},
        "exp_avg of parameter 1 of param group 0 is Odd",
    ),
    "8 bits, not in blocks": (
        lambda: {
            **grouped(),
            "state": {
                0: {
                    "step": 1,
                    "state1": torch.ones(6, 10, dtype=torch.uint8),
                    "state2": torch.ones(6, 10, dtype=torch.uint8),
                    "qmap1": torch.ones(256),
                    "qmap2": torch.ones(256),
                }
            },
        },
        {},
        "state1 is in 8 bits and there is no qmap1 or absmax1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_taken_over_is_named_and_nothing_is_changed(case):
    make, options, message = BAD[case]
    params = parameters()
    optimizer = NovoGrad(params, lr=0.7, **{"preset": "adamw", "allow_lossy_load": True, **options})
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(make())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert all(torch.equal(after["state"][index][key], value) for key, value in state.items())


def test_an_adam_that_has_made_no_step_leaves_the_options_as_they_are():
    saved = torch.optim.AdamW(parameters(), lr=0.3).state_dict()
    optimizer = taken_over(saved, preset="adamw")
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.98)
    assert not optimizer.state
