"""Ranks with different sets of gradients: right values, or one error on every rank, and no rank hangs."""

import math

import missing_ranks
import pytest
from kept_ranks import run_ranks

SOME = [[True, False], [True, True], [False, True], [False, False], [True, False]]


@pytest.mark.parametrize(
    "options",
    [{"preset": "paper"}, {"preset": "adamw"}, {"preset": "paper", "granularity": "row"}],
    ids=["tensor", "factored", "row"],
)
def test_a_plain_expert_may_lack_a_gradient_on_any_rank_in_any_step(options):
    assert run_ranks(missing_ranks.plain_expert, 2, options, SOME) == [[], []]


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"preset": "paper"},
        {"preset": "adamw", "clip_threshold": 0.5, "max_grad_norm": 1.0},
        {"preset": "paper", "norm_type": 0},
    ],
    ids=["paper", "adamw", "largest"],
)
@pytest.mark.parametrize(
    ("shape", "placements", "missing"), [((2,), "s", [1]), ((2, 2), "ss", [3]), ((2, 2), "ss", [0, 1])]
)
def test_a_dtensor_without_a_gradient_on_some_ranks_is_one_error_on_every_rank(
    options, shape, placements, missing, steps_before
):
    world = math.prod(shape)
    for found in run_ranks(
        missing_ranks.missing_gradient, world, options, shape, placements, missing, steps_before
    ):
        assert found["said"].startswith("b: some ranks of its mesh have a gradient")
        assert "torch.zeros_like(p)" in found["said"]
        assert found["unchanged"]
        assert found["skipped"] == 1
        assert "b" in found["layers"]
        assert found["goes on"]


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("options", [{"preset": "paper"}, {"preset": "adamw"}], ids=["paper", "adamw"])
def test_a_dtensor_without_a_gradient_on_all_ranks_is_left_as_it_is(options, steps_before):
    for found in run_ranks(missing_ranks.missing_gradient, 2, options, (2,), "s", [0, 1], steps_before):
        assert (found["said"], found["skipped"], found["goes on"]) == ("", 0, True)


def test_models_whose_meshes_differ_with_any_gradients():
    for found in run_ranks(missing_ranks.any_gradients, 4, 200, timeout=400):
        assert found == []


@pytest.mark.parametrize("kind", ["replicas", "experts", "on rank 0"])
@pytest.mark.parametrize("shape", [(2,), (3,), (2, 2)], ids=str)
def test_one_factor_clips_every_rank_whatever_plain_tensors_it_has(kind, shape):
    found = run_ranks(missing_ranks.clipped_with_plain, math.prod(shape), kind, shape)
    assert len({moved for moved, _ in found}) == 1
    for moved, expected in found:
        assert moved == pytest.approx(expected, rel=1e-6)
