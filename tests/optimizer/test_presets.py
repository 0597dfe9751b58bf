"""One word for a set of options: what is given wins, in code, in param groups, and it is shown."""

import torch
from torch import nn

from novoscale import NovoGrad, param_groups
from novoscale.optimizer import presets


def parameter(*shape):
    return nn.Parameter(torch.ones(shape or (3, 4)))


def options(group):
    return {name: group[name] for name in presets.PRESETS["adamw"]}


def test_each_preset_has_the_same_options_and_adamw_is_the_default():
    assert len({frozenset(preset) for preset in presets.PRESETS.values()}) == 1
    assert options(NovoGrad([parameter()]).param_groups[0]) == presets.PRESETS["adamw"]
    for name in ("paper", "adamw"):
        (group,) = NovoGrad([parameter()], preset=name).param_groups
        assert options(group) == presets.PRESETS[name]


def test_what_is_given_wins_over_the_preset():
    (group,) = NovoGrad([parameter()], preset="adamw", nesterov=False, betas=[0.8, 0.9]).param_groups
    assert options(group) == {**presets.PRESETS["adamw"], "nesterov": False, "betas": (0.8, 0.9)}


def test_a_param_group_may_have_its_own_preset_and_options():
    groups = [
        {"params": [parameter()], "preset": "paper"},
        {"params": [parameter()]},
        {"params": [parameter()], "preset": "adamw", "granularity": "row", "nesterov": None},
    ]
    found = NovoGrad(groups, lr=0.1, betas=(0.5, 0.6), momentum_dtype="int8").param_groups
    # What the optimizer was given beside its preset holds for the groups too.
    assert options(found[0]) == {**presets.PRESETS["paper"], "betas": (0.5, 0.6)}
    assert options(found[1]) == {**presets.PRESETS["adamw"], "betas": (0.5, 0.6)}
    assert options(found[2]) == {**presets.PRESETS["adamw"], "betas": (0.5, 0.6), "granularity": "row"}
    assert {g["momentum_dtype"] for g in found} == {"int8"}


def test_recommended_groups_take_a_preset():
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    groups = param_groups(model, weight_decay=0.1, preset="adamw")
    optimizer = NovoGrad(groups, lr=0.1)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert all(options(g) == presets.PRESETS["adamw"] for g in optimizer.param_groups)
    assert "weight_decay=0.1, preset='adamw': 1 parameters" in str(
        param_groups(model, weight_decay=0.1, preset="adamw")
    )


def test_print_shows_where_each_option_comes_from():
    text = repr(
        NovoGrad([{"params": [parameter()], "weight_decay": 0.5}], lr=0.2, preset="adamw", betas=(0.5, 0.6))
    )
    for line in (
        "preset: adamw",
        "granularity: 'factored' (from preset='adamw')",
        "nesterov: True (from preset='adamw')",
        "betas: (0.5, 0.6)\n",
        "lr: 0.2\n",
        "weight_decay: 0.5\n",
        "eps: 1e-08 (default)",
        "momentum_dtype: 'float32' (default)",
    ):
        assert line in text
    assert "param group 0, 1 parameters" in text
