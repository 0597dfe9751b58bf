"""Sharded blocks: every rank that has a piece of one knows the largest of all pieces after a step."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from novoscale.sharding import blocks
from novoscale.sharding.blocks import BLOCK


def int64(values):
    return torch.tensor(values, dtype=torch.int64)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 700), max_size=6), st.integers(1, 700))
def test_blocks_with_elements_on_both_sides_of_a_boundary_are_cut(bounds, numel):
    bounds = sorted({0, numel, *(b for b in bounds if b < numel)})
    starts, stops = bounds[:-1], bounds[1:]
    number, run = blocks.sharded_at_ends(
        int64(starts), int64(stops) - int64(starts), torch.full((len(starts),), numel)
    )
    expected = [
        (block, index)
        for index, (start, stop) in enumerate(zip(starts, stops, strict=True))
        for block in range(start // BLOCK, (stop - 1) // BLOCK + 1)
        if block * BLOCK < start or min((block + 1) * BLOCK, numel) > stop
    ]
    assert sorted(zip(number.tolist(), run.tolist(), strict=True)) == sorted(expected)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3).flatmap(
        lambda mesh: st.tuples(
            st.just(mesh),
            st.lists(
                st.tuples(st.integers(0, 5), st.tuples(*(st.integers(0, n - 1) for n in mesh))), max_size=12
            ),
        )
    )
)
def test_on_any_mesh_all_pieces_of_a_block_come_to_the_largest_of_all(case):
    """The stages are run here for all ranks at once, one dimension after another."""
    mesh, pieces = case
    ranks = [
        tuple(index.tolist()) for index in torch.cartesian_prod(*map(torch.arange, mesh)).view(-1, len(mesh))
    ]
    number, places = int64([n for n, _ in pieces]), int64([at for _, at in pieces]).view(-1, len(mesh))
    known = {}
    for rank in ranks:
        groups = [(dim, *rank[:dim], *rank[dim + 1 :]) for dim in range(len(mesh))]
        known[rank] = blocks.of_mesh(number, places, rank, groups)
        mine = {n for n, at in pieces if at == rank}
        sharded = known[rank]
        assert mine == set(sharded.number[sharded.parameter == 0].tolist())
    values = {rank: torch.zeros(len(sharded)) for rank, sharded in known.items()}
    largest = torch.zeros(6)
    for index, (n, at) in enumerate(pieces):
        place = known[at].number.tolist().index(n)
        values[at][place] = max(values[at][place], index + 1)
        largest[n] = index + 1
    for dim in range(len(mesh)):
        stages = {rank: sharded.stages[dim] for rank, sharded in known.items()}
        for group in {stage[0] for stage in stages.values()}:
            members = [rank for rank in ranks if stages[rank][0] == group]
            # Each of them gives the same blocks, in the same order.
            assert len({tuple(known[r].number[stages[r][1]].tolist()) for r in members}) == 1
            buffer = torch.stack([values[r][stages[r][1]] for r in members]).amax(0)
            for rank in members:
                values[rank][stages[rank][1]] = buffer
    for rank, sharded in known.items():
        for value, n, held in zip(values[rank], sharded.number, sharded.parameter == 0, strict=True):
            assert value == largest[n] or not held


def test_blocks_in_one_piece_and_of_small_parameters_are_not_cut():
    whole, between = [(0, 0, 5000)], [(0, 0, 1280), (0, 1280, 3720)]
    for pieces in (whole, between, []):
        assert len(blocks.of_partition([5000], pieces, [0], None)) == 0
    assert len(blocks.of_partition([4095], [(0, 0, 1000), (0, 1000, 3095)], [0], None)) == 0
    sharded = blocks.of_partition([4096], [(0, 0, 1000), (0, 1000, 3096)], [-1], None)
    assert (sharded.parameter.tolist(), sharded.number.tolist()) == ([-1], [7])


def test_lookup_finds_blocks_by_parameter_and_number():
    sharded = blocks.ShardedBlocks(int64([1, 0, -1]), int64([5, 7, 3]))
    found = sharded.lookup()(int64([0, 0, 1, 1]), int64([7, 5, 5, 3]))
    assert found.tolist() == [1, -1, 0, -1]
    assert blocks.NONE.lookup()(int64([0]), int64([0])).tolist() == [-1]
