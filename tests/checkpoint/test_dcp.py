"""torch.distributed.checkpoint: from any ranks to any other, in every form of a state dict, to the bit."""

import dcp_ranks
import fixed_gradients
import pytest
from kept_ranks import run_ranks

FORMS = {
    "sharded": {},
    "full": {"full_state_dict": True},
    "full, offloaded": {"full_state_dict": True, "cpu_offload": True},
    "flat": {"flatten_optimizer_state_dict": True},
    "flat, offloaded": {"flatten_optimizer_state_dict": True, "cpu_offload": True},
}
OPTIONS = [
    {},
    {"momentum_dtype": "bfloat16", "granularity": "row", "normalize": "rms"},
    {"momentum_dtype": "int8", "preset": "adamw", "clip_threshold": 0.5},
    {"momentum_dtype": "int4", "preset": "adamw"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("first", "second"), [(("fsdp2", 3), ("fsdp2", 2)), (("hsdp", 4), ("one", 1))], ids=str
)
def test_a_training_goes_on_to_the_same_bits(first, second, form, options, tmp_path):
    options = {"lr": 0.05, "weight_decay": 0.1, **options}
    given = (options, FORMS[form], str(tmp_path / "saved"))
    run_ranks(dcp_ranks.saved, first[1], first[0], *given)
    found = run_ranks(dcp_ranks.resumed, second[1], second[0], *given)
    assert fixed_gradients.differing(found, fixed_gradients.unsharded(options)) == set()
