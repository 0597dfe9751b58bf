"""State in and out: the same run goes on, whatever it was carried by; what does not fit is refused."""

import copy
import io
import pickle

import pytest
import torch
from stepping import SHAPES, gradients, parameters, set_gradients
from torch import nn

from novoscale import NovoGrad
from novoscale.state import momentum


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_gives_the_same_bits_as_not_stopping(how, dtype):
    params = parameters(dtype)
    options = {"lr": 0.03, "weight_decay": 0.1, "bias_correction": True}
    optimizer = NovoGrad(params, **{"preset": "paper", **options})
    for step in range(3):
        set_gradients(params, gradients(step))
        optimizer.step()
    if how in ("deepcopy", "pickle"):
        clone = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        others = clone.param_groups[0]["params"]
    else:
        others = copy.deepcopy(params)
        clone = NovoGrad(others, lr=1.0, preset="paper")
        saved = optimizer.state_dict()
        if how == "torch.save":
            buffer = io.BytesIO()
            torch.save(saved, buffer)
            buffer.seek(0)
            saved = torch.load(buffer, weights_only=True)
        clone.load_state_dict(saved)
    for p, q in zip(params, others, strict=True):
        for key, value in optimizer.state[p].items():
            assert clone.state[q][key].dtype == value.dtype == torch.float32
            assert torch.equal(clone.state[q][key], value)
            assert clone.state[q][key] is not value
    for step in range(3, 6):
        for ps, o in ((params, optimizer), (others, clone)):
            set_gradients(ps, gradients(step))
            o.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_load_state_dict_hooks_see_and_may_change_what_is_loaded():
    params = parameters(torch.bfloat16)
    optimizer = NovoGrad(params, lr=0.03, preset="paper")
    set_gradients(params, gradients(0))
    optimizer.step()
    saved = optimizer.state_dict()
    other = NovoGrad(parameters(torch.bfloat16), lr=1.0, preset="paper")

    def double(_, state_dict):
        state = {k: {**v, "exp_avg": v["exp_avg"] * 2} for k, v in state_dict["state"].items()}
        return {**state_dict, "state": state}

    seen = []
    other.register_load_state_dict_pre_hook(double)
    other.register_load_state_dict_post_hook(lambda o: seen.append(next(iter(o.state.values()))["exp_avg"]))
    other.load_state_dict(saved)
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], 2 * saved["state"][0]["exp_avg"])


def test_state_of_a_jasper_family_novograd_loads():
    params = parameters()[:2]
    optimizer = NovoGrad(params, lr=0.1, preset="paper")
    state = {
        i: {"step": 3, "exp_avg": torch.randn_like(p), "exp_avg_sq": torch.tensor(float(i + 1))}
        for i, p in enumerate(params)
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    assert [optimizer.state[p]["exp_avg_sq"].tolist() for p in params] == [[1.0], [2.0]]
    set_gradients(params, gradients(0, SHAPES[:2]))
    optimizer.step()


def test_only_private_attributes_are_not_copied():
    # torch's own conformance test: deepcopy keeps defaults, state and param_groups.
    optimizer = NovoGrad(parameters(), lr=0.1, preset="paper")
    public = lambda o: {k for k in vars(o) if not k.startswith("_")}  # noqa: E731
    assert public(optimizer) == public(copy.deepcopy(optimizer)) == {"defaults", "state", "param_groups"}
    assert "NovoGrad" in repr(optimizer)


def test_state_of_another_optimizer_or_model_is_refused_and_nothing_changed():
    p = nn.Parameter(torch.ones(4))
    adam = torch.optim.AdamW([p])
    p.grad = torch.ones(4)
    adam.step()
    optimizer = NovoGrad([p], lr=0.1, preset="paper")
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(
        ValueError, match=r"exp_avg_sq of parameter 0 of param group 0 has 4 elements .* one per layer"
    ):
        optimizer.load_state_dict({**before, "state": adam.state_dict()["state"]})
    with pytest.raises(
        ValueError,
        match=r"exp_avg of parameter 0 of param group 0 has the shape exp_avg \(5,\), .* exp_avg \(4,\)",
    ):
        optimizer.load_state_dict(
            {**before, "state": {0: {"exp_avg": torch.ones(5), "exp_avg_sq": torch.ones(1)}}}
        )
    after = optimizer.state_dict()
    assert all(torch.equal(after["state"][0][k], before["state"][0][k]) for k in before["state"][0])


FORMATS = ["float32", "bfloat16", "int8", "int4"]
LARGE = [(70, 128), (33, 131), (9,)]


def trained(momentum_dtype, steps=3, dtype=torch.float32, **options):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in LARGE]
    optimizer = NovoGrad(
        params, lr=0.03, momentum_dtype=momentum_dtype, seed=5, **{"preset": "paper", **options}
    )
    for step in range(steps):
        set_gradients(params, gradients(step, LARGE))
        optimizer.step()
    return params, optimizer


