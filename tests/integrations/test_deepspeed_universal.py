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
