"""The Triton kernels: the statistic in two stages, and the update.

A program has one chunk: a row of the table, whose columns are below.
"""

from __future__ import annotations

import triton.language as tl

from novoscale.kernels import shards
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

# The columns of the table, int64. A row is 128 bytes, a multiple of 16, so that the rows of each launch are
# aligned alike.
PARAM = tl.constexpr(0)  # addresses of the chunk's first element (or block), 0 where there is no such tensor
GRAD = tl.constexpr(1)  # of the gradient, which may move, the bytes from its beginning
EXP_AVG = tl.constexpr(2)
BEGIN = tl.constexpr(3)  # its elements begin..end, counted from there, are those of the piece
END = tl.constexpr(4)
LAYER = tl.constexpr(5)  # of all layers, the one of the element at begin
SLOT = tl.constexpr(6)  # its place among the chunks that are not factored: it has two partials
SCALE = tl.constexpr(7)  # address
POSITION = tl.constexpr(8)  # of the element at begin in its parameter
WITHIN = tl.constexpr(9)  # and in its layer
SIZE = tl.constexpr(10)  # elements of a layer
COLUMN = tl.constexpr(11)  # of all columns, the one of its index 0 if there is one: counted back from begin
WIDTH = tl.constexpr(12)  # columns of its factored parameter, where it has elements of several rows; else 0
CUT = tl.constexpr(13)  # of all cut blocks, the one that it is a piece of
GROUP = tl.constexpr(14)  # of all param groups, its own
SHARD = tl.constexpr(15)  # of all gradients, its own
ROW = tl.constexpr(16)

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

# What is done to pieces of cut blocks, which are chunks of their own: first, find what this rank has to tell
# the others; then, update them by what all have told.
FIND = tl.constexpr(1)
AGREED = tl.constexpr(2)


