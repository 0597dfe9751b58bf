"""The table of chunks: every element of every piece once, in the order of the layers."""

import hypothesis.strategies as st
import torch
from against_reference import Part, shard, steps
from hypothesis import given, settings

from novoscale.kernels.shards import chunks
from novoscale.momentum import BLOCK


def elements(start, stop, layer, position, size, place, index, in_blocks):
    """What a row of a table says of each element: where it and its moment lie, and of what layer it is."""
    for n in range(stop - start):
        at = place + ((position + n) // BLOCK - position // BLOCK if in_blocks else n)
        yield index, start + n, layer + (position % size + n) // size, position + n, size, at


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
    found = [e for row in rows for e in elements(*row, in_blocks[row[6]])]
    assert sorted(found) == sorted(of_pieces(shards))
    order = [(layer, position) for _, _, layer, position, _, _, _ in rows]
    assert order == sorted(order)
    for start, stop, _, position, _, _, index in rows:
        first = position if in_blocks[index] else start
        assert first // size == (first + stop - start - 1) // size


def test_offsets_pass_32_bits():
    start = 2**33 + 5
    tensor = torch.empty(0)
    parts = [Part(start, start + 200, 1, offset=2**34)]
    assert chunks([shard(tensor, tensor, None, parts, first=3)], 128, BLOCK).tolist() == [
        [start, 2**33 + 128, 4, 2**34, 2**40, start, 0],
        [2**33 + 128, start + 200, 4, 2**34 + 123, 2**40, 2**33 + 128, 0],
    ]
