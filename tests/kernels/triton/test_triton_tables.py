"""Tables of the Triton kernels: every element once, alike ones together, and few rows."""

import hypothesis.strategies as st
import pytest
import torch
from against_reference import Part, shard, steps
from hypothesis import given, settings

pytest.importorskip("triton", reason="Triton is not installed")

from novoscale.kernels.triton import elements as kernels
from novoscale.kernels.triton import update as triton_update
from novoscale.kernels.triton.formats import FORMATS
from novoscale.kernels.triton.tables import Kind, statistic_tables, update_runs

CHUNK, TILE = 512, 256


def runs_of(shards, chunk=CHUNK, tile=TILE):
    return update_runs(shards, torch.zeros(len(shards), dtype=torch.int64), chunk, tile)


@settings(max_examples=100, deadline=None)
@given(steps([1, 3, 50, 128, 256, 300, 600, 1100], tensors=4), st.integers(0, 1))
def test_each_chunk_is_what_its_launch_says(case, misaligned):
    shards, _, _ = case
    runs = runs_of(shards)
    addresses = torch.tensor([4 * misaligned + s.grad.data_ptr() // 16 * 16 for s in shards])
    table = runs.arranged(addresses)
    found = []
    for facts, begin, count in table.launches:
        kind = Kind(*facts)
        assert begin % 4 == 0
        assert not (misaligned and (kind.aligned or kind.whole))
        for nth, run in enumerate(table.run_of[begin : begin + count].tolist()):
            row = table.rows[run].tolist()
            base = (nth - row[triton_update.FIRST.value]) * CHUNK
            start = max(row[triton_update.BEGIN.value] - base, 0)
            stop = min(row[triton_update.END.value] - base, CHUNK)
            assert 0 <= start < stop
            assert not kind.whole or (start, stop) == (0, CHUNK)
            done = base + start - row[triton_update.BEGIN.value]
            position, size = row[triton_update.POSITION.value] + done, row[triton_update.SIZE.value]
            within = (row[triton_update.WITHIN.value] + done) % size
            assert within == position % size
            assert kind.group != 0 or within + stop - start <= size
            assert kind.group <= 1 or (within - start) % kind.group == size % kind.group == 0
            layer = row[triton_update.LAYER.value] + (row[triton_update.WITHIN.value] + done) // size
            found.append((row[triton_update.SHARD.value], position, stop - start, layer))
    expected = [
        (index, position, stop - start, layer)
        for index, s in enumerate(shards)
        for start, stop, layer, position, *_ in s.pieces.tolist()
    ]
    # Chunks that follow each other put together are the pieces, each element with its layer.
    elements = lambda rows: sorted((i, p + n) for i, p, count, _ in rows for n in range(count))  # noqa: E731
    assert elements(found) == elements(expected)


def test_large_layers_are_done_in_turn_and_where_tiles_end_at_them_without_masks():
    tensor = torch.zeros(16 * CHUNK)
    kinds = lambda size, form=None: {  # noqa: E731
        (k.group, k.whole)
        for k in map(
            Kind._make,
            runs_of([shard(tensor, tensor, form, [Part(0, 16 * CHUNK, 0, 0, size)])]).kinds.tolist(),
        )
    }
    assert kinds(TILE) == {(triton_update.IN_TURN.value, 1)}
    assert kinds(2 * CHUNK) == {(0, 1)}, "no layer ends within a chunk"
    assert kinds(5 * TILE) == {(0, 1), (triton_update.IN_TURN.value, 1)}
    assert kinds(4 * TILE + 1) == {(0, 1), (triton_update.IN_TURN.value, 0)}
    assert kinds(40) == {(8, 1)}
    assert kinds(41) == {(1, 1)}


@pytest.mark.parametrize("rows", [False, True])
def test_tables_of_billions_of_elements_are_small(rows):
    shards, first, elements = [], 0, 0
    block = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)] + [(4096, 1)] * 2
    for height, width in [(128256, 4096)] * 2 + block * 32:
        numel, size = height * width, width if rows and width > 1 else height * width
        nothing = torch.empty(numel, dtype=torch.bfloat16, device="meta")
        shards.append(shard(nothing, nothing, None, [Part(0, numel, 0, 0, size)], first=first))
        first, elements = first + numel // size, elements + numel
    runs = runs_of(shards, kernels.CHUNK, kernels.TILE)
    assert runs.chunks.sum() * kernels.CHUNK >= elements > 8e9
    tables = statistic_tables(shards, list(FORMATS), kernels.CHUNK, kernels.TILE)
    for table in (runs.arranged(torch.zeros(len(shards), dtype=torch.int64)), tables.chunks):
        assert len(table.rows) <= 3 * len(shards)
        assert table.run_of.nbytes + table.rows.nbytes < 4e6
    # Layers of one chunk are complete at once.
    assert len(tables.ends) == 0 if rows else len(tables.ends) < 2 * len(shards)
