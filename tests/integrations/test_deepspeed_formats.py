"""Momentum formats and rows under DeepSpeed: the same whatever the stage and the number of ranks."""

import fixed_gradients
import pytest
import torch
import zero_ranks
from kept_ranks import run_ranks
from oracle import deviation
from training import reference
from zero_ranks import config

ROWS = {"granularity": "row", "normalize": "rms"}
BF16_MASTER = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


def with_options(ds, **options):
    ds["optimizer"]["params"] = {"lr": 0.02, "preset": "paper", **options}
    return ds


@pytest.mark.parametrize(("stage", "world_size"), [(0, 2), (1, 3), (2, 4), (3, 2), (3, 3)])
def test_rows_give_the_trajectory_of_one_process(stage, world_size):
    expected = reference(0.02, rows=True, normalize="rms", clip=0.3)
    ds = with_options(config(stage, world_size, clip=0.3), **ROWS)
    for weights in run_ranks(zero_ranks.trained, world_size, ds, False):
        assert max(deviation(weights[n], expected[n]) for n in expected) < 2e-5


@pytest.mark.parametrize("stage", [2, 3])
def test_recommended_groups(stage):
    expected = reference(0.02, rows=True, normalize="rms", groups=True)
    ds = with_options(config(stage, 3), normalize="rms")
    for weights in run_ranks(zero_ranks.trained_in_recommended_groups, 3, ds):
        assert max(deviation(weights[n], expected[n]) for n in expected) < 2e-5


ADAMW = {"preset": "adamw", "clip_threshold": 0.5, "scale_parameter": True}


@pytest.mark.parametrize(
    "options",
    [
        {"momentum_dtype": "int8"},
        {"momentum_dtype": "int4", **ROWS},
        {"momentum_dtype": "int8", **ADAMW},
    ],
    ids=str,
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_same_bits_in_every_block_on_any_number_of_ranks(stage, options):
    options = {"lr": 0.05, "weight_decay": 0.1, **options}
    expected = fixed_gradients.unsharded(options)
    for world_size in (1, 2, 3, 4) if options["momentum_dtype"] == "int4" else (3,):
        ranks = run_ranks(
            zero_ranks.fixed_pieces, world_size, with_options(config(stage, world_size), **options), False
        )
        assert fixed_gradients.differing(ranks, expected) == set()


@pytest.mark.parametrize("stage", [2, 3])
def test_same_bits_in_every_block_with_offload(stage):
    options = {"lr": 0.05, "weight_decay": 0.1, "momentum_dtype": "int8", **ADAMW}
    ds = with_options(config(stage, 3, offload_optimizer={"device": "cpu"}), **options)
    ranks = run_ranks(zero_ranks.fixed_pieces, 3, ds, False)
    assert fixed_gradients.differing(ranks, fixed_gradients.unsharded(options)) == set()


@pytest.mark.parametrize("stage", [2, 3])
def test_same_bits_beside_frozen_parameters(stage):
    """DeepSpeed leaves frozen parameters out of its groups; the random bits count them all the same."""
    options, frozen = {"lr": 0.05, "weight_decay": 0.1, "momentum_dtype": "int8"}, ("blocks", "tiny")
    ranks = run_ranks(zero_ranks.fixed_pieces, 3, with_options(config(stage, 3), **options), False, frozen)
    expected = fixed_gradients.unsharded(options, frozen=frozen)
    assert fixed_gradients.differing(ranks, expected) == set()


def test_same_bits_in_every_block_under_the_bf16_optimizer():
    options = {"lr": 0.05, "weight_decay": 0.1, "momentum_dtype": "int4", **ADAMW}
    ds = {**config(1, 3), "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    ranks = run_ranks(zero_ranks.fixed_pieces, 3, with_options(ds, **options), True)
    expected = fixed_gradients.unsharded(options, torch.bfloat16, master=torch.float32)
    assert fixed_gradients.differing(ranks, expected) == set()


@pytest.mark.parametrize("options", [{}, {"momentum_dtype": "bfloat16"}, ADAMW], ids=str)
@pytest.mark.parametrize("stage", [1, 3])
def test_same_bits_in_formats_without_blocks(stage, options):
    options = {"lr": 0.05, "weight_decay": 0.1, **options}
    expected = fixed_gradients.unsharded(options)
    ranks = run_ranks(zero_ranks.fixed_pieces, 3, with_options(config(stage, 3), **options), False)
    assert fixed_gradients.differing(ranks, expected) == set()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_master_weights_are_rounded_as_in_one_process(stage):
    options = {"lr": 0.05, "momentum_dtype": "int8"}
    expected = fixed_gradients.unsharded(options, torch.bfloat16)
    ds = with_options({**config(stage, 2), "bf16": BF16_MASTER}, **options)
    ranks = run_ranks(zero_ranks.fixed_pieces, 2, ds, True)
    assert fixed_gradients.differing(ranks, expected) == set()


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (1, {"momentum_dtype": "bfloat16"}),
        (2, {"momentum_dtype": "int4", **ROWS}),
        (3, {"momentum_dtype": "int8"}),
        (2, {"preset": "adamw", "momentum_dtype": "int8"}),
        (3, {"preset": "adamw", "momentum_dtype": "int4"}),
    ],
    ids=str,
)
def test_checkpoint_resumes_to_the_same_bits(stage, options, tmp_path):
    ds = with_options(config(stage, 2), **options)
    assert all(run_ranks(zero_ranks.fixed_resumed, 2, ds, str(tmp_path)))


@pytest.mark.parametrize(
    ("stage", "momentum_dtype"), [(1, "bfloat16"), (2, "int8"), (2, "int4"), (3, "int8"), (3, "int4")]
)
def test_bytes_are_divided_by_the_ranks(stage, momentum_dtype):
    ds = with_options(config(stage, 3), momentum_dtype=momentum_dtype)
    ds["zero_optimization"].update(reduce_bucket_size=10**6, allgather_bucket_size=10**6)
    found = run_ranks(zero_ranks.bytes_of_gpt2, 3, ds)
    whole = found[0][1]
    assert sum(held for held, _ in found) == pytest.approx(whole, rel=0.01)
    # Small parameters, in float32, make up 2 % here (and 0.1 % of GPT-2 124M), and not the same on each rank.
    assert all(held == pytest.approx(whole / 3, rel=0.03) for held, _ in found)
