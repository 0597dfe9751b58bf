"""The full states of parameters are sharded for any ranks and put together again, to the bit."""

import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from novoscale import NovoGrad
from novoscale.checkpoint import FlatState, kinds, reshard
from novoscale.sharding.layers import LayoutError, describe
from novoscale.sharding.partition import one_after_another, partition

SHAPES = ((40, 130), (7,), (), (3, 128), (64, 128), (5, 2, 700), (4500,))
OPTIONS = [
    {},
    {"momentum_dtype": "bfloat16", "granularity": "row"},
    {"momentum_dtype": "int8", "bias_correction": True},
    {"momentum_dtype": "int4", "preset": "adamw"},
    {"momentum_dtype": "int8", "preset": "adamw"},
    {"betas": (0.0, 0.9)},
]


def trained(shapes, options):
    """The whole states of one process, by name, and its param group."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    optimizer = NovoGrad(
        [(f"p{i}", p) for i, p in enumerate(params)], lr=0.1, **{"preset": "paper", **options}
    )
    for _ in range(2):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    states = kinds.unmarked(optimizer.state_dict())["state"]
    return {f"p{i}": states[i] for i in range(len(shapes))}, optimizer.param_groups[0]


def sharding(shapes, group, world):
    """The layouts of equal partitions of all parameters one after another."""
    granularity = group["granularity"]
    parameters = [describe(f"p{i}", shape, granularity, i) for i, shape in enumerate(shapes)]
    numel = sum(p.numel for p in parameters)
    size = -(-numel // world) + 1
    pieces = one_after_another([p.numel for p in parameters], size, world)
    return [partition(parameters, pieces, rank=rank, numel=size) for rank in range(world)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5),
    st.sampled_from(OPTIONS),
    st.integers(1, 7),
    st.integers(1, 7),
)
def test_any_number_of_ranks_and_back_keeps_every_bit(shapes, options, first, second):
    states, group = trained(shapes, options)
    full_states = states
    for world in (first, second):
        parts = []
        for layout in sharding(shapes, group, world):
            flat = torch.zeros(layout.numel)
            again = reshard.layout_of(reshard.record(layout))
            parts.append((again, reshard.scatter(full_states, flat, layout, group)))
        full_states = {name: full.finished() for name, full in reshard.gather(parts).items()}
    torch.testing.assert_close(full_states, states, rtol=0, atol=0)


def test_what_is_missing_is_named():
    states, group = trained(SHAPES[:2], {})
    layouts = sharding(SHAPES[:2], group, 3)
    parts = [
        (layout, reshard.scatter(states, torch.zeros(layout.numel), layout, group)) for layout in layouts
    ]
    with pytest.raises(LayoutError, match=r"p0: \d+ of its 5200 elements .* some ranks are missing"):
        reshard.gather(parts[1:])["p0"].finished()
    with pytest.raises(ValueError, match="p1: the checkpoint has no state of it"):
        reshard.scatter({"p0": states["p0"]}, torch.zeros(layouts[2].numel), layouts[2], group)
    with pytest.raises(ValueError, match=r"exp_avg of p1|exp_avg_sq of p1"):
        reshard.scatter(states | {"p1": states["p0"]}, torch.zeros(layouts[2].numel), layouts[2], group)


def test_a_newer_record_and_tensor_parallel_parameters_are_refused():
    layout = sharding(SHAPES[:1], {"granularity": "tensor"}, 1)[0]
    record = reshard.record(layout)
    with pytest.raises(LayoutError, match="newer novoscale"):
        reshard.layout_of({**record, "version": 2})
    record["parameters"][0]["row_shares"] = 2
    with pytest.raises(LayoutError, match="p0 is sharded by tensor parallelism"):
        reshard.layout_of(record)


def test_flat_states_are_saved_under_the_name_that_earlier_checkpoints_have():
    saved = pickle.dumps(FlatState({FlatState.STATE: {}}), protocol=2)
    assert b"cnovoscale.checkpoint\nFlatState\n" in saved
    assert isinstance(pickle.loads(saved), FlatState)
