"""Under FSDP2, HSDP and tensor parallelism released gradients are the same training, to the bit."""

import pytest
import release_ranks
from kept_ranks import run_ranks

FORMS = [
    {},
    {"preset": "adamw", "momentum_dtype": "int8"},
    {"preset": "adamw", "momentum_dtype": "int4"},
    {"momentum_dtype": "bfloat16", "clip_threshold": 0.7, "scale_parameter": True},
]


def assert_same_training(world, *args):
    for differing in run_ranks(release_ranks.same_training, world, *args):
        assert differing == []


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize(
    ("kind", "world"), [("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4), ("tp", 2), ("fsdp2+tp", 4)]
)
def test_it_is_the_same_training_to_the_bit(kind, world, options):
    assert_same_training(world, kind, options)


@pytest.mark.parametrize("kind", ["bfloat16", "kept"])
def test_with_mixed_precision_and_with_parameters_that_stay_gathered(kind):
    assert_same_training(2, kind, FORMS[1])


@pytest.mark.parametrize("checkpoints", ["plain", "reentrant"])
@pytest.mark.filterwarnings("ignore:reentrant")
def test_with_activation_checkpointing(checkpoints):
    assert_same_training(2, "fsdp2", FORMS[1], checkpoints)


def test_with_accumulation():
    assert_same_training(2, "fsdp2", FORMS[1], "", 3)


@pytest.mark.parametrize("preset", ["paper", "adamw"])
@pytest.mark.parametrize(("kind", "world"), [("fsdp2", 2), ("hsdp", 4)])
def test_one_collective_for_each_fsdp_unit_in_the_same_order_on_every_rank(kind, world, preset):
    found = run_ranks(release_ranks.collectives, world, kind, preset)
    lengths, units = found[0]
    assert len(lengths) == units
    assert found == [(lengths, units)] * world


@pytest.mark.parametrize("options", [{}, {"preset": "adamw"}], ids=str)
@pytest.mark.parametrize(("kind", "world"), [("fsdp2", 2), ("hsdp", 4)])
def test_a_nan_on_one_rank_leaves_that_parameter_on_every_rank(kind, world, options):
    for found in run_ranks(release_ranks.nan_on_one_rank, world, kind, options):
        assert found["kept"] == ["blocks.1.up.weight"]
        assert found["skipped"] == 1
    assert any(name.startswith("blocks.1.up.weight") for name in found["layers"])


@pytest.mark.parametrize("wrapped_first", [True, False], ids=["before", "after"])
def test_ddp_is_refused_before_anything_is_changed(wrapped_first):
    for message in run_ranks(release_ranks.refused_ddp, 2, wrapped_first):
        assert "DistributedDataParallel" in message
        assert "fully_shard" in message
