"""NovoGrad under DeepSpeed's ZeRO stages 1 and 2: the training is that of one process."""

import os
import re
import time

import numpy as np
import pytest
import torch
import zero_ranks
from kept_ranks import run_ranks
from oracle import Oracle, deviation
from training import STEPS, data, reference
from zero_ranks import config

from novoscale.tools.local_ranks import RankError
from novoscale.tools.local_ranks import run_ranks as run_new_ranks

BOUND = 2e-5  # float32, relative, after 10 steps


def assert_same(weights, expected, bound=BOUND):
    worst = {name: deviation(weights[name], expected[name]) for name in expected}
    assert max(worst.values()) < bound, worst


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("groups", "clip", "accumulate"), [(False, 0.0, 1), (True, 0.3, 2), (True, 0.0, 4), (False, 0.3, 1)]
)
def test_trajectory_is_that_of_one_process(stage, world_size, groups, clip, accumulate):
    ds = config(stage, world_size, clip=clip, accumulate=accumulate)
    for weights in run_ranks(zero_ranks.trained, world_size, ds, groups):
        assert_same(weights, reference(0.02, clip=clip, groups=groups))


@pytest.mark.parametrize(
    "zero",
    [
        {"round_robin_gradients": True},
        {"reduce_scatter": False},
        {"overlap_comm": True},
        {"contiguous_gradients": False},
        {"reduce_bucket_size": 40, "allgather_bucket_size": 40},
        {"parameter_alignment": True},
        {"parameter_alignment": True, "round_robin_gradients": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("stage", [1, 2])
def test_trajectory_under_every_way_to_lay_out_and_reduce(stage, zero):
    for weights in run_ranks(zero_ranks.trained, 3, config(stage, 3, **zero), True):
        assert_same(weights, reference(0.02, groups=True))


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("world_size", [2, 3])
def test_plain_novograd_is_off_by_far_more(stage, world_size):
    """The control: without the layout the same comparison fails."""
    for name, weights in run_ranks(zero_ranks.trained_by, world_size, config(stage, world_size), "plain"):
        assert name == "PlainNovoGrad"
        expected = reference(0.02)
        assert max(deviation(weights[n], expected[n]) for n in expected) > 1000 * BOUND


@pytest.mark.parametrize("route", ["callable", "instance"])
def test_client_optimizers(route):
    for name, weights in run_ranks(zero_ranks.trained_by, 2, config(2, 2), route):
        assert name == "NovoGrad"
        assert_same(weights, reference(0.02))


@pytest.mark.parametrize("name", ["novograd", "NOVOGRAD"])
def test_name_in_any_capitalisation(name):
    ds = config(2, 2)
    ds["optimizer"]["type"] = name
    assert_same(run_ranks(zero_ranks.trained, 2, ds, False)[0], reference(0.02))


@pytest.mark.parametrize("stage", [1, 2])
def test_bfloat16_model_trains_as_with_a_float32_copy_in_one_process(stage):
    """The master weights are DeepSpeed's, in float32; the gradients are those of the bfloat16 model."""
    for mine, master in run_ranks(
        zero_ranks.bf16_trained, 3, {**config(stage, 3), "bf16": {"enabled": True}}
    ):
        assert mine.keys() == master.keys()
        for name in mine:
            assert deviation(mine[name], master[name]) < 2e-6


@pytest.mark.parametrize("stage", [1, 2])
def test_frozen_unused_and_tied_parameters(stage):
    model = zero_ranks.Conditional().double()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    oracle = Oracle([p.detach().numpy() for p in named.values()], lr=0.02)
    for step in range(STEPS):
        x, y = data(step)
        model.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        oracle.step([np.zeros(p.shape) if p.grad is None else p.grad.numpy() for p in named.values()])
        with torch.no_grad():
            for p, w in zip(named.values(), oracle.weights, strict=True):
                p.copy_(torch.from_numpy(w))
    expected = {n: p.detach().numpy() for n, p in named.items()}
    for weights in run_ranks(zero_ranks.trained_conditional, 3, config(stage, 3)):
        assert_same({n: weights[n] for n in expected}, expected)
        assert (weights["unused"] == 1).all()


@pytest.mark.parametrize("stage", [1, 2])
def test_ranks_that_hold_only_padding(stage):
    results = run_ranks(zero_ranks.trained_tiny, 4, config(stage, 4))
    assert [r[1] for r in results] == [["a"], ["a"], [], []]
    assert [r[2] for r in results] == [1, 1, 0, 0]
    assert all((r[0] == results[0][0]).all() for r in results)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("groups", [False, True])
def test_state_is_divided_by_the_ranks(world_size, groups):
    parameters = sum(p.numel() for p in zero_ranks.OddModel().parameters())
    for before, after, layers in run_ranks(zero_ranks.state_bytes, world_size, config(2, world_size), groups):
        assert before == after  # allocated when the wrapper is made
        assert 4 * layers <= after <= 4 * parameters / world_size + 4 * layers + 4 * 2 * world_size * 2


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    ("bf16", "zero"),
    [
        (None, {}),
        (None, {"compute_grad_norm": False}),
        ({"enabled": True}, {}),
        ({"enabled": True, "check_grad_overflow": False}, {}),
        ({"enabled": True, "check_grad_overflow": False}, {"compute_grad_norm": False}),
    ],
    ids=str,
)
def test_nan_on_one_rank_changes_nothing_on_any(stage, bf16, zero):
    if stage == 3 and zero:
        zero = {"sub_group_size": 50}  # compute_grad_norm is for stages 1 and 2: stage 3 always has the norm
    ds = config(stage, 3, **zero)
    if bf16:
        ds["bf16"] = bf16
    results = run_ranks(zero_ranks.nan_on_one_rank, 3, ds, bool(bf16))
    for result in results:
        for fact in ("weights unchanged", "state unchanged", "goes on", "finite"):
            assert result[fact], (fact, result)
    if stage < 3 and (
        zero or (bf16 and not bf16.get("check_grad_overflow", True))
    ):  # else DeepSpeed's own check comes first
        assert all(r["skipped"] == 1 for r in results)
        assert [name for r in results for name in r["layers"]] in (["last.bias"], ["last.bias"] * 2)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_checkpoint_resumes_to_the_same_bits(stage, tmp_path):
    assert all(run_ranks(zero_ranks.resumed, 2, config(stage, 2), str(tmp_path)))


@pytest.mark.parametrize(
    ("stage", "zero"),
    [(1, {}), (2, {}), (2, {"offload_optimizer": {"device": "cpu"}}), (3, {"sub_group_size": 50})],
)
def test_deepspeed_finds_the_state_of_every_parameter(stage, zero):
    for states in run_ranks(zero_ranks.full_state, 2, config(stage, 2, **zero)):
        for exp_avg, master, weight in states.values():
            assert exp_avg.any()
            assert np.array_equal(master, weight)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_same_gradients_give_the_same_bits_at_every_stage(stage, world_size):
    """Each rank trains on the same data: averaging 2 or 4 equal gradients rounds nothing."""
    unsharded = zero_ranks.unsharded_on_equal_data()
    for weights in run_ranks(zero_ranks.trained_on_equal_data, world_size, config(stage, world_size)):
        assert all((weights[name] == unsharded[name]).all() for name in unsharded)


def test_rank_that_dies_ends_the_run_with_an_error():
    before, start = os.listdir("/dev/shm"), time.monotonic()
    with pytest.raises(RankError, match=r"^rank 1 of 3 died: exit code 3"):
        run_new_ranks(zero_ranks.dies_in_the_second_step, 3, config(2, 3), timeout=60)
    assert time.monotonic() - start < 50
    mine = [file for file in os.listdir("/dev/shm") if file not in before]
    assert not any(file.startswith("deepspeed_allreduce") for file in mine)


def test_ranks_with_different_models_are_refused():
    with pytest.raises(RankError, match="the ranks have different layers"):
        run_new_ranks(zero_ranks.different_layers, 2)


def test_one_small_collective_for_each_group():
    for sizes in run_ranks(zero_ranks.collectives_of_a_step, 3, config(2, 3)):
        # Two groups; each has at most as many sharded layers as boundaries, and the verdict.
        assert len(sizes) == 2
        assert all(size <= 3 for size in sizes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "Twin-Flow.*its own Adam",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "."}}},
            "nvme.*Use the device cpu",
        ),
        (
            {
                "zero_optimization": {
                    "stage": 2,
                    "offload_optimizer": {"device": "cpu"},
                    "zenflow": {"topk_ratio": 0.1},
                }
            },
            "zenflow.*its own Adam",
        ),
        ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, "elastic_checkpoint"),
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            "bf16_master_weights_and_grads.*its own Adam",
        ),
    ],
    ids=str,
)
def test_unsupported_config_is_refused_before_anything_is_changed(change, says):
    for error in run_ranks(zero_ranks.error_of, 2, {**config(2, 2), **change}):
        assert error.startswith("UnsupportedConfigError")
        assert not error.endswith("(the model was changed)")
        assert re.search(says, error)


def test_tensor_parallel_parameters_are_refused():
    for error in run_ranks(zero_ranks.tensor_parallel_error, 2, config(2, 2)):
        assert error.startswith("UnsupportedConfigError")
        assert "tensor-parallel parameters" in error


def test_max_grad_norm_is_refused_with_the_key_to_set():
    for error in run_ranks(zero_ranks.max_grad_norm_error, 2, config(2, 2)):
        assert error.startswith("ValueError")
        assert "gradient_clipping" in error
        assert not error.endswith("(the model was changed)")


def test_bad_option_in_the_json_is_named():
    ds = config(2, 2)
    ds["optimizer"]["params"] = {"lr": 0.1, "beta": [0.9, 0.9]}
    assert "did you mean 'betas'" in run_ranks(zero_ranks.error_of, 2, ds)[0]