def moments(optimizer, params):
    """The first moments as numbers."""
    states = [optimizer.state[p] for p in params]
    return [
        momentum.read(s["exp_avg"], s.get("exp_avg_scale"), 0, 0, p.numel()).float().clone()
        for s, p in zip(states, params, strict=True)
    ]


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum_dtype", FORMATS[1:])
def test_resuming_in_every_format_gives_the_same_bits(momentum_dtype, dtype, granularity):
    params, optimizer = trained(momentum_dtype, dtype=dtype, granularity=granularity)
    others = copy.deepcopy(params)
    clone = NovoGrad(others, momentum_dtype=momentum_dtype, granularity=granularity, preset="paper")
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    clone.load_state_dict(torch.load(buffer, weights_only=True))
    for p, q in zip(params, others, strict=True):
        for key, value in optimizer.state[p].items():
            assert clone.state[q][key].dtype == value.dtype
            assert torch.equal(clone.state[q][key], value)
    for ps, o in ((params, optimizer), (others, clone)):
        for step in range(3, 6):
            set_gradients(ps, gradients(step, LARGE))
            o.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_a_state_in_another_format_is_converted_where_that_loses_nothing(source, target):
    params, optimizer = trained(source)
    before = moments(optimizer, params)
    lossless = source == target or target == "float32" or (source, target) == ("int4", "int8")
    others = copy.deepcopy(params)
    clone = NovoGrad(others, momentum_dtype=target, preset="paper")
    if lossless:
        clone.load_state_dict(optimizer.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(moments(clone, others), before, strict=True))
    else:
        with pytest.raises(ValueError, match=rf"parameter 0 .*{target}.* allow_lossy_load=True"):
            clone.load_state_dict(optimizer.state_dict())
        assert not clone.state
        clone = NovoGrad(others, momentum_dtype=target, allow_lossy_load=True, preset="paper")
        clone.load_state_dict(optimizer.state_dict())
        spacing = {"bfloat16": 2**-8, "int8": 1 / 127, "int4": 1 / 7}[target]
        for mine, its in zip(moments(clone, others), before, strict=True):
            assert (mine - its).abs().max() <= spacing * its.abs().max()
    assert clone.param_groups[0]["momentum_dtype"] == target
    set_gradients(others, gradients(9, LARGE))
    clone.step()


@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.parametrize("fused", [False, None])
def test_a_state_that_was_loaded_or_made_in_inference_mode_is_stepped(momentum_dtype, fused):
    params, optimizer = trained(momentum_dtype, fused=fused)
    saved = copy.deepcopy(optimizer.state_dict())
    others = [nn.Parameter(p.detach().clone()) for p in params]
    clone = NovoGrad(others, momentum_dtype=momentum_dtype, fused=fused, preset="paper")
    with torch.inference_mode():
        set_gradients(others, [torch.zeros(shape) for shape in LARGE])
        clone.step()  # as torch's get_optimizer_state_dict does
        clone.load_state_dict(saved)
    for ps, o in ((params, optimizer), (others, clone)):
        set_gradients(ps, gradients(3, LARGE))
        o.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_second_moments_of_another_granularity_are_refused():
    _, optimizer = trained("float32", granularity="row")
    _, other = trained("float32")
    with pytest.raises(
        ValueError, match=r"exp_avg_sq of parameter 0 .* has 70 elements .* granularity has to be"
    ):
        other.load_state_dict(optimizer.state_dict())


def test_a_format_that_is_changed_while_it_is_in_use_is_refused():
    params, optimizer = trained("int8")
    optimizer.param_groups[0]["momentum_dtype"] = "int4"
    before = copy.deepcopy(optimizer.state_dict())
    set_gradients(params, gradients(9, LARGE))
    with pytest.raises(RuntimeError, match=r"momentum_dtype .* was 'int8' and is 'int4' now"):
        optimizer.step()
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[0][key], before["state"][0][key]) for key in after[0])
