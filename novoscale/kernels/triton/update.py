"""The second pass over the elements, in Triton: the update of the first moment and of the weights.

A program has one chunk, of a run that is a row of a table: see ``tables``.
"""

from __future__ import annotations

import triton.language as tl

from novoscale.kernels import shards
from novoscale.kernels.triton.formats import (
    BLOCK,
    code_address,
    jit,
    load_blocks,
    load_elements,
    magnitudes,
    random_bits,
    scramble,
    store_blocks,
    store_elements,
)

# The columns of the table of the update, int64: a row for each run of consecutive chunks. Elements are
# counted from the beginning of the first chunk, index 0; those of the piece are BEGIN..END.
PARAM = tl.constexpr(0)  # address of index 0
GRAD = tl.constexpr(1)  # bytes from the beginning of the gradient, which may move, to index 0
EXP_AVG = tl.constexpr(2)  # address of index 0, or of its block; 0 where there is no such tensor
SCALE = tl.constexpr(3)  # address of the scale of that block; 0 where there is none
BEGIN = tl.constexpr(4)
END = tl.constexpr(5)
LAYER = tl.constexpr(6)  # of all layers, the one of the element at BEGIN
POSITION = tl.constexpr(7)  # of that element in its parameter
WITHIN = tl.constexpr(8)  # of that element in its layer
SIZE = tl.constexpr(9)  # elements of a layer
COLUMN = tl.constexpr(10)  # of all columns, the first of a factored parameter, whose rows are layers
SHARDED = tl.constexpr(11)  # of all sharded blocks, the one that the elements are part of
GROUP = tl.constexpr(12)  # of all param groups, the one of the elements
SHARD = tl.constexpr(13)  # of all gradients, the one of the elements
FIRST = tl.constexpr(14)  # of the launch's chunks, the first of the run
ROW = tl.constexpr(16)  # columns: 128 bytes, of which the last eight are not used

# What a launch does to this rank's elements of sharded blocks, which are chunks of their own: first, find
# what this rank has to tell the others; then, update them by what the ranks have agreed on.
FIND = tl.constexpr(1)
AGREED = tl.constexpr(2)

# The ``group`` of a chunk that has elements of several large layers: one layer is done after another.
IN_TURN = tl.constexpr(-1)

# The columns of the vectors that the update is given: see ``shards.Coefficients``.
GRAD_SCALE = tl.constexpr(shards.GRAD_SCALE)
STEP_SIZE = tl.constexpr(shards.STEP_SIZE)
DECAY = tl.constexpr(shards.DECAY)
AHEAD = tl.constexpr(shards.AHEAD)
BETA1 = tl.constexpr(shards.BETA1)
BETA3 = tl.constexpr(shards.BETA3)
WEIGHT_DECAY = tl.constexpr(shards.WEIGHT_DECAY)
EPS = tl.constexpr(shards.EPS)
RECORD = tl.constexpr(4)


