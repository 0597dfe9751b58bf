"""Under FSDP2, HSDP, tensor parallelism and DDP the training is that of one process."""

import math

import checkpoint_ranks
import fixed_gradients
import pytest
import sharded_models
import torch
import torch_ranks
from kept_ranks import run_ranks
from oracle import deviation
from training import OddModel, reference

from novoscale.tools.local_ranks import run_ranks as run_new_ranks

BOUND = 2e-5  # float32, relative, after 10 steps


def worst(weights, expected):
    return max(deviation(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("shape", [(2,), (3,), (4,), (2, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_fsdp2_and_hsdp(shape, clip):
    # 17, 5, 3 and 1 rows over 2 to 4 ranks: even, uneven and empty shards.
    world = 1
    for n in shape:
        world *= n
    for weights in run_ranks(torch_ranks.fsdp2, world, shape, {"max_grad_norm": clip}):
        assert worst(weights, reference(sharded_models.LR, clip=clip)) < BOUND


@pytest.mark.parametrize(("world", "data_world"), [(2, 1), (3, 1), (4, 1), (4, 2)])
def test_tensor_parallel_alone_and_with_fsdp2(world, data_world):
    for deviations, placed in run_ranks(torch_ranks.tensor_parallel, world, data_world):
        assert max(deviations.values()) < BOUND, deviations
        assert data_world > 1 or any("Partial" in p or "P(" in p for p in placed)  # the norm's gradients


def test_parameters_placed_in_any_way():
    assert max(run_ranks(torch_ranks.any_placement, 4)) < 2e-6


def test_a_partial_sum_in_the_memory_of_an_earlier_gradient():
    assert max(run_ranks(torch_ranks.partial_sum_where_the_gradient_was, 2)) < 2e-6


ROWS = {"granularity": "row", "normalize": "rms"}


@pytest.mark.parametrize("shape", [(2,), (3,), (4,), (2, 2)], ids=str)
def test_rows_under_fsdp2_and_hsdp(shape):
    expected = reference(sharded_models.LR, rows=True, normalize="rms", clip=0.3)
    for weights in run_ranks(torch_ranks.fsdp2, math.prod(shape), shape, {**ROWS, "max_grad_norm": 0.3}):
        assert worst(weights, expected) < BOUND


@pytest.mark.parametrize("options", [ROWS, {"granularity": 2}], ids=str)
@pytest.mark.parametrize(("world", "data_world"), [(3, 1), (4, 2)])
def test_rows_and_splits_under_tensor_parallelism(options, world, data_world):
    # Of one matrix the rows are on different ranks, of the other every row is sharded.
    for deviations, _ in run_ranks(torch_ranks.tensor_parallel, world, data_world, options):
        assert max(deviations.values()) < BOUND, deviations


ADAMW = {"preset": "adamw"}
EVERYTHING = {"clip_threshold": 0.5, "scale_parameter": True, "weight_decay": 0.1}


@pytest.mark.parametrize("shape", [(2,), (3,), (4,), (2, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_factored_under_fsdp2_and_hsdp(shape, options):
    clip = 0.3 if options else 0.0
    expected = reference(
        sharded_models.LR,
        clip=clip,
        weight_decay=options.get("weight_decay", 0.0),
        adamw={k: v for k, v in options.items() if k != "weight_decay"},
    )
    given = {**ADAMW, **options, "max_grad_norm": clip}
    for weights in run_ranks(torch_ranks.fsdp2, math.prod(shape), shape, given):
        assert worst(weights, expected) < BOUND


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize(("world", "data_world"), [(3, 1), (4, 2)])
def test_factored_under_tensor_parallelism(options, world, data_world):
    for deviations, _ in run_ranks(torch_ranks.tensor_parallel, world, data_world, {**ADAMW, **options}):
        assert max(deviations.values()) < BOUND, deviations


@pytest.mark.parametrize("options", [{}, {**EVERYTHING, "init_zero": False}], ids=["plain", "everything"])
def test_factored_parameters_of_any_dimensions_placed_in_any_way(options):
    for deviations in run_ranks(torch_ranks.any_placement_factored, 4, options):
        assert max(deviations.values()) < 1e-5, deviations


@pytest.mark.parametrize("options", [{**ADAMW, "momentum_dtype": "int8"}, ROWS], ids=str)
def test_a_state_dict_under_fsdp2_can_be_saved_and_copied(options, tmp_path):
    for found in run_ranks(checkpoint_ranks.carried, 2, options, str(tmp_path)):
        assert found == dict.fromkeys(["deepcopy", "pickle", "torch.save"], True)


@pytest.mark.parametrize("options", [ADAMW, {**ROWS, "bias_correction": True}], ids=str)
def test_second_moments_of_a_distributed_checkpoint_load_on_any_number_of_ranks(options, tmp_path):
    saved = run_ranks(checkpoint_ranks.second_moments, 2, options, str(tmp_path), True)[0]
    for world in (1, 3, 4):
        for loaded in run_ranks(checkpoint_ranks.second_moments, world, options, str(tmp_path), False):
            assert loaded.keys() == saved.keys()
            assert all((loaded[name] == saved[name]).all() for name in saved)


FORMATS = [
    {"momentum_dtype": "float32"},
    {"momentum_dtype": "bfloat16"},
    {"momentum_dtype": "int8", **ROWS},
    {"momentum_dtype": "int4"},
    {"momentum_dtype": "int4", **ROWS, "max_grad_norm": 1.0},
    {"momentum_dtype": "int8", "preset": "adamw", "max_grad_norm": 1.0},
    {"momentum_dtype": "float32", "preset": "adamw", **EVERYTHING},
]


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_same_bits_in_every_format(options, bfloat16):
    options = {"lr": 0.05, "weight_decay": 0.1, **options}
    expected = fixed_gradients.unsharded(options, torch.bfloat16 if bfloat16 else torch.float32)
    for shape in [(3,), (2, 2)] if bfloat16 else [(1,), (2,), (3,), (4,), (2, 2)]:
        ranks = run_ranks(checkpoint_ranks.fixed_pieces, math.prod(shape), options, shape, bfloat16)
        assert fixed_gradients.differing(ranks, expected) == set()


def assert_loaded(loaded, saved):
    """The first moments on any number of ranks are those on others."""
    together = [piece for rank in loaded for piece in rank]
    for name, position, _, values in (piece for rank in saved for piece in rank):
        mine = sorted(((p, m) for n, p, _, m in together if n == name), key=lambda pair: pair[0])
        whole = torch.cat([m for _, m in mine])
        assert torch.equal(whole[position : position + len(values)], values), name


@pytest.mark.parametrize("options", FORMATS[1:4], ids=str)
@pytest.mark.parametrize(
    "shapes", [checkpoint_ranks.WHOLE_BLOCKS, checkpoint_ranks.OTHERS], ids=["whole blocks", "others"]
)
def test_distributed_checkpoint_loads_on_any_number_of_ranks(options, shapes, tmp_path):
    arguments = (options, str(tmp_path))
    saved = run_ranks(checkpoint_ranks.fixed_checkpoint, 2, *arguments, "save", shapes)
    for world in (2, 3, 4):  # on four, the last one has none of three rows
        assert_loaded(run_ranks(checkpoint_ranks.fixed_checkpoint, world, *arguments, "load", shapes), saved)


@pytest.mark.parametrize("kind", ["ddp", "zero redundancy"])
def test_data_parallel(kind):
    for weights in run_ranks(torch_ranks.data_parallel, 3, kind):
        assert worst(weights, reference(sharded_models.LR)) < BOUND


def test_zero_redundancy_rounds_as_ddp_once_it_is_told_the_numbers():
    options = {"momentum_dtype": "bfloat16"}
    expected = run_ranks(torch_ranks.data_parallel_bits, 2, "ddp", options)
    assert expected[0] == expected[1]
    assert run_ranks(torch_ranks.data_parallel_bits, 2, "numbered", options) == expected
    assert run_ranks(torch_ranks.data_parallel_bits, 2, "not told", options) != expected


def test_same_gradients_give_the_same_bits_however_cut():
    unsharded = run_ranks(torch_ranks.fixed_gradients_bits, 1, "plain")[0]
    for world in (2, 3, 4):
        for weights in run_ranks(torch_ranks.fixed_gradients_bits, world, "fsdp2"):
            assert all((a == b).all() for a, b in zip(weights, unsharded, strict=True))


@pytest.mark.parametrize(
    ("kind", "world", "expected"),
    [("ddp", 2, 0), ("zero redundancy", 2, 0), ("fsdp2", 3, 1), ("hsdp", 4, 1), ("fsdp2+tp", 4, 2)],
)
def test_collectives_of_a_step(kind, world, expected):
    # New ranks: what an earlier case has left in a process is not to be counted.
    assert run_new_ranks(torch_ranks.collectives, world, kind) == [expected] * world


def test_nan_on_one_rank_changes_nothing_on_any():
    for result in run_ranks(torch_ranks.nan_on_one_rank, 3):
        assert result == {
            "weights unchanged": True,
            "state unchanged": True,
            "skipped": 1,
            "layers": ["last.weight"],
        }


def test_overflow_that_one_rank_has_seen_stops_all():
    assert run_ranks(torch_ranks.overflow_on_one_rank, 2) == [True, True]


def test_distributed_checkpoint_resumes_on_another_number_of_ranks(tmp_path):
    saved = run_ranks(checkpoint_ranks.reshard, 2, str(tmp_path), True)[0]
    for weights in run_ranks(checkpoint_ranks.reshard, 3, str(tmp_path), False):
        assert worst(weights, saved) < BOUND


def test_fsdp1_is_refused_with_advice():
    for error in run_ranks(torch_ranks.fsdp1, 2):
        assert "FSDP1 is not supported" in error


def test_accelerate_with_fsdp2(tmp_path):
    for result in run_new_ranks(torch_ranks.accelerate_fsdp2, 2, str(tmp_path)):
        assert worst(result["weights"], reference(sharded_models.LR)) < BOUND
        assert result["dtensors"]
        assert result["names"] == sorted(n for n, _ in OddModel().named_parameters())
