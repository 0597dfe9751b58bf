"""From AdamW to NovoGrad in the middle of a training that is sharded over ranks: as in one process."""

import math

import from_adam_ranks
import numpy as np
import pytest
from kept_ranks import run_ranks
from oracle import deviation

BOUND = 2e-5  # float32 under the wrapper, float64 in one process
ADAMW = {"preset": "adamw"}
EVERYTHING = {"preset": "adamw", "clip_threshold": 0.5, "scale_parameter": True}
ROWS = {"granularity": "row", "normalize": "rms", "grad_averaging": True}


def worst(weights, expected):
    return max(deviation(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("options", [ADAMW, EVERYTHING, ROWS, {}], ids=str)
@pytest.mark.parametrize("shape", [(3,), (2, 2)], ids=str)
def test_fsdp2_and_hsdp(shape, options):
    expected = from_adam_ranks.changed_over(options)
    for weights in run_ranks(from_adam_ranks.fsdp2, math.prod(shape), shape, options, "state_dict"):
        assert worst(weights, expected) < BOUND


@pytest.mark.parametrize(
    "how", ["local tensors", "whole tensors", "full state dict", "set_optimizer_state_dict"]
)
def test_in_whatever_form_the_state_comes(how):
    expected = from_adam_ranks.changed_over(ADAMW)
    for weights in run_ranks(from_adam_ranks.fsdp2, 3, (3,), ADAMW, how):
        assert worst(weights, expected) < BOUND


@pytest.mark.parametrize("momentum_dtype", ["int8", "int4"])
def test_blocks_that_are_cut_are_rounded_as_in_one_process(momentum_dtype):
    expected = from_adam_ranks.in_blocks(momentum_dtype)
    for found in run_ranks(from_adam_ranks.in_blocks, 3, momentum_dtype):
        assert found.keys() == expected.keys()
        assert np.array_equal(found["exp_avg_scale"], expected["exp_avg_scale"])
        # v is added up in another order: a moment in the middle of two codes may fall on either.
        assert (found["exp_avg"] != expected["exp_avg"]).mean() < 1e-3


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(2, 3), (3, 1)])
def test_a_distributed_checkpoint_of_adamw_on_another_number_of_ranks(saved_on, loaded_on, tmp_path):
    run_ranks(from_adam_ranks.checkpointed, saved_on, str(tmp_path), ADAMW, True)
    expected = from_adam_ranks.changed_over(ADAMW)
    for weights in run_ranks(from_adam_ranks.checkpointed, loaded_on, str(tmp_path), ADAMW, False):
        assert worst(weights, expected) < BOUND


@pytest.mark.parametrize("options", [ADAMW, EVERYTHING, ROWS, {"granularity": 2}, {}], ids=str)
@pytest.mark.parametrize(("world", "data_world"), [(3, 1), (4, 2)])
def test_tensor_parallel_alone_and_with_fsdp2(world, data_world, options):
    expected = from_adam_ranks.one_process(data_world, options)
    for found in run_ranks(from_adam_ranks.tensor_parallel, world, data_world, options):
        assert worst(found, expected) < BOUND


def test_a_state_that_one_rank_refuses_is_refused_by_all():
    first, second = run_ranks(from_adam_ranks.refused, 2, ADAMW)
    assert "exp_avg of first.weight has the shape (1, 13)" in first
    assert "refused on another rank" in second


def test_a_state_that_is_not_finite_on_one_rank_is_refused_by_all():
    for line in run_ranks(from_adam_ranks.not_finite, 2, ADAMW):
        assert "is not a finite number" in line or "refused on another rank" in line
