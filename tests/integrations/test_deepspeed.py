"""Under ZeRO the training is that of one process."""

import pytest
import zero_ranks
from oracle import deviation
from ranks import run_ranks
from training import reference

BOUND = 2e-5  # float32, relative, after 10 steps


def assert_same(weights, expected, bound=BOUND):
    worst = {name: deviation(weights[name], expected[name]) for name in expected}
    assert max(worst.values()) < bound, worst


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("groups", "clip", "accumulate"), [(False, 0.0, 1), (True, 0.3, 2), (True, 0.0, 4), (False, 0.3, 1)])
def test_trajectory_is_that_of_one_process(stage, world_size, groups, clip, accumulate):
    ds = zero_ranks.config(stage, world_size, clip=clip, accumulate=accumulate)
    for weights in run_ranks(zero_ranks.trained, world_size, ds, groups):
        assert_same(weights, reference(0.02, clip=clip, groups=groups))
