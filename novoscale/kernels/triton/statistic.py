"""The first pass over the elements, in Triton: the statistic of layers that are not factored, in two stages.

A program of the first stage has one chunk, of a run that is a row of a table: see ``tables``. Where a layer
is in several chunks, the second stage adds their partials.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from novoscale.kernels.triton import exact_sums
from novoscale.kernels.triton.formats import jit, load_elements, magnitudes

# The columns of the table of the statistic, int64: a row for each run of LAYERS consecutive layers of WIDTH
# elements each. A chunk has PARTS layers; or a layer is in PARTS chunks of LENGTH elements.
GRAD = tl.constexpr(0)  # bytes from the beginning of the gradient, which may move, to the first element
SHARD = tl.constexpr(1)  # of all gradients, the one of the elements
LAYERS = tl.constexpr(2)
WIDTH = tl.constexpr(3)
PARTS = tl.constexpr(4)
LENGTH = tl.constexpr(5)
RESULT = tl.constexpr(6)  # where the sums go, one after another
FIRST = tl.constexpr(7)  # of the launch's chunks, the first of the run
ROW = tl.constexpr(8)  # columns
# Where no layer has more than FEW partials, a program of the second stage adds those of SEVERAL layers.
FEW = tl.constexpr(16)
SEVERAL = tl.constexpr(32)


@jit
def _accumulate(total: tl.tensor, value: tl.tensor, squares: tl.constexpr) -> tl.tensor:
    if squares:
        # The product is exact: to fuse it with the sum saves an instruction and changes no rounding.
        wide = value.to(tl.float64)
        return tl.fma(wide, wide, total)
    return tl.maximum(total, magnitudes(value))


@jit
def _total(totals: tl.tensor, axis: tl.constexpr, squares: tl.constexpr) -> tl.tensor:
    """The statistic of what was accumulated, along an axis, as float64."""
    if squares:
        result = tl.sum(totals, axis)
    else:
        result = tl.max(totals, axis).to(tl.float32, bitcast=True).to(tl.float64)
    return result


@jit
def _load_tile(
    grad: tl.tensor,
    offset: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    grad_type: tl.constexpr,
    tile: tl.constexpr,
) -> tl.tensor:
    """A tile of elements from ``offset`` on; 0 outside begin..end."""
    index = offset + tl.arange(0, tile)
    if (offset >= begin) & (offset + tile <= end):
        value = load_elements(grad, index, None, grad_type, True)
    else:
        inside = (index >= begin) & (index < end)
        value = tl.where(inside, load_elements(grad, index, inside, grad_type, False), 0.0)
    return value


@jit
def _reduce_chunk(
    grad: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    grad_type: tl.constexpr,
    squares: tl.constexpr,
    tile: tl.constexpr,
) -> tl.tensor:
    totals = tl.zeros([tile], tl.float64 if squares else tl.int32)
    for offset in range(0, end, tile):
        totals = _accumulate(totals, _load_tile(grad, offset, begin, end, grad_type, tile), squares)
    return _total(totals, 0, squares)


@jit
def _reduce_chunk_in_words(
    grad: tl.tensor, begin: tl.tensor, end: tl.tensor, grad_type: tl.constexpr, tile: tl.constexpr
) -> Any:
    high = tl.zeros([tile], tl.float32)
    middle, low = high, high
    for offset in range(0, end, tile):
        value = _load_tile(grad, offset, begin, end, grad_type, tile)
        high, middle, low = exact_sums.add(high, middle, low, *exact_sums.square(value))
    result, wrong = exact_sums.total(high, middle, low, 0)
    return result, wrong


@jit
def chunk_statistic(
    table: tl.tensor,
    run_of: tl.tensor,
    gradients: tl.tensor,
    statistic: tl.tensor,
    grad_type: tl.constexpr,
    squares: tl.constexpr,
    in_words: tl.constexpr,
    width: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """The statistic of each chunk that lies in one layer: the sum of g**2, or the largest abs(g).

    ``gradients``: the address of each. ``in_words``: squares are added as exact_sums does, else in float64.
    ``width`` is for rows_statistic only.
    """
    program = tl.program_id(0)
    row = table + tl.load(run_of + program) * ROW
    nth = program - tl.load(row + FIRST)
    parts = tl.load(row + PARTS)
    length = tl.load(row + LENGTH)
    size = tl.load(row + WIDTH)
    layer = nth // parts
    done = (nth - layer * parts) * length
    first = layer * size + done
    grad = tl.load(gradients + tl.load(row + SHARD)) + tl.load(row + GRAD)
    grad += first * (grad_type.primitive_bitwidth // 8)
    # Count elements from the last aligned address before the first.
    begin = (grad % 16).to(tl.int32) // (grad_type.primitive_bitwidth // 8)
    end = begin + tl.minimum(length, size - done).to(tl.int32)
    grad -= grad % 16
    if in_words:
        result, wrong = _reduce_chunk_in_words(grad, begin, end, grad_type, tile)
        if wrong:
            result = _reduce_chunk(grad, begin, end, grad_type, squares, tile)
    else:
        result = _reduce_chunk(grad, begin, end, grad_type, squares, tile)
    tl.store(statistic + tl.load(row + RESULT) + nth, result)


@jit
def _load_rows(
    grad: tl.tensor,
    first: tl.tensor,
    offset: tl.tensor,
    size: tl.tensor,
    end: tl.tensor,
    grad_type: tl.constexpr,
    width: tl.constexpr,
    aligned: tl.constexpr,
) -> tl.tensor:
    """The elements of each row from ``offset`` on; 0 outside the row and outside 0..end."""
    column = offset + tl.arange(0, width)[None, :]
    index = first[:, None] + column
    inside = (column < size) & (index < end)
    if aligned:
        index = tl.max_contiguous(tl.multiple_of(index, (1, 8)), (1, 8))
        inside = tl.max_constancy(inside, (1, 8))
    return tl.where(inside, load_elements(grad, index, inside, grad_type, aligned), 0.0)


@jit
def _reduce_rows(
    grad: tl.tensor,
    first: tl.tensor,
    size: tl.tensor,
    end: tl.tensor,
    aligned: tl.tensor,
    grad_type: tl.constexpr,
    squares: tl.constexpr,
    width: tl.constexpr,
) -> tl.tensor:
    totals = tl.zeros([first.shape[0], width], tl.float64 if squares else tl.int32)
    for offset in range(0, size, width):
        if aligned:
            value = _load_rows(grad, first, offset, size, end, grad_type, width, True)
        else:
            value = _load_rows(grad, first, offset, size, end, grad_type, width, False)
        totals = _accumulate(totals, value, squares)
    return _total(totals, 1, squares)


@jit
def _reduce_rows_in_words(
    grad: tl.tensor,
    first: tl.tensor,
    size: tl.tensor,
    end: tl.tensor,
    aligned: tl.tensor,
    grad_type: tl.constexpr,
    width: tl.constexpr,
) -> Any:
    high = tl.zeros([first.shape[0], width], tl.float32)
    middle, low = high, high
    for offset in range(0, size, width):
        if aligned:
            value = _load_rows(grad, first, offset, size, end, grad_type, width, True)
        else:
            value = _load_rows(grad, first, offset, size, end, grad_type, width, False)
        high, middle, low = exact_sums.add(high, middle, low, *exact_sums.square(value))
    result, wrong = exact_sums.total(high, middle, low, 1)
    return result, wrong


@jit
def rows_statistic(
    table: tl.tensor,
    run_of: tl.tensor,
    gradients: tl.tensor,
    statistic: tl.tensor,
    grad_type: tl.constexpr,
    squares: tl.constexpr,
    in_words: tl.constexpr,
    width: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """The statistic of each layer, where a chunk has several complete layers.

    A layer is a row of a tile, which has ``width`` elements of it at a time. ``in_words``: see
    chunk_statistic.
    """
    rows: tl.constexpr = tile // width
    program = tl.program_id(0)
    row = table + tl.load(run_of + program) * ROW
    many = tl.load(row + PARTS)
    before = (program - tl.load(row + FIRST)) * many
    size = tl.load(row + WIDTH)
    grad = tl.load(gradients + tl.load(row + SHARD)) + tl.load(row + GRAD)
    grad += before * size * (grad_type.primitive_bitwidth // 8)
    layers = tl.minimum(many, tl.load(row + LAYERS) - before).to(tl.int32)
    size = size.to(tl.int32)
    result = statistic + tl.load(row + RESULT) + before
    aligned = ((grad % 16).to(tl.int32) | (size % 8)) == 0
    for number in range(0, layers, rows):
        nth = number + tl.arange(0, rows)
        first = nth * size
        end = layers * size
        if in_words:
            found, wrong = _reduce_rows_in_words(grad, first, size, end, aligned, grad_type, width)
            if tl.max(wrong.to(tl.int32)) > 0:
                found = _reduce_rows(grad, first, size, end, aligned, grad_type, squares, width)
        else:
            found = _reduce_rows(grad, first, size, end, aligned, grad_type, squares, width)
        tl.store(result + nth, found, mask=nth < layers)


@jit
def layer_statistic(table: tl.tensor, statistic: tl.tensor, width: tl.constexpr, tile: tl.constexpr) -> None:
    """Put the partials of each layer together, ``width`` at a time.

    A row of its table: the place of the result, the first and the last (exclusive) partial, the norm type. A
    row without partials does nothing.
    """
    many: tl.constexpr = tile // width
    row = table + (tl.program_id(0) * many + tl.arange(0, many)) * 4
    first = tl.load(row + 1)
    last = tl.load(row + 2)
    total = tl.zeros([many, width], tl.float64)
    largest = tl.zeros([many, width], tl.int64)
    for offset in range(0, tl.max(last - first, 0), width):
        index = first[:, None] + (offset + tl.arange(0, width))[None, :]
        value = tl.load(statistic + index, mask=index < last[:, None], other=0.0)
        total += value
        largest = tl.maximum(largest, value.to(tl.int64, bitcast=True))
    sums, maxima = tl.sum(total, 1), tl.max(largest, 1).to(tl.float64, bitcast=True)
    result = tl.where(tl.load(row + 3) == 2, sums, maxima)
    tl.store(statistic + tl.load(row), result, mask=first < last)
