"""State dicts of Adams: the forms that are taken, the options that go over, and what is refused."""

import copy

import adam
import pytest
import torch
from taken_over import (
    COLLECTED,
    LR,
    SHAPES,
    changing_gradients,
    parameters,
    state_dict_of_adam,
    taken_over,
    weights,
)
from torch import nn

from novoscale import NovoGrad

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
    paper = NovoGrad(mine(), lr=1.0, weight_decay=0.5, allow_lossy_load=True, preset="paper")
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
        NovoGrad(parameters(), allow_lossy_load=True, preset="paper").load_state_dict(saved)


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
