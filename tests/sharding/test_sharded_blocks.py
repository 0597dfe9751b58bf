"""Codes, scales and weights of blocks that are sharded are those of one process, bit for bit."""

import math

import pytest
import sharded_block_ranks
from kept_ranks import run_ranks

OPTIONS = [
    {"momentum_dtype": "int8"},
    {"momentum_dtype": "int4", "fused": False},
    {"momentum_dtype": "int4", "granularity": "row", "normalize": "rms"},
    {"momentum_dtype": "int8", "preset": "adamw", "scale_parameter": True, "clip_threshold": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mesh_shape", [(3,), (2, 2)], ids=str)
def test_parameters_placed_in_any_way(options, mesh_shape):
    options = {"lr": 0.05, "weight_decay": 0.1, **options}
    if mesh_shape == (2, 2):
        options["fused"] = None  # the reference takes its time, and there are many placements
    world = math.prod(mesh_shape)
    assert run_ranks(sharded_block_ranks.in_any_placement, world, options, mesh_shape) == [{}] * world


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("world", "data_world"), [(3, 1), (4, 2)])
def test_tensor_parallelism_alone_and_with_fsdp2(options, world, data_world):
    options = {"lr": 0.05, "weight_decay": 0.1, **options}
    assert run_ranks(sharded_block_ranks.under_tensor_parallelism, world, options, data_world) == [[]] * world


@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ({"momentum_dtype": "int8"}, (3,), [(2,), (4,), (1, 3), (2, 2), None]),
        ({"momentum_dtype": "int4", "preset": "adamw"}, (1, 3), [(3,), (1, 2), (2, 2), None]),
        ({"momentum_dtype": "int4"}, (2, 2), [(1, 3), (2,)]),
        ({"momentum_dtype": "int8", "granularity": "row"}, None, [(3,), (1, 2)]),
    ],
    ids=str,
)
def test_a_distributed_checkpoint_goes_on_under_any_other_cut(options, before, after, tmp_path):
    options = {"lr": 0.05, "weight_decay": 0.1, **options}
    run_ranks(sharded_block_ranks.resumed, math.prod(before or [1]), options, str(tmp_path), before, True)
    for sharding in after:
        world = math.prod(sharding or [1])
        assert (
            run_ranks(sharded_block_ranks.resumed, world, options, str(tmp_path), sharding, False)
            == [set()] * world
        )


@pytest.mark.parametrize("sharding", [(3,), (1, 3), (2, 2)], ids=str)
def test_what_is_rounded_when_it_is_loaded_has_the_scales_of_one_process(sharding):
    options = {"lr": 0.05, "momentum_dtype": "int8"}
    (whole,) = run_ranks(sharded_block_ranks.rounded_when_loaded, 1, options, None)
    expected = {name: moments for name, _, _, moments in whole}
    for rank in run_ranks(sharded_block_ranks.rounded_when_loaded, math.prod(sharding), options, sharding):
        for name, position, _, moments in rank:
            assert (moments == expected[name][position : position + len(moments)]).all(), name
