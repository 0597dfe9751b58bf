"""The table of chunks: every element of every segment once, in the order of the layers."""

from itertools import pairwise

import hypothesis.strategies as st
import torch
from against_reference import cut
from hypothesis import given, settings

from novoscale.kernels import Shard
from novoscale.kernels.shards import chunks
from novoscale.layout import Segment


def shard_of(segments, first):
    tensor = torch.empty(0)
    return Shard(tensor, tensor, None, tuple(segments), first, 2, 0.0, 1.0, 0.0, True)


@st.composite
def layouts(draw):
    """Shards with random cuts, gaps and layers of several segments."""
    shards, first = [], 0
    for _ in range(draw(st.integers(0, 4))):
        segments, layers = cut(draw, sorted(draw(st.lists(st.integers(0, 200), max_size=8))))
        shards.append(shard_of(segments, first))
        first += layers
    return shards


@settings(max_examples=200, deadline=None)
@given(layouts(), st.integers(1, 50))
def test_chunks_are_cut_at_multiples_of_the_size_and_sorted_by_layer(shards, size):
    expected = []
    for index, shard in enumerate(shards):
        for segment in sorted(shard.segments, key=lambda s: (s.layer, s.offset)):
            cuts = range(segment.start // size * size + size, segment.stop, size)
            bounds = [segment.start, *cuts, segment.stop]
            layer = shard.first + segment.layer
            expected += [[index, a, b, layer] for a, b in pairwise(bounds) if a < b]
    assert chunks(shards, size).tolist() == expected


def test_offsets_pass_32_bits():
    start = 2**33 + 5
    assert chunks([shard_of([Segment(start, start + 20, 1)], 3)], 16).tolist() == [
        [0, start, 2**33 + 16, 4],
        [0, 2**33 + 16, start + 20, 4],
    ]