@jit
def _layer_of_groups(
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

    Computes element // size without a division for each: ``inverse`` is 2**31 // size + 1, or 2**31 // size
    if that is exact. With e = inverse * size - 2**31, the quotient is exact while element * e < 2**31; and
    element < 2 * CHUNK and 0 <= e <= size <= CHUNK.
    """
    index = offset + tl.arange(0, tile // group) * group
    # Lanes outside the piece have no layer, and are given one that exists.
    index = tl.minimum(tl.maximum(index, begin), end - 1)
    element = (index - begin + within).to(tl.uint64)
    return layer + ((element * inverse) >> 31).to(tl.int64)


@jit
def _for_elements(value: tl.tensor, group: tl.constexpr) -> tl.tensor:
    """The value of each group for each of its elements."""
    groups: tl.constexpr = value.shape[0]
    return value[:, None].broadcast_to(groups, group).reshape(groups * group)


@jit
def _load_records(
    each: tl.tensor, layers: tl.tensor, group: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """GRAD_SCALE, STEP_SIZE, DECAY and AHEAD of the elements of groups, by one load for each group."""
    pointer = each + (layers * RECORD)[:, None] + tl.arange(0, RECORD)[None, :]
    even, odd = tl.load(pointer).reshape(layers.shape[0], 2, 2).split()
    scale, shrink = even.split()
    step, forward = odd.split()
    return (
        _for_elements(scale, group),
        _for_elements(step, group),
        _for_elements(shrink, group),
        _for_elements(forward, group),
    )


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
    sharded_largest: tl.tensor,
    sharded_active: tl.tensor,
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
    sharded: tl.constexpr,
    group: tl.constexpr,
    tile: tl.constexpr,
    aligned: tl.constexpr,
    masked: tl.constexpr,
) -> None:
    """Update the elements of a tile, in the order of ``reference.elements.update``.

    No multiply-add is fused: see ``elements.LAUNCH``.

    ``moves``: whether the layer of each group is active. ``aligned``: addresses are aligned, all positions
    have the same upper half, and of each eight lanes from a multiple of eight on all are of the piece, or
    none; their columns begin at a multiple of eight, unless each may be of another layer. Unless ``masked``,
    all lanes are of the piece. An element's column is ``column`` + its index, and the lower half of its
    position ``origin`` + its index; ``low``: that of the first element of the chunk.
    """
    index = offset + tl.arange(0, tile)
    mask = (index >= begin) & (index < end) if masked else None
    changed = mask
    active = moves
    if group > 0:
        active = _for_elements(moves, group)
        changed = active & mask if masked else active
    if aligned and masked:
        mask = tl.max_constancy(mask, 8)
    if aligned and changed is not None:
        changed = tl.max_constancy(changed, 1 if group == 1 else 8)
    # Read everything first, so that it is on its way while the random bits are made.
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
        if sharded == FIND:
            tl.atomic_max(sharded_largest, tl.max(magnitudes(kept)))
            tl.atomic_max(sharded_active, tl.max(stepped.to(tl.int32)))
        elif sharded == AGREED:
            magnitude = tl.load(sharded_largest)
            touched = block - offset // BLOCK < tl.load(sharded_active)  # the first block, the only one
        if sharded != FIND:
            store_blocks(
                exp_avg, exp_avg_scale, block, kept, bits >> 16, touched, magnitude, largest, codes_aligned
            )
    elif exp_avg_type is not None:
        moment_bits = None if exp_avg_type == tl.float32 else bits >> 16
        store_elements(exp_avg, index, moment, moment_bits, changed, exp_avg_type, aligned, live, old)
    if sharded != FIND:
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
    sharded_blocks: tl.tensor,
    sharded_count: tl.tensor,
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
    sharded: tl.constexpr,
    group: tl.constexpr,
    aligned: tl.constexpr,
    whole: tl.constexpr,
    chunk: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Change the first moment and the weights of the active layers, in place.

    ``gradients``: the address of each. ``each``, ``groups`` (the options), ``active``, ``key`` and the roots
    are those of ``shards.Coefficients``, numbers float32; the roots may be None where they are not needed.
    ``divided``: what is divided by the root of a factored second moment: "term", what is added to the first
    moment, or "change", what is taken from the weight; None where it is not factored. ``sharded``: FIND or
    AGREED for elements of sharded blocks, else None. ``group``: so many consecutive elements are of one
    layer; 0: all of a chunk are; or IN_TURN. ``whole``: each tile has ``tile`` elements of the piece.
    ``aligned``: see _update_tile; where the first moment is not in blocks, it holds for such tiles only.
    These are known of a launch, and not decided by branches, to save registers.
    """
    # From the end: the cache still has what the first pass read last.
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
        exp_avg = code_address(tl.load(row + EXP_AVG), base, largest)
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
    sharded_largest, sharded_active = None, None
    if sharded is not None:
        sharded_largest = sharded_blocks + tl.load(row + SHARDED)
        sharded_active = sharded_largest + sharded_count
    layers = 1
    if group == IN_TURN:
        layers = ((within + (end - begin) - 1) // size + 1).to(tl.int32)
    if group > 0:
        # A layer larger than a chunk ends in it at most once: so the size of a chunk will do for its size.
        most = tl.minimum(size, chunk).to(tl.int32)
        inverse = (0x7FFFFFFF // most).to(tl.uint64) + 1
        passed = most - tl.minimum(size - within, most).to(tl.int32)
    for nth in range(0, layers):
        # Elements start..stop: those of one layer after another, or all.
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
                    of_layers = _layer_of_groups(offset, begin, end, layer, passed, inverse, group, tile)
                    moves = tl.load(active + of_layers)
                    hashed = _for_elements(tl.load(key + of_layers).to(tl.uint32, bitcast=True), group)
                    scale, step, shrink, forward = _load_records(each, of_layers, group)
                    of_row = None
                    if divided is not None:
                        of_row = _for_elements(tl.load(row_root + of_layers), group)
                        place = column - _for_elements((of_layers - layer) * size, group)
                # Each call has all arguments: Triton has no structures, and 3.2 no tuples to be relied on.
                if whole or largest > 0 or not aligned:
                    _update_tile(
                        param, grad, exp_avg, exp_avg_scale, offset, start, stop, moves, hashed, origin, low,
                        high, next_high, scale, step, shrink, forward, of_row, column_root, place,
                        sharded_largest, sharded_active, beta1, beta3, weight_decay, eps, param_type,
                        grad_type, exp_avg_type, largest, codes_aligned, rounds_weights, inside, outside,
                        nesterov, divided, sharded, group, tile, aligned, not whole,
                    )  # fmt: skip
                elif (offset >= start) & (offset + tile <= stop):
                    _update_tile(
                        param, grad, exp_avg, exp_avg_scale, offset, start, stop, moves, hashed, origin, low,
                        high, next_high, scale, step, shrink, forward, of_row, column_root, place,
                        sharded_largest, sharded_active, beta1, beta3, weight_decay, eps, param_type,
                        grad_type, exp_avg_type, largest, codes_aligned, rounds_weights, inside, outside,
                        nesterov, divided, sharded, group, tile, True, False,
                    )  # fmt: skip
                else:
                    _update_tile(
                        param, grad, exp_avg, exp_avg_scale, offset, start, stop, moves, hashed, origin, low,
                        high, next_high, scale, step, shrink, forward, of_row, column_root, place,
                        sharded_largest, sharded_active, beta1, beta3, weight_decay, eps, param_type,
                        grad_type, exp_avg_type, largest, codes_aligned, rounds_weights, inside, outside,
                        nesterov, divided, sharded, group, tile, False, True,
                    )  # fmt: skip