@jit
def _gradient(row: tl.tensor, gradients: tl.tensor) -> tl.tensor:
    """The address of the gradient of a chunk's first element."""
    return tl.load(gradients + tl.load(row + SHARD)) + tl.load(row + GRAD)


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
def chunk_statistic(
    table: tl.tensor,
    gradients: tl.tensor,
    partials: tl.tensor,
    statistic: tl.tensor,
    grad_type: tl.constexpr,
    squares: tl.constexpr,
    width: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """The statistic of each chunk that lies in one layer: the sum of g**2, or the largest abs(g).

    ``gradients``: the address of each; ``statistic`` and ``width`` are for rows_statistic only.
    """
    row = table + tl.program_id(0) * ROW
    grad = _gradient(row, gradients)
    begin = tl.load(row + BEGIN).to(tl.int32)
    end = tl.load(row + END).to(tl.int32)
    # From the last aligned address before it, whatever the alignment of the other tensors and of blocks.
    shift = (grad % 16).to(tl.int32) // (grad_type.primitive_bitwidth // 8)
    grad, begin, end = grad - grad % 16, begin + shift, end + shift
    totals = tl.zeros([tile], tl.float64 if squares else tl.int32)
    for offset in range(0, end, tile):
        index = offset + tl.arange(0, tile)
        if (offset >= begin) & (offset + tile <= end):
            totals = _accumulate(totals, load_elements(grad, index, None, grad_type, True), squares)
        else:
            inside = (index >= begin) & (index < end)
            value = tl.where(inside, load_elements(grad, index, inside, grad_type, False), 0.0)
            totals = _accumulate(totals, value, squares)
    tl.store(partials + 2 * tl.load(row + SLOT), _total(totals, 0, squares))


@jit
def _add_rows(
    totals: tl.tensor,
    grad: tl.tensor,
    first: tl.tensor,
    offset: tl.tensor,
    size: tl.tensor,
    end: tl.tensor,
    grad_type: tl.constexpr,
    squares: tl.constexpr,
    aligned: tl.constexpr,
) -> tl.tensor:
    """Add to each row's total the row's elements from ``offset`` on, of those 0..end of the chunk."""
    column = offset + tl.arange(0, totals.shape[1])[None, :]
    index = first[:, None] + column
    inside = (column < size) & (index >= 0) & (index < end)
    if aligned:
        index = tl.max_contiguous(tl.multiple_of(index, (1, 8)), (1, 8))
        inside = tl.max_constancy(inside, (1, 8))
    value = load_elements(grad, index, inside, grad_type, aligned)
    return _accumulate(totals, tl.where(inside, value, 0.0), squares)


@jit
def rows_statistic(
    table: tl.tensor,
    gradients: tl.tensor,
    partials: tl.tensor,
    statistic: tl.tensor,
    grad_type: tl.constexpr,
    squares: tl.constexpr,
    width: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """The statistic of each layer in each chunk of several: whole layers', and partials of the outer two.

    A layer is a row of a tile, ``width`` elements of it at a time.
    """
    rows: tl.constexpr = tile // width
    row = table + tl.program_id(0) * ROW
    begin = tl.load(row + BEGIN)
    grad = _gradient(row, gradients) + begin * (grad_type.primitive_bitwidth // 8)
    end = (tl.load(row + END) - begin).to(tl.int32)
    within = tl.load(row + WITHIN).to(tl.int32)
    size = tl.load(row + SIZE).to(tl.int32)
    layer = tl.load(row + LAYER)
    slot = tl.load(row + SLOT)
    last = (within + end - 1) // size
    aligned = ((grad % 16).to(tl.int32) | ((within | size | end) % 8)) == 0
    for number in range(0, last + 1, rows):
        nth = number + tl.arange(0, rows)
        first = nth * size - within  # of each layer's elements, the first, which may be before the chunk
        totals = tl.zeros([rows, width], tl.float64 if squares else tl.int32)
        for offset in range(0, size, width):
            if aligned:
                totals = _add_rows(totals, grad, first, offset, size, end, grad_type, squares, True)
            else:
                totals = _add_rows(totals, grad, first, offset, size, end, grad_type, squares, False)
        result = _total(totals, 1, squares)
        tl.store(statistic + layer + nth, result, mask=(nth > 0) & (nth < last))
        tl.store(partials + 2 * slot + (nth > 0).to(tl.int64), result, mask=(nth == 0) | (nth == last))


@jit
def layer_statistic(table: tl.tensor, partials: tl.tensor, statistic: tl.tensor, tile: tl.constexpr) -> None:
    """The sums of partials. A row of its table: layer, first and last (exclusive) partial, norm type."""
    row = table + tl.program_id(0) * 4
    first = tl.load(row + 1)
    last = tl.load(row + 2)
    total = tl.zeros([tile], tl.float64)
    largest = tl.zeros([tile], tl.int64)
    for offset in range(first, last, tile):
        index = offset + tl.arange(0, tile)
        value = tl.load(partials + index, mask=index < last, other=0.0)
        total += value
        largest = tl.maximum(largest, value.to(tl.int64, bitcast=True))
    result = statistic + tl.load(row)
    if tl.load(row + 3) == 2:
        tl.store(result, tl.sum(total))
    else:
        tl.store(result, tl.max(largest).to(tl.float64, bitcast=True))


# ---- the update ------------------------------------------------------------------------------------------


@jit
def _layers(
    row: tl.tensor,
    offset: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    group: tl.constexpr,
    tile: tl.constexpr,
) -> tl.tensor:
    """The layer of each group of elements of a tile."""
    index = offset + tl.arange(0, tile // group) * group
    # Lanes beside the piece have no layer: one that exists.
    index = tl.minimum(tl.maximum(index, begin), end - 1)
    element = (index - begin + tl.load(row + WITHIN).to(tl.int32)).to(tl.uint64)
    size = tl.load(row + SIZE).to(tl.int32)
    # element // size, without a division for each: with e = inverse * size - 2**31, the quotient is exact
    # while element * e < 2**31; element < 2 * CHUNK and 0 < e <= size <= CHUNK.
    inverse = (0x7FFFFFFF // size).to(tl.uint64) + 1
    return tl.load(row + LAYER) + ((element * inverse) >> 31).to(tl.int64)


@jit
def _each(value: tl.tensor, group: tl.constexpr) -> tl.tensor:
    """The value of each group for each of its elements."""
    groups: tl.constexpr = value.shape[0]
    return value[:, None].broadcast_to(groups, group).reshape(groups * group)


@jit
def _update_tile(
    param: tl.tensor,
    grad: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_scale: tl.tensor,
    offset: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    active: tl.tensor,
    key: tl.tensor,
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

    ``aligned``: addresses are, all positions have the same upper half, and of each eight lanes from a
    multiple of eight on all are of the piece, or none; their columns begin at a multiple of eight, unless
    each may be of another layer. Unless ``masked``, all lanes are of the piece. An element's column is
    ``column`` + its index.
    """
    index = offset + tl.arange(0, tile)
    mask = (index >= begin) & (index < end) if masked else None
    changed = mask
    if group > 0:
        changed = active & mask if masked else active
    if aligned and masked:
        mask = tl.max_constancy(mask, 8)
    if aligned and changed is not None:
        changed = tl.max_constancy(changed, 1 if group == 1 else 8)
    bits = index
    if rounds_weights or (exp_avg_type is not None and exp_avg_type != tl.float32):
        position = low + (index - begin).to(tl.uint32)
        bits = random_bits(key, position, high if aligned else tl.where(position < low, next_high, high))
    root, live, selected = None, None, active
    if divided is not None:
        place = column + index
        if aligned and group != 1:
            place = tl.max_contiguous(tl.multiple_of(place, 8), 8)
        of_column = tl.load(column_root + place, mask=mask)
        root = row_root * of_column + eps
        live = of_column > 0
        selected = active & live if group > 0 else live
    weight = load_elements(param, index, mask, param_type, aligned)
    term = load_elements(grad, index, mask, grad_type, aligned) * grad_scale
    if divided == "term":
        term = tl.div_rn(term, root)
    if inside:
        term += weight * weight_decay
    term *= beta3  # where it is 1, the same bits
    moment = term
    if largest > 0:
        block = offset // BLOCK + tl.arange(0, tile // BLOCK)
        touched = block * BLOCK < end
        old = load_blocks(exp_avg, exp_avg_scale, block, touched, largest, codes_aligned)
        moment += old * beta1
        kept = moment
        if group > 0 or divided is not None:
            kept = tl.where(selected, moment, old)
            touched = tl.max((selected & mask).to(tl.int32).reshape(tile // BLOCK, BLOCK), 1) > 0
        kept = tl.where(mask, kept, 0.0)
        magnitude = None
        if cut == FIND:
            tl.atomic_max(cut_largest, tl.max(magnitudes(kept)))
            tl.atomic_max(cut_active, tl.max(touched.to(tl.int32)))
        elif cut == AGREED:
            magnitude = tl.load(cut_largest)
            touched = block < tl.load(cut_active)  # of which there is one
        if cut != FIND:
            store_blocks(
                exp_avg, exp_avg_scale, block, kept, bits >> 16, touched, magnitude, largest, codes_aligned
            )
    elif exp_avg_type is not None:
        old = load_elements(exp_avg, index, mask, exp_avg_type, aligned)
        moment += old * beta1
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
    ragged: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """First moment and weights of the active layers, in place.

    ``gradients``: the address of each. ``each``, ``groups``, ``active``, ``key`` and the roots are those of
    Coefficients, numbers float32; the roots may be None where they are not needed.
    ``divided``, of factored parameters: "term", what is added to the moment, or "change", what is taken from
    the weight; else None. ``cut``: of pieces of cut blocks, what is done to them: see FIND; else None.
    ``group``: elements that surely are of one layer; 0, if ``cut`` is None: all of a chunk. ``ragged``, of
    moments in blocks: see ``aligned`` of _update_tile. There it is known of a launch and no branch: two would
    take more registers.
    """
    # From the end: what the first pass read last is still in the cache.
    row = table + (tl.num_programs(0) - 1 - tl.program_id(0)) * ROW
    layer = tl.load(row + LAYER)
    if group > 0 or tl.load(active + layer):
        param = tl.load(row + PARAM)
        grad = _gradient(row, gradients)
        exp_avg = tl.load(row + EXP_AVG)
        exp_avg_scale = tl.load(row + SCALE)
        begin = tl.load(row + BEGIN).to(tl.int32)
        end = tl.load(row + END).to(tl.int32)
        position = tl.load(row + POSITION)
        last_position = position + (end - begin - 1)
        high = scramble((position >> 32).to(tl.uint32))
        next_high = scramble((last_position >> 32).to(tl.uint32))
        of_group = groups + tl.load(row + GROUP) * RECORD
        beta1 = tl.load(of_group + BETA1)
        beta3 = tl.load(of_group + BETA3)
        weight_decay = tl.load(of_group + WEIGHT_DECAY)
        eps = tl.load(of_group + EPS)
        wide = (param | grad | exp_avg) % 16 == 0
        first = tl.load(row + COLUMN) if divided is not None else None
        if divided is not None and group != 1:
            wide = wide & ((first | tl.load(row + WIDTH)) % 8 == 0)
        one_half = True
        if rounds_weights or (exp_avg_type is not None and exp_avg_type != tl.float32):
            one_half = position >> 32 == last_position >> 32
        if group == 0:
            moves, hashed = True, tl.load(key + layer).to(tl.uint32, bitcast=True)
            record = each + layer * RECORD
            scale = tl.load(record + GRAD_SCALE)
            step = tl.load(record + STEP_SIZE)
            shrink = tl.load(record + DECAY)
            forward = tl.load(record + AHEAD) if nesterov else None
            of_row = tl.load(row_root + layer) if divided is not None else None
        cut_largest, cut_active = None, None
        if cut is not None:
            cut_largest = cut_blocks + tl.load(row + CUT)
            cut_active = cut_largest + cut_count
        for offset in range(0, end, tile):
            column = first
            if group > 0:
                layers = _layers(row, offset, begin, end, group, tile)
                moves = _each(tl.load(active + layers), group)
                hashed = _each(tl.load(key + layers).to(tl.uint32, bitcast=True), group)
                record = each + layers * RECORD
                scale = _each(tl.load(record + GRAD_SCALE), group)
                step = _each(tl.load(record + STEP_SIZE), group)
                shrink = _each(tl.load(record + DECAY), group)
                forward = _each(tl.load(record + AHEAD), group) if nesterov else None
                of_row = None
                if divided is not None:
                    of_row = _each(tl.load(row_root + layers), group)
                    column = first - _each((layers - layer) * tl.load(row + WIDTH), group)
            if largest > 0:
                _update_tile(
                    param, grad, exp_avg, exp_avg_scale, offset, begin, end, moves,
                    hashed, position.to(tl.uint32), high, next_high, scale, step, shrink, forward,
                    of_row, column_root, column, cut_largest, cut_active, beta1, beta3, weight_decay, eps,
                    param_type, grad_type, exp_avg_type, largest, codes_aligned, rounds_weights, inside,
                    outside, nesterov, divided, cut, group, tile, not ragged, True,
                )  # fmt: skip
            elif wide & (offset >= begin) & (offset + tile <= end) & one_half:
                _update_tile(
                    param, grad, exp_avg, exp_avg_scale, offset, begin, end, moves,
                    hashed, position.to(tl.uint32), high, next_high, scale, step, shrink, forward,
                    of_row, column_root, column, cut_largest, cut_active, beta1, beta3, weight_decay, eps,
                    param_type, grad_type, exp_avg_type, largest, codes_aligned, rounds_weights, inside,
                    outside, nesterov, divided, cut, group, tile, True, False,
                )  # fmt: skip
            else:
                _update_tile(
                    param, grad, exp_avg, exp_avg_scale, offset, begin, end, moves,
                    hashed, position.to(tl.uint32), high, next_high, scale, step, shrink, forward,
                    of_row, column_root, column, cut_largest, cut_active, beta1, beta3, weight_decay, eps,
                    param_type, grad_type, exp_avg_type, largest, codes_aligned, rounds_weights, inside,
                    outside, nesterov, divided, cut, group, tile, False, True,
                )  # fmt: skip
