"""The Triton kernels: the statistic in two stages, and the update.

A program has one chunk, of a run that is a row of a table: see triton_tables.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from novoscale.kernels import shards, triton_sums
from novoscale.kernels.triton_formats import (
    BLOCK,
    jit,
    load_blocks,
    load_elements,
    magnitudes,
    random_bits,
    scramble,
    store_blocks,
    store_elements,
)

# The columns of the table of the update, int64: a row for each run of chunks. They follow each other from
# index 0 on; the elements of the piece are BEGIN..END of theirs.
PARAM = tl.constexpr(0)  # addresses of index 0 (or its block), 0 where there is no such tensor
GRAD = tl.constexpr(1)  # of the gradient, which may move, the bytes from its beginning
EXP_AVG = tl.constexpr(2)
SCALE = tl.constexpr(3)
BEGIN = tl.constexpr(4)
END = tl.constexpr(5)
LAYER = tl.constexpr(6)  # of all layers, the one of the element at BEGIN
POSITION = tl.constexpr(7)  # of that element in its parameter
WITHIN = tl.constexpr(8)  # and in its layer
SIZE = tl.constexpr(9)  # elements of a layer
COLUMN = tl.constexpr(10)  # of all columns, the first of its factored parameter, whose rows are layers
CUT = tl.constexpr(11)  # of all cut blocks, the one that it is a piece of
GROUP = tl.constexpr(12)  # of all param groups, its own
SHARD = tl.constexpr(13)  # of all gradients, its own
FIRST = tl.constexpr(14)  # of the launch's chunks, the first of the run
ROW = tl.constexpr(16)  # the last column unused; 128 bytes

# The columns of the table of the statistic, int64: a row for each run of LAYERS layers that follow each
# other, of WIDTH elements each: in chunks of PARTS of them, or each in PARTS chunks of LENGTH elements.
SUM_GRAD = tl.constexpr(0)  # as GRAD, SHARD and FIRST
SUM_SHARD = tl.constexpr(1)
LAYERS = tl.constexpr(2)
WIDTH = tl.constexpr(3)
PARTS = tl.constexpr(4)
LENGTH = tl.constexpr(5)
RESULT = tl.constexpr(6)  # where the sums go, one after another
SUM_FIRST = tl.constexpr(7)
SUM_ROW = tl.constexpr(8)
FEW = tl.constexpr(16)  # partials of a layer up to which a program adds those of
SEVERAL = tl.constexpr(32)  # layers

# What is done to pieces of cut blocks, which are chunks of their own: first, find what this rank has to tell
# the others; then, update them by what all have told.
FIND = tl.constexpr(1)
AGREED = tl.constexpr(2)

# How the update goes through a chunk that has elements of several large layers: one layer after another.
IN_TURN = tl.constexpr(-1)

# The columns of what the update is given: see Coefficients.
GRAD_SCALE = tl.constexpr(shards.GRAD_SCALE)
STEP_SIZE = tl.constexpr(shards.STEP_SIZE)
DECAY = tl.constexpr(shards.DECAY)
AHEAD = tl.constexpr(shards.AHEAD)
BETA1 = tl.constexpr(shards.BETA1)
BETA3 = tl.constexpr(shards.BETA3)
WEIGHT_DECAY = tl.constexpr(shards.WEIGHT_DECAY)
EPS = tl.constexpr(shards.EPS)
RECORD = tl.constexpr(4)

# ---- the statistic ---------------------------------------------------------------------------------------


@jit
def _accumulate(total: tl.tensor, value: tl.tensor, squares: tl.constexpr) -> tl.tensor:
    if squares:
        # The product is exact, so that fusing it with the sum saves an instruction and not a rounding.
        wide = value.to(tl.float64)
        return tl.fma(wide, wide, total)
    return tl.maximum(total, magnitudes(value))


@jit
def _total(totals: tl.tensor, axis: tl.constexpr, squares: tl.constexpr) -> tl.tensor:
    """What was accumulated along an axis, as float64."""
    if squares:
        result = tl.sum(totals, axis)
    else:
        result = tl.max(totals, axis).to(tl.float32, bitcast=True).to(tl.float64)
    return result


@jit
def _elements(
    grad: tl.tensor,
    offset: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    grad_type: tl.constexpr,
    tile: tl.constexpr,
) -> tl.tensor:
    """A tile of elements from ``offset`` on; 0 where they are not of those begin..end."""
    index = offset + tl.arange(0, tile)
    if (offset >= begin) & (offset + tile <= end):
        value = load_elements(grad, index, None, grad_type, True)
    else:
        inside = (index >= begin) & (index < end)
        value = tl.where(inside, load_elements(grad, index, inside, grad_type, False), 0.0)
    return value


@jit
def _of_chunk(
    grad: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    grad_type: tl.constexpr,
    squares: tl.constexpr,
    tile: tl.constexpr,
) -> tl.tensor:
    totals = tl.zeros([tile], tl.float64 if squares else tl.int32)
    for offset in range(0, end, tile):
        totals = _accumulate(totals, _elements(grad, offset, begin, end, grad_type, tile), squares)
    return _total(totals, 0, squares)


@jit
def _of_chunk_in_words(
    grad: tl.tensor, begin: tl.tensor, end: tl.tensor, grad_type: tl.constexpr, tile: tl.constexpr
) -> Any:
    high = tl.zeros([tile], tl.float32)
    middle, low = high, high
    for offset in range(0, end, tile):
        value = _elements(grad, offset, begin, end, grad_type, tile)
        high, middle, low = triton_sums.add(high, middle, low, *triton_sums.square(value))
    result, wrong = triton_sums.total(high, middle, low, 0)
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

    ``gradients``: the address of each. ``in_words``: whether squares are added as triton_sums does it, or in
    float64. ``width`` is for rows_statistic only.
    """
    program = tl.program_id(0)
    row = table + tl.load(run_of + program) * SUM_ROW
    nth = program - tl.load(row + SUM_FIRST)
    parts = tl.load(row + PARTS)
    length = tl.load(row + LENGTH)
    size = tl.load(row + WIDTH)
    layer = nth // parts
    done = (nth - layer * parts) * length
    first = layer * size + done
    grad = tl.load(gradients + tl.load(row + SUM_SHARD)) + tl.load(row + SUM_GRAD)
    grad += first * (grad_type.primitive_bitwidth // 8)
    # From the last aligned address before it.
    begin = (grad % 16).to(tl.int32) // (grad_type.primitive_bitwidth // 8)
    end = begin + tl.minimum(length, size - done).to(tl.int32)
    grad -= grad % 16
    if in_words:
        result, wrong = _of_chunk_in_words(grad, begin, end, grad_type, tile)
        if wrong:
            result = _of_chunk(grad, begin, end, grad_type, squares, tile)
    else:
        result = _of_chunk(grad, begin, end, grad_type, squares, tile)
    tl.store(statistic + tl.load(row + RESULT) + nth, result)


@jit
def _elements_of_rows(
    grad: tl.tensor,
    first: tl.tensor,
    offset: tl.tensor,
    size: tl.tensor,
    end: tl.tensor,
    grad_type: tl.constexpr,
    width: tl.constexpr,
    aligned: tl.constexpr,
) -> tl.tensor:
    """The elements of each row from ``offset`` on; 0 where they are not of the row, and of those 0..end."""
    column = offset + tl.arange(0, width)[None, :]
    index = first[:, None] + column
    inside = (column < size) & (index < end)
    if aligned:
        index = tl.max_contiguous(tl.multiple_of(index, (1, 8)), (1, 8))
        inside = tl.max_constancy(inside, (1, 8))
    return tl.where(inside, load_elements(grad, index, inside, grad_type, aligned), 0.0)


@jit
def _of_rows(
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
            value = _elements_of_rows(grad, first, offset, size, end, grad_type, width, True)
        else:
            value = _elements_of_rows(grad, first, offset, size, end, grad_type, width, False)
        totals = _accumulate(totals, value, squares)
    return _total(totals, 1, squares)


@jit
def _of_rows_in_words(
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
            value = _elements_of_rows(grad, first, offset, size, end, grad_type, width, True)
        else:
            value = _elements_of_rows(grad, first, offset, size, end, grad_type, width, False)
        high, middle, low = triton_sums.add(high, middle, low, *triton_sums.square(value))
    result, wrong = triton_sums.total(high, middle, low, 1)
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
    """The statistic of each layer in each chunk of several whole ones.

    A layer is a row of a tile, ``width`` elements of it at a time. ``in_words``: see chunk_statistic.
    """
    rows: tl.constexpr = tile // width
    program = tl.program_id(0)
    row = table + tl.load(run_of + program) * SUM_ROW
    many = tl.load(row + PARTS)
    before = (program - tl.load(row + SUM_FIRST)) * many
    size = tl.load(row + WIDTH)
    grad = tl.load(gradients + tl.load(row + SUM_SHARD)) + tl.load(row + SUM_GRAD)
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
            found, wrong = _of_rows_in_words(grad, first, size, end, aligned, grad_type, width)
            if tl.max(wrong.to(tl.int32)) > 0:
                found = _of_rows(grad, first, size, end, aligned, grad_type, squares, width)
        else:
            found = _of_rows(grad, first, size, end, aligned, grad_type, squares, width)
        tl.store(result + nth, found, mask=nth < layers)


@jit
def layer_statistic(table: tl.tensor, statistic: tl.tensor, width: tl.constexpr, tile: tl.constexpr) -> None:
    """The sums of partials, those of each layer ``width`` at a time.

    A row of its table: the sum's place, first and last (exclusive) partial, norm type. Without partials it is
    idle.
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


# ---- the update ------------------------------------------------------------------------------------------


@jit
def _layers(
    offset: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    layer: tl.tensor,
    within: tl.tensor,
    inverse: tl.tensor,
    group: tl.constexpr,
    tile: tl.constexpr,
) -> tl.tensor:
    """The layer of each group of elements of a tile; ``layer`` and ``within``: of the element at ``begin``.

    element // size, without a division for each: ``inverse`` is 2**31 // size + 1, or if that is exact
    2**31 // size. With e = inverse * size - 2**31, the quotient is exact while element * e < 2**31;
    element < 2 * CHUNK and 0 <= e <= size <= CHUNK.
    """
    index = offset + tl.arange(0, tile // group) * group
    # Lanes beside the piece have no layer: one that exists.
    index = tl.minimum(tl.maximum(index, begin), end - 1)
    element = (index - begin + within).to(tl.uint64)
    return layer + ((element * inverse) >> 31).to(tl.int64)


@jit
def _each(value: tl.tensor, group: tl.constexpr) -> tl.tensor:
    """The value of each group for each of its elements."""
    groups: tl.constexpr = value.shape[0]
    return value[:, None].broadcast_to(groups, group).reshape(groups * group)


@jit
def _records(
    each: tl.tensor, layers: tl.tensor, group: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """GRAD_SCALE, STEP_SIZE, DECAY and AHEAD of the elements of groups; in one load for each."""
    pointer = each + (layers * RECORD)[:, None] + tl.arange(0, RECORD)[None, :]
    even, odd = tl.load(pointer).reshape(layers.shape[0], 2, 2).split()
    scale, shrink = even.split()
    step, forward = odd.split()
    return _each(scale, group), _each(step, group), _each(shrink, group), _each(forward, group)


@jit
def _update_tile(
    param: tl.tensor,
    grad: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_scale: tl.tensor,
    offset: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    moves: tl.tensor,
    key: tl.tensor,
    origin: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    next_high: tl.tensor,
    grad_scale: tl.tensor,
    step_size: tl.tensor,
    decay: tl.tensor,
    ahead: tl.tensor,
    row_root: tl.tensor,
    column_root: tl.tensor,
    column: tl.tensor,
    cut_largest: tl.tensor,
    cut_active: tl.tensor,
    beta1: tl.tensor,
    beta3: tl.tensor,
    weight_decay: tl.tensor,
    eps: tl.tensor,
    param_type: tl.constexpr,
    grad_type: tl.constexpr,
    exp_avg_type: tl.constexpr,
    largest: tl.constexpr,
    codes_aligned: tl.constexpr,
    rounds_weights: tl.constexpr,
    inside: tl.constexpr,
    outside: tl.constexpr,
    nesterov: tl.constexpr,
    divided: tl.constexpr,
    cut: tl.constexpr,
    group: tl.constexpr,
    tile: tl.constexpr,
    aligned: tl.constexpr,
    masked: tl.constexpr,
) -> None:
    """The order of reference.update. No multiply-add is fused: see LAUNCH in triton.py.

    ``moves``: whether the layer of each group is active. ``aligned``: addresses are, all positions have the
    same upper half, and of each eight lanes from a multiple of eight on all are of the piece, or none; their
    columns begin at a multiple of eight, unless each may be of another layer. Unless ``masked``, all lanes
    are of the piece. An element's column is ``column`` + its index, and its position ``origin`` + that, of
    which this is the lower half; ``low``: of the first one of the chunk.
    """
    index = offset + tl.arange(0, tile)
    mask = (index >= begin) & (index < end) if masked else None
    changed = mask
    active = moves
    if group > 0:
        active = _each(moves, group)
        changed = active & mask if masked else active
    if aligned and masked:
        mask = tl.max_constancy(mask, 8)
    if aligned and changed is not None:
        changed = tl.max_constancy(changed, 1 if group == 1 else 8)
    # All that is read first, so that it is on its way while the bits are made.
    weight = load_elements(param, index, mask, param_type, aligned)
    term = load_elements(grad, index, mask, grad_type, aligned)
    old = None
    if largest > 0:
        block = offset // BLOCK + tl.arange(0, tile // BLOCK)
        there = (block * BLOCK < end) & (block * BLOCK + BLOCK > begin)
        touched = there if masked else None
        old = load_blocks(exp_avg, exp_avg_scale, block, touched, largest, codes_aligned)
    elif exp_avg_type is not None:
        old = load_elements(exp_avg, index, mask, exp_avg_type, aligned)
    if divided is not None:
        place = column + index
        if aligned and group != 1:
            place = tl.max_contiguous(tl.multiple_of(place, 8), 8)
        of_column = tl.load(column_root + place, mask=mask)
        root = row_root * of_column + eps
        live = of_column > 0
    else:
        root = None
        live = None
    bits = index
    if rounds_weights or (exp_avg_type is not None and exp_avg_type != tl.float32):
        position = origin + index.to(tl.uint32)
        bits = random_bits(key, position, high if aligned else tl.where(position < low, next_high, high))
    term *= grad_scale
    if divided == "term":
        term = tl.div_rn(term, root)
    if inside:
        term += weight * weight_decay
    term *= beta3  # where it is 1, the same bits
    moment = term
    if exp_avg_type is not None:
        moment += old * beta1
    if largest > 0:
        kept = moment
        if divided is not None:
            selected = active & live if group > 0 else live
            kept = tl.where(selected, moment, old)
            stepped = selected & mask if masked else selected
            touched = tl.max(stepped.to(tl.int32).reshape(tile // BLOCK, BLOCK), 1) > 0
        elif group > 0:
            kept = tl.where(active, moment, old)
            stepped = tl.max(moves.to(tl.int32).reshape(tile // BLOCK, BLOCK // group), 1) > 0
            touched = stepped & there if masked else stepped
        if masked:
            kept = tl.where(mask, kept, 0.0)
        magnitude = None
        if cut == FIND:
            tl.atomic_max(cut_largest, tl.max(magnitudes(kept)))
            tl.atomic_max(cut_active, tl.max(stepped.to(tl.int32)))
        elif cut == AGREED:
            magnitude = tl.load(cut_largest)
            touched = block - offset // BLOCK < tl.load(cut_active)  # the one block there is
        if cut != FIND:
            store_blocks(
                exp_avg, exp_avg_scale, block, kept, bits >> 16, touched, magnitude, largest, codes_aligned
            )
    elif exp_avg_type is not None:
        moment_bits = None if exp_avg_type == tl.float32 else bits >> 16
        store_elements(exp_avg, index, moment, moment_bits, changed, exp_avg_type, aligned, live, old)
    if cut != FIND:
        change = moment * ahead + term * step_size if nesterov else moment * step_size
        if divided == "change":
            change = tl.div_rn(change, root)
        if outside:
            change += weight * decay
        weight_bits = bits & 0xFFFF if rounds_weights else None
        store_elements(param, index, weight - change, weight_bits, changed, param_type, aligned, live, weight)


@jit
def update(
    table: tl.tensor,
    run_of: tl.tensor,
    gradients: tl.tensor,
    each: tl.tensor,
    groups: tl.tensor,
    active: tl.tensor,
    key: tl.tensor,
    row_root: tl.tensor,
    column_root: tl.tensor,
    cut_blocks: tl.tensor,
    cut_count: tl.tensor,
    param_type: tl.constexpr,
    grad_type: tl.constexpr,
    exp_avg_type: tl.constexpr,
    largest: tl.constexpr,
    codes_aligned: tl.constexpr,
    rounds_weights: tl.constexpr,
    inside: tl.constexpr,
    outside: tl.constexpr,
    nesterov: tl.constexpr,
    divided: tl.constexpr,
    cut: tl.constexpr,
    group: tl.constexpr,
    aligned: tl.constexpr,
    whole: tl.constexpr,
    chunk: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """First moment and weights of the active layers, in place.

    ``gradients``: the address of each. ``each``, ``groups``, ``active``, ``key`` and the roots are those of
    Coefficients, numbers float32; the roots may be None where they are not needed.
    ``divided``, of factored parameters: "term", what is added to the moment, or "change", what is taken from
    the weight; else None. ``cut``: of pieces of cut blocks, what is done to them: see FIND; else None.
    ``group``: elements that surely are of one layer; 0: all of a chunk; or IN_TURN. ``aligned``: see
    _update_tile; if no moment is in blocks, of the tiles that are whole. ``whole``: all tiles are. That this
    is known of a launch, and no branches, saves registers.
    """
    # From the end: what the first pass read last is still in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row = table + tl.load(run_of + program) * ROW
    base = (program - tl.load(row + FIRST)) * chunk
    first = tl.load(row + BEGIN)
    done = tl.maximum(base, first) - first  # elements of the run that come before
    begin = 0 if whole else (first + done - base).to(tl.int32)
    end = chunk if whole else tl.minimum(tl.load(row + END) - base, chunk).to(tl.int32)
    size = tl.load(row + SIZE)
    within = tl.load(row + WITHIN) + done
    layer = tl.load(row + LAYER)
    if within >= size:
        ended = within // size
        layer += ended
        within -= ended * size
    element = tl.load(gradients + tl.load(row + SHARD)) + tl.load(row + GRAD)
    grad = element + base * (grad_type.primitive_bitwidth // 8)
    param = tl.load(row + PARAM) + base * (param_type.primitive_bitwidth // 8)
    exp_avg, exp_avg_scale = None, None
    if largest > 0:
        packed: tl.constexpr = 2 if largest < 8 else 1
        exp_avg = tl.load(row + EXP_AVG) + base // packed
        exp_avg_scale = tl.load(row + SCALE) + base // (BLOCK // 2)
    elif exp_avg_type is not None:
        exp_avg = tl.load(row + EXP_AVG) + base * (exp_avg_type.primitive_bitwidth // 8)
    position = tl.load(row + POSITION) + done
    low = position.to(tl.uint32)
    origin = (position - begin).to(tl.uint32)
    high = scramble((position >> 32).to(tl.uint32))
    next_high = scramble(((position + chunk) >> 32).to(tl.uint32))
    of_group = groups + tl.load(row + GROUP) * RECORD
    beta1 = tl.load(of_group + BETA1)
    beta3 = tl.load(of_group + BETA3)
    weight_decay = tl.load(of_group + WEIGHT_DECAY)
    eps = tl.load(of_group + EPS)
    cut_largest, cut_active = None, None
    if cut is not None:
        cut_largest = cut_blocks + tl.load(row + CUT)
        cut_active = cut_largest + cut_count
    layers = 1
    if group == IN_TURN:
        layers = ((within + (end - begin) - 1) // size + 1).to(tl.int32)
    if group > 0:
        # A layer larger than a chunk ends in it at most once, so that it may as well be as large as one.
        most = tl.minimum(size, chunk).to(tl.int32)
        inverse = (0x7FFFFFFF // most).to(tl.uint64) + 1
        passed = most - tl.minimum(size - within, most).to(tl.int32)
    for nth in range(0, layers):
        # Elements start..stop: of one layer after another, or all.
        start, stop, before = begin, end, begin - within
        if group == IN_TURN:
            before += nth * size
            start = tl.maximum(before, begin).to(tl.int32)
            stop = tl.minimum(before + size, end).to(tl.int32)
        column = tl.load(row + COLUMN) - before if divided is not None else None
        if group > 0 or tl.load(active + layer + nth):
            if group <= 0:
                moves, hashed = True, tl.load(key + layer + nth).to(tl.uint32, bitcast=True)
                record = each + (layer + nth) * RECORD
                scale = tl.load(record + GRAD_SCALE)
                step = tl.load(record + STEP_SIZE)
                shrink = tl.load(record + DECAY)
                forward = tl.load(record + AHEAD)
                of_row = tl.load(row_root + layer + nth) if divided is not None else None
            for offset in range(start // tile * tile, stop, tile):
                place = column
                if group > 0:
                    of_layers = _layers(offset, begin, end, layer, passed, inverse, group, tile)
                    moves = tl.load(active + of_layers)
                    hashed = _each(tl.load(key + of_layers).to(tl.uint32, bitcast=True), group)
                    scale, step, shrink, forward = _records(each, of_layers, group)
                    of_row = None
                    if divided is not None:
                        of_row = _each(tl.load(row_root + of_layers), group)
                        place = column - _each((of_layers - layer) * size, group)
                if whole or largest > 0 or not aligned:
                    _update_tile(
                        param, grad, exp_avg, exp_avg_scale, offset, start, stop, moves, hashed, origin, low,
                        high, next_high, scale, step, shrink, forward, of_row, column_root, place,
                        cut_largest, cut_active, beta1, beta3, weight_decay, eps, param_type, grad_type,
                        exp_avg_type, largest, codes_aligned, rounds_weights, inside, outside, nesterov,
                        divided, cut, group, tile, aligned, not whole,
                    )  # fmt: skip
                elif (offset >= start) & (offset + tile <= stop):
                    _update_tile(
                        param, grad, exp_avg, exp_avg_scale, offset, start, stop, moves, hashed, origin, low,
                        high, next_high, scale, step, shrink, forward, of_row, column_root, place,
                        cut_largest, cut_active, beta1, beta3, weight_decay, eps, param_type, grad_type,
                        exp_avg_type, largest, codes_aligned, rounds_weights, inside, outside, nesterov,
                        divided, cut, group, tile, True, False,
                    )  # fmt: skip
                else:
                    _update_tile(
                        param, grad, exp_avg, exp_avg_scale, offset, start, stop, moves, hashed, origin, low,
                        high, next_high, scale, step, shrink, forward, of_row, column_root, place,
                        cut_largest, cut_active, beta1, beta3, weight_decay, eps, param_type, grad_type,
                        exp_avg_type, largest, codes_aligned, rounds_weights, inside, outside, nesterov,
                        divided, cut, group, tile, False, True,
                    )  # fmt: skip
