"""The table of chunks: every element of every piece once, in the order of the layers."""

import hypothesis.strategies as st
import torch
from against_reference import Part, shard, steps
from hypothesis import given, settings

from novoscale.kernels.shards import COLUMN, chunks, panels
from novoscale.sharding.blocks import BLOCK


def elements(
    start, stop, layer, position, size, place, column, first_sharded, last_sharded, index, in_blocks
):
    """What a row of a table says of each element: where it and its moment lie, and of what layer it is."""
    for n in range(stop - start):
        at = place + ((position + n) // BLOCK - position // BLOCK if in_blocks else n)
        first = (position + n) // BLOCK == position // BLOCK
        last = (position + n) // BLOCK == (position + stop - start - 1) // BLOCK
        sharded = first_sharded if first else last_sharded if last else -1
        yield index, start + n, layer + (position % size + n) // size, position + n, size, at, sharded, column


def of_pieces(shards):
    for index, s in enumerate(shards):
        for row in s.pieces.tolist():
            yield from elements(*row, index, s.exp_avg_scale is not None)


@settings(max_examples=200, deadline=None)
@given(steps([1, 3, 50, 128, 200, 300], tensors=4), st.sampled_from([128, 256]))
def test_chunks_are_the_pieces_cut_at_multiples_of_the_size_and_sorted_by_layer(case, size):
    shards, _, _ = case
    rows = chunks(shards, size, BLOCK).tolist()
    in_blocks = [s.exp_avg_scale is not None for s in shards]
    found = [
        e for *row, sharded, index in rows for e in elements(*row, sharded, sharded, index, in_blocks[index])
    ]
    assert sorted(found) == sorted(of_pieces(shards))
    order = [(layer, position) for _, _, layer, position, *_ in rows]
    assert order == sorted(order)
    for start, stop, _, position, _, _, _, sharded, index in rows:
        assert sharded < 0 or position // BLOCK == (position + stop - start - 1) // BLOCK
        first = position if in_blocks[index] else start
        assert first // size == (first + stop - start - 1) // size


def test_offsets_pass_32_bits():
    start = 2**33 + 5
    tensor = torch.empty(0)
    parts = [Part(start, start + 200, 1, offset=2**34)]
    assert chunks([shard(tensor, tensor, None, parts, first=3)], 128, BLOCK).tolist() == [
        [start, 2**33 + 128, 4, 2**34, 2**40, start, -1, -1, 0],
        [2**33 + 128, start + 200, 4, 2**34 + 123, 2**40, 2**33 + 128, -1, -1, 0],
    ]


@settings(max_examples=200, deadline=None)
@given(steps([1, 3, 50, 128, 200, 300], tensors=4))
def test_panels_are_the_elements_of_factored_parameters_each_once(case):
    shards, _, _ = case
    factored = [e for e in of_pieces(shards) if e[-1] >= 0]
    expected = [
        (index, at, layer, column + position % size)
        for index, at, layer, position, size, _, _, column in factored
    ]
    found = [
        (index, start + n, layer + n // width, column + n % width)
        for start, rows, width, layer, column, index in panels(shards).tolist()
        for n in range(rows * width)
    ]
    assert sorted(found) == sorted(expected)
    table = chunks(shards, 128, BLOCK, factored=False)
    assert (table[:, COLUMN] == -1).all()
    assert (table[:, 1] - table[:, 0]).sum() + len(found) == sum(1 for _ in of_pieces(shards))


def test_a_matrix_cut_along_its_columns_is_one_panel_and_one_cut_within_rows_three():
    tensor = torch.empty(0)
    columns = [Part(100 * row, 100 * row + 100, 0, 300 * row + 50, 300, 0) for row in range(5)]
    assert panels([shard(tensor, tensor, None, columns)]).tolist() == [[0, 5, 100, 0, 50, 0]]
    flat = [Part(7, 7 + 1000, 0, 250, 300, 0)]
    assert panels([shard(tensor, tensor, None, flat)]).tolist() == [
        [7, 1, 50, 0, 250, 0],
        [57, 3, 300, 1, 0, 0],
        [957, 1, 50, 4, 0, 0],
    ]
