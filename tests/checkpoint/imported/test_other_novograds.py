"""A training that goes on from the state of another NovoGrad: each row of docs/coming-from.md."""

import copy
import importlib
import io

import numpy as np
import pytest
import torch
from oracle import deviation
from test_implementations import IMPLEMENTATIONS, WEIGHT_DECAY, documented, learning_rate
from torch import nn

from novoscale import NovoGrad

SHAPES = {"a": (7, 5), "b": (11,)}
BEFORE, AFTER = 6, 6


def gradients(step):
    rng = np.random.default_rng(50 + step)
    return {name: rng.standard_normal(shape) * 10 ** rng.uniform(-2, 1) for name, shape in SHAPES.items()}


def weights():
    rng = np.random.default_rng(3)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


# ---- the layouts, as the sources have them -----------------------------------------------------------------


def options_of(row):
    options = {"eps": 1e-8, "grad_averaging": False, **documented()[row]}
    return {"lr": learning_rate(BEFORE), "weight_decay": WEIGHT_DECAY, **options}


def tensor(value):
    return torch.tensor(value)


def jasper_layout(row, implementations):
    """NeMo, timm, MONAI, DeepLearningExamples, torch_optimizer."""
    state = {
        i: {"step": BEFORE, "exp_avg": tensor(o.exp_avg), "exp_avg_sq": tensor(o.exp_avg_sq)}
        for i, o in enumerate(implementations)
    }
    return {"state": state, "param_groups": [{**options_of(row), "amsgrad": False, "params": [0, 1]}]}


def apex_layout(row, implementations):
    """The norms are in the param group: first of the parameters in float16, then of those in float32."""
    group = {"norm_type": 2, "init_zero": False, **options_of(row), "params": [0, 1], "step": BEFORE}
    group.pop("reg_inside_moment", None)  # which it does not save
    group["exp_avg_sq"] = [torch.empty(0), tensor([o.norm for o in implementations])]
    state = {i: {"exp_avg": tensor(o.m)} for i, o in enumerate(implementations)}
    return {"state": state, "param_groups": [group]}


def pytorch_optimizer_layout(row, implementations):
    group = {**options_of(row), "weight_decouple": False, "fixed_decay": False, "foreach": None}
    state = {
        i: {"grads_ema": tensor(o.exp_avg_sq), "moments": tensor(o.exp_avg)}
        for i, o in enumerate(implementations)
    }
    return {"state": state, "param_groups": [{**group, "step": BEFORE, "params": [0, 1]}]}


def arrays(moments):
    state = {i: {"mu": mu, "nu": nu, "count": BEFORE} for i, (mu, nu) in enumerate(moments)}
    return {"state": state, "param_groups": [{"params": [*range(len(state))]}]}


def optax_layout(row, implementations):
    return arrays([(o.mu, o.nu) for o in implementations])


def flashlight_layout(row, implementations):
    return arrays([(o.acc, o.norm) for o in implementations])


LAYOUTS = {
    "Apex": apex_layout,
    "pytorch_optimizer": pytorch_optimizer_layout,
    "optax": optax_layout,
    "flashlight": flashlight_layout,
}


@pytest.mark.parametrize("row", IMPLEMENTATIONS, ids=" ".join)
def test_each_row_goes_on_from_the_state_of_its_optimizer(row):
    theirs, implementations = weights(), {name: IMPLEMENTATIONS[row]() for name in SHAPES}
    for step in range(BEFORE):
        for name, g in gradients(step).items():
            theirs[name] = implementations[name](theirs[name], g, learning_rate(step))
    params = [nn.Parameter(tensor(p)) for p in theirs.values()]
    optimizer = NovoGrad(
        params, lr=1.0, weight_decay=WEIGHT_DECAY, **{"preset": "paper", **documented()[row]}
    )
    saved = LAYOUTS.get(row[0], jasper_layout)(row, [*implementations.values()])
    optimizer.load_state_dict(saved)
    for option, value in documented()[row].items():
        assert optimizer.param_groups[0][option] == value
    for step in range(BEFORE, BEFORE + AFTER):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        for p, (name, g) in zip(params, gradients(step).items(), strict=True):
            theirs[name] = implementations[name](theirs[name], g, learning_rate(step))
            p.grad = tensor(g)
        optimizer.step()
    for p, expected in zip(params, theirs.values(), strict=True):
        assert deviation(p.detach().numpy(), expected) < 1e-6


# ---- the packages themselves, where they are installed -----------------------------------------------------


def of_package(module, name):
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit torch
        pytest.skip(f"{module}: {error}")


PACKAGES = {
    "torch_optimizer": ("torch_optimizer", "NovoGrad"),
    "MONAI": ("monai.optimizers.novograd", "Novograd"),
    "timm": ("timm.optim.nvnovograd", "NvNovoGrad"),
    "pytorch_optimizer": ("pytorch_optimizer", "NovoGrad"),
}


