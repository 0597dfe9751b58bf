"""A training under ZeRO goes on, on another number of ranks, as if it had not been interrupted."""

import fixed_gradients
import pytest
import torch
import universal_ranks
from kept_ranks import run_ranks
from novoscale.integrations.deepspeed_checkpoint import to_universal
from zero_ranks import config

UNIVERSAL = {"checkpoint": {"load_universal": True}}
FORMS = [
    {},
    {"momentum_dtype": "bfloat16", "granularity": "row", "normalize": "rms"},
    {"momentum_dtype": "int8", "preset": "adamw", "clip_threshold": 0.5, "scale_parameter": True},
    {"momentum_dtype": "int4", "preset": "adamw"},
    {"momentum_dtype": "int8", "bias_correction": True},
]


def with_options(ds, options, **more):
    ds["optimizer"]["params"] = {"lr": 0.05, "weight_decay": 0.1, **options}
    return ds | more


def resume(folder, first, second, options, *, stages=(2, 2), bfloat16=False, groups=False, zero=(), **more):
    """What the ranks hold after the second half, on another number of ranks than the first."""
    zero = dict(zero)
    ds = with_options(config(stages[0], first, **zero), options, **more)
    run_ranks(universal_ranks.saved, first, ds, str(folder / "saved"), bfloat16, groups)
    to_universal(folder / "saved" / "half", folder / "universal" / "half")
    ds = with_options(config(stages[1], second, **zero), options, **UNIVERSAL, **more)
    return run_ranks(universal_ranks.resumed, second, ds, str(folder / "universal"), bfloat16, groups)


def assert_uninterrupted(found, options, dtype=torch.float32, master=None):
    expected = fixed_gradients.uncut({"lr": 0.05, "weight_decay": 0.1, **options}, dtype, master=master)
    assert not any(isinstance(rank, str) for rank in found), found
    assert fixed_gradients.differing([pieces for pieces, _ in found], expected) == set()


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize(
    ("stage", "first", "second"), [(1, 3, 2), (2, 1, 4), (2, 4, 3), (3, 2, 3), (3, 3, 1)]
)
def test_it_goes_on_to_the_same_bits_on_another_number_of_ranks(stage, first, second, options, tmp_path):
    found = resume(tmp_path, first, second, options, stages=(stage, stage))
    assert_uninterrupted(found, options)


INT8 = FORMS[2]


@pytest.mark.parametrize("stages", [(1, 2), (2, 1)], ids=str)
def test_from_stage_1_to_2_and_back(stages, tmp_path):
    assert_uninterrupted(resume(tmp_path, 2, 3, INT8, stages=stages), INT8)


@pytest.mark.parametrize("stages", [(3, 2), (1, 3)], ids=str)
def test_to_and_from_stage_3_is_one_error_or_goes_on(stages, tmp_path):
    found = resume(tmp_path, 2, 3, INT8, stages=stages)
    print(found[0] if isinstance(found[0], str) else "goes on")
    assert_uninterrupted(found, INT8)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    "zero",
    [
        {"offload_optimizer": {"device": "cpu"}},
        {"round_robin_gradients": True},
        {"sub_group_size": 5000},
    ],
    ids=str,
)
def test_with_offload_round_robin_and_sub_groups(stage, zero, tmp_path):
    assert_uninterrupted(resume(tmp_path, 3, 2, INT8, stages=(stage, stage), zero=zero), INT8)


def test_under_the_bf16_optimizer(tmp_path):
    more = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    found = resume(tmp_path, 3, 2, INT8, stages=(1, 1), bfloat16=True, **more)
    assert_uninterrupted(found, INT8, torch.bfloat16, master=torch.float32)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_param_groups_keep_their_options(stage, tmp_path):
    found = resume(tmp_path, 2, 3, INT8, stages=(stage, stage), groups=True)
    assert not any(isinstance(rank, str) for rank in found), found
    assert [decays for _, decays in found] == [[0.1, 0.0]] * 3
