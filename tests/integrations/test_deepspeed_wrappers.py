"""NovoGrad under DeepSpeed's other wrappers: stages 0 and 3, offload, bfloat16, experts, tensor parallel."""

import pytest
import torch
import wrapper_ranks
import zero_ranks
from kept_ranks import run_ranks
from oracle import deviation
from training import reference
from zero_ranks import config

from novoscale.tools.local_ranks import run_ranks as run_new_ranks

BOUND = 2e-5  # float32, relative, after 10 steps
BF16 = {"bf16": {"enabled": True}}
CPU = {"device": "cpu"}
ADAMW = {"preset": "adamw", "clip_threshold": 0.5, "scale_parameter": True}


def with_options(ds, **options):
    ds["optimizer"]["params"] |= options
    return ds


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize(
    ("stage", "zero"),
    [
        (0, {}),
        (1, {"offload_optimizer": CPU}),
        (2, {"offload_optimizer": CPU}),
        (2, {"offload_optimizer": CPU, "round_robin_gradients": True}),
        (3, {}),
        (3, {"sub_group_size": 50}),
        (3, {"sub_group_size": 50, "stage3_param_persistence_threshold": 0}),
        (3, {"offload_optimizer": CPU, "sub_group_size": 50}),
        (3, {"offload_optimizer": CPU, "offload_param": CPU}),
    ],
    ids=str,
)
def test_trajectory_is_that_of_one_process(stage, zero, world_size):
    ds = config(stage, world_size, clip=0.3, accumulate=2, **zero)
    expected = reference(0.02, clip=0.3, groups=True)
    for weights in run_ranks(zero_ranks.trained, world_size, ds, True):
        worst = {name: deviation(weights[name], expected[name]) for name in expected}
        assert max(worst.values()) < BOUND, worst


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("stage", "zero"),
    [
        (0, {}),
        (1, {}),
        (2, {"offload_optimizer": CPU, "round_robin_gradients": True}),
        (3, {"sub_group_size": 50, "stage3_param_persistence_threshold": 0}),
        (3, {"offload_optimizer": CPU, "offload_param": CPU}),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, ADAMW], ids=["factored", "with clip_threshold and scale_parameter"])
def test_factored_trajectory_is_that_of_one_process(stage, zero, world_size, options):
    ds = with_options(
        config(stage, world_size, clip=0.3, accumulate=2, **zero), **{"preset": "adamw", **options}
    )
    expected = reference(
        0.02, clip=0.3, groups=True, adamw={k: v for k, v in options.items() if k != "preset"}
    )
    for weights in run_ranks(zero_ranks.trained, world_size, ds, True):
        worst = {name: deviation(weights[name], expected[name]) for name in expected}
        assert max(worst.values()) < BOUND, worst


def test_model_made_under_zero_init():
    ds = config(3, 3, sub_group_size=50)
    for _, worst in run_new_ranks(wrapper_ranks.against_oracle, 3, ds, torch.float32, True):
        assert max(worst.values()) < BOUND, worst


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("wrapper", "change", "stage"),
    [
        ("FP16_UnfusedOptimizer", BF16, 0),
        ("BF16_Optimizer", {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}, 1),
        ("DeepSpeedZeroOptimizer", BF16, 1),
        ("DeepSpeedZeroOptimizer", {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}, 2),
        ("DeepSpeedZeroOptimizer_Stage3", BF16, 3),
    ],
)
def test_bfloat16_model_with_float32_master(wrapper, change, stage, world_size):
    ds = {**config(stage, world_size), **change}
    for name, worst in run_ranks(wrapper_ranks.against_oracle, world_size, ds, torch.bfloat16):
        assert name == wrapper
        assert max(worst.values()) < BOUND, worst
    if world_size == 3:
        ds = with_options({**config(stage, world_size), **change}, **ADAMW)
        for _, worst in run_ranks(wrapper_ranks.against_oracle, world_size, ds, torch.bfloat16):
            assert max(worst.values()) < BOUND, worst


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_float16_model_with_float32_master_and_loss_scale(stage):
    ds = {**config(stage, 2), **wrapper_ranks.FP16}
    for _, worst in run_new_ranks(wrapper_ranks.against_oracle, 2, ds, torch.float16):
        assert max(worst.values()) < BOUND, worst


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_master_weights(stage):
    ds = {**config(stage, 2), **wrapper_ranks.BF16_MASTER}
    for _, worst in run_ranks(wrapper_ranks.against_oracle, 2, ds, torch.bfloat16):
        assert max(worst.values()) < wrapper_ranks.BF16_MASTER_BOUND, worst


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_torch_autocast(stage):
    ds = {**config(stage, 2), "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    for _, worst in run_new_ranks(wrapper_ranks.against_oracle, 2, ds):
        assert max(worst.values()) < BOUND, worst


def test_dummy_step_at_construction_changes_nothing():
    ds = {**config(0, 2), **BF16}
    ds["optimizer"]["params"]["weight_decay"] = 0.1
    assert run_ranks(wrapper_ranks.unchanged_by_construction, 2, ds) == [(True, True)] * 2


@pytest.mark.parametrize(("stage", "world_size"), [(1, 4), (2, 2), (2, 3), (2, 4)])
def test_expert_parallel_groups(stage, world_size):
    for worst in run_new_ranks(wrapper_ranks.experts_against_oracle, world_size, config(stage, world_size)):
        assert any("experts" in name for name in worst)
        assert max(worst.values()) < BOUND, worst


def test_factored_experts():
    for worst in run_new_ranks(wrapper_ranks.experts_against_oracle, 4, with_options(config(2, 4), **ADAMW)):
        assert max(worst.values()) < BOUND, worst


@pytest.mark.parametrize(
    "options", [{"momentum_dtype": "int8"}, {**ADAMW, "momentum_dtype": "int4"}], ids=str
)
@pytest.mark.parametrize(("stage", "world_size"), [(1, 4), (2, 3)])
def test_experts_in_blocks_have_the_bits_of_one_process(stage, world_size, options):
    ds = with_options(config(stage, world_size), **options)
    assert run_new_ranks(wrapper_ranks.experts_with_other_bits, world_size, ds) == [[]] * world_size


@pytest.mark.parametrize(("stage", "world_size"), [(1, 4), (2, 3)])
def test_factored_matrices_cut_along_rows_and_columns_by_tensor_parallelism(stage, world_size):
    ds = with_options(wrapper_ranks.tensor_parallel_config(stage, world_size), **ADAMW)
    for worst in run_new_ranks(wrapper_ranks.tensor_parallel_against_oracle, world_size, ds):
        assert {"rows", "columns", "bias"} == worst.keys()
        assert max(worst.values()) < BOUND, worst


@pytest.mark.parametrize(("stage", "world_size"), [(1, 4), (2, 2), (2, 3), (2, 4)])
def test_layer_over_the_tensor_parallel_group(stage, world_size):
    ds = wrapper_ranks.tensor_parallel_config(stage, world_size)
    for worst in run_new_ranks(wrapper_ranks.tensor_parallel_against_oracle, world_size, ds):
        assert max(worst.values()) < BOUND, worst