@pytest.mark.parametrize("grad_averaging", [False, True])
@pytest.mark.parametrize("package", PACKAGES)
def test_the_package_itself_goes_on_as_it_would_have(package, grad_averaging):
    make = of_package(*PACKAGES[package])
    params = [nn.Parameter(tensor(w)) for w in weights().values()]
    their = make(params, lr=0.05, weight_decay=WEIGHT_DECAY, grad_averaging=grad_averaging)

    def step(optimizer, members, nth):
        for p, g in zip(members, gradients(nth).values(), strict=True):
            p.grad = tensor(g)  # anew: some write to it
        optimizer.step()

    for nth in range(BEFORE):
        step(their, params, nth)
    buffer = io.BytesIO()
    torch.save(their.state_dict(), buffer)
    buffer.seek(0)
    ours = copy.deepcopy(params)
    options = documented()[(package, "its defaults")]
    optimizer = NovoGrad(ours, lr=1.0, **{"preset": "paper", **options})
    optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    for nth in range(BEFORE, BEFORE + AFTER):
        step(their, params, nth)
        step(optimizer, ours, nth)
    for p, q in zip(ours, params, strict=True):
        assert deviation(p.detach().numpy(), q.detach().numpy()) < 1e-6


def test_optax_itself():
    pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    theirs = {name: np.asarray(w, dtype=np.float32) for name, w in weights().items()}
    transform = optax.novograd(learning_rate=0.05, weight_decay=WEIGHT_DECAY)
    state = transform.init(theirs)

    def step(nth):
        nonlocal state
        grads = {name: g.astype(np.float32) for name, g in gradients(nth).items()}
        updates, state = transform.update(grads, state, theirs)
        theirs.update({name: np.asarray(w) for name, w in optax.apply_updates(theirs, updates).items()})
        return grads

    for nth in range(BEFORE):
        step(nth)
    inner = next(s for s in state if hasattr(s, "nu"))
    params = [nn.Parameter(torch.tensor(w)) for w in theirs.values()]
    optimizer = NovoGrad(
        params,
        lr=0.05,
        weight_decay=WEIGHT_DECAY,
        **{"preset": "paper", **documented()[("optax", "its defaults")]},
    )
    optimizer.load_state_dict(
        {
            "state": {
                i: {"mu": np.array(inner.mu[n]), "nu": np.array(inner.nu[n]), "count": int(inner.count)}
                for i, n in enumerate(SHAPES)
            },
            "param_groups": [{"params": [0, 1]}],
        }
    )
    for nth in range(BEFORE, BEFORE + AFTER):
        for p, g in zip(params, step(nth).values(), strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
    for p, w in zip(params, theirs.values(), strict=True):
        assert deviation(p.detach().numpy(), w) < 2e-6  # float32 on both sides


# ---- Apex's vectors, and what is refused -------------------------------------------------------------------


def test_apex_norms_are_given_by_dtype_and_order_to_those_that_had_gradients():
    dtypes = [torch.float32, torch.float16, torch.float32, torch.float16]
    params = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes]
    group = {
        **options_of(("Apex", "its defaults")),
        "params": [0, 1, 2, 3],
        "step": 9,
        "exp_avg_sq": [torch.tensor([2.0, 3.0]), torch.tensor([5.0])],
    }
    del group["reg_inside_moment"]
    state = {i: {"exp_avg": torch.ones(3, dtype=dtypes[i])} for i in (1, 2, 3)}
    optimizer = NovoGrad(params, **{"preset": "paper", **documented()[("Apex", "its defaults")]})
    optimizer.load_state_dict({"state": state, "param_groups": [group]})
    found = [optimizer.state[p]["exp_avg_sq"].tolist() if p in optimizer.state else None for p in params]
    assert found == [None, [4.0], [25.0], [9.0]]
    assert all(optimizer.state[p]["step"].tolist() == [9.0] for p in params[1:])
    assert not {"step", "exp_avg_sq"} & optimizer.param_groups[0].keys()


def novograd(**changes):
    state = {"step": 3, "exp_avg": torch.ones(3), "exp_avg_sq": torch.tensor(2.0)}
    group = {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.0, "grad_averaging": False}
    return {"state": {0: state}, "param_groups": [{**group, "params": [0], **changes}]}


def of_apex(norms):
    return {**novograd(exp_avg_sq=norms, step=3), "state": {0: {"exp_avg": torch.ones(3)}}}


BAD = {
    "AMSGrad": (novograd(amsgrad=True), "param group 0 of the state dict has amsgrad=True"),
    "a decay of its own": (novograd(weight_decouple=True), "weight_decouple=True, which NovoGrad cannot do"),
    "too many norms": (
        of_apex([torch.empty(0), torch.ones(2)]),
        "has 2 norms in exp_avg_sq of parameters in float32, and 1 of those have a state",
    ),
    "the other dtype": (
        of_apex([torch.ones(1), torch.empty(0)]),
        "1 norms .* in half precision, and 0 of those",
    ),
    "unknown keys": (
        {**novograd(), "state": {0: {"moment": torch.ones(3)}}},
        "p: its state has moment, which is none of the layouts",
    ),
    "another shape": (
        {**novograd(), "state": {0: {"exp_avg": torch.ones(4), "exp_avg_sq": torch.tensor(1.0)}}},
        r"exp_avg of p has the shape exp_avg \(4,\)",
    ),
    "v of each element": (
        {**novograd(), "state": {0: {"exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}}},
        "exp_avg_sq of p has 3 elements where NovoGrad keeps one per layer",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named_and_nothing_is_changed(case):
    saved, message = BAD[case]
    p = nn.Parameter(torch.ones(3))
    optimizer = NovoGrad([("p", p)], lr=0.7, preset="paper")
    p.grad = torch.ones(3)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][0][key], value) for key, value in before["state"][0].items())
