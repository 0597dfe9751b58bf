"""The second moments of a step, in Triton, and what the update needs to know of each layer."""

from __future__ import annotations

import triton.language as tl

from novoscale.kernels.triton.formats import jit, scramble
from novoscale.kernels.triton.formulas import (
    BETA1,
    BETA2,
    BIAS_CORRECTION,
    CLIP_THRESHOLD,
    COUNT,
    EPS,
    FIRST,
    FIRST_COLUMN,
    FRESH,
    GROUP,
    INSIDE,
    KEPT,
    LARGEST,
    LAYERS,
    LEAST_SCALE,
    LR,
    NESTEROV,
    NORM_TYPE,
    NUMBER,
    NUMEL,
    OF_COLUMNS,
    ONCE,
    OPTIONS,
    RECORD,
    RELATIVE,
    RMS,
    ROUNDS,
    SCATTERED,
    SEED,
    SIGN,
    STEPS,
    WEIGHT_DECAY,
    WEIGHTS,
    WIDTH,
    V,
    as_float32,
    averaged,
    bits_of,
    clip_of,
    each_of,
    inverse_of,
    power_of,
    powers,
)


@jit
def mean_square(
    parameters: tl.tensor,
    param_groups: tl.tensor,
    statistic: tl.tensor,
    share: tl.tensor,
    active: tl.tensor,
    total: tl.tensor,
    result: tl.tensor,
    clips: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """The mean of squares of the normalised gradient of a parameter, this rank's part: a program for each."""
    row = parameters + tl.program_id(0) * RECORD
    o = param_groups + tl.load(row + GROUP) * OPTIONS
    mean = tl.full((), 0.0, tl.float64)
    if tl.load(o + CLIP_THRESHOLD) > 0:
        clip = power_of(clip_of(param_groups, tl.load(total), clips), tl.load(o + NORM_TYPE))
        first = tl.load(row + FIRST)
        here = tl.load(row + COUNT).to(tl.int32)
        v = as_float32(tl.load(row + V))
        steps = as_float32(tl.load(row + STEPS))
        once = tl.load(row + ONCE) > 0
        divided = (tl.load(row + WIDTH) > 0) | (tl.load(o + RMS) == 0)
        numel = tl.where(divided, tl.load(row + NUMEL), 1).to(tl.float64)
        added = tl.zeros([tile], tl.float64)
        for offset in range(0, here, tile):
            nth = offset + tl.arange(0, tile)
            mask = nth < here
            mask = mask & (tl.load(active + first + nth, mask=mask, other=0) != 0)
            S = tl.load(statistic + first + nth, mask=mask, other=0.0) * clip
            square = S / numel / tl.load(v + nth, mask=mask, other=1.0).to(tl.float64)
            if tl.load(o + BIAS_CORRECTION) > 0:
                t = tl.load(steps + tl.where(once, 0, nth), mask=mask, other=1.0).to(tl.int32)
                square = square * (1.0 - powers(tl.load(o + BETA2), t))
            if tl.load(row + SCATTERED) > 0:
                square = square * tl.load(share + first + nth, mask=mask, other=0.0)
            added += tl.where(mask, square, 0.0)
        mean = tl.sum(added, 0) / tl.load(row + LAYERS).to(tl.float64)
    tl.store(result + tl.program_id(0), mean)


@jit
def _update_scale(
    row: tl.tensor,
    o: tl.tensor,
    numbers: tl.tensor,
    parameter_count: tl.tensor,
    mean_square: tl.tensor,
    clipped: tl.constexpr,
    relative: tl.constexpr,
) -> tl.tensor:
    """What the update of a parameter is multiplied by; ``numbers``: address of the first of its numbers."""
    result = tl.full((), 1.0, tl.float64)
    if clipped:
        threshold = tl.load(o + CLIP_THRESHOLD)
        above = tl.sqrt(tl.load(mean_square)) / tl.where(threshold > 0, threshold, 1.0)
        result = tl.where(threshold > 0, 1.0 / tl.where(above < 1.0, 1.0, above), result)
    if relative:
        elements = (tl.load(row + LAYERS) * tl.load(row + NUMEL)).to(tl.float64)
        rms = tl.sqrt(tl.load(numbers + WEIGHTS * parameter_count) / elements)
        least = tl.full((), LEAST_SCALE, tl.float64)
        rms = tl.where(rms < least, least, rms)
        result = tl.where(tl.load(o + RELATIVE) > 0, rms * result, result)
    return result


@jit
def advance(
    stretches: tl.tensor,
    parameters: tl.tensor,
    param_groups: tl.tensor,
    statistic: tl.tensor,
    finite: tl.tensor,
    total: tl.tensor,
    scale: tl.tensor,
    mean_square: tl.tensor,
    norms: tl.tensor,
    bad: tl.tensor,
    each: tl.tensor,
    row_root: tl.tensor,
    column_root: tl.tensor,
    active: tl.tensor,
    key: tl.tensor,
    layer_count: tl.tensor,
    column_count: tl.tensor,
    parameter_count: tl.tensor,
    averages: tl.constexpr,
    concludes: tl.constexpr,
    verdicts: tl.constexpr,
    clips: tl.constexpr,
    scaled: tl.constexpr,
    clipped: tl.constexpr,
    relative: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """A program has some layers, or columns, of a parameter.

    It averages the statistic into their second moments (``averages``), and says what the update needs to know
    of them (``concludes``).
    """
    row = stretches + tl.program_id(0) * 4
    p = tl.load(row)
    nth = tl.load(row + 1).to(tl.int32) + tl.arange(0, tile)
    mask = nth < tl.load(row + 2).to(tl.int32)
    of_columns = tl.load(row + 3) > 0
    row = parameters + p * RECORD
    o = param_groups + tl.load(row + GROUP) * OPTIONS
    norm_type = tl.load(o + NORM_TYPE)
    stepped = each_of(tl.load(finite + p) if verdicts else tl.load(finite), nth)
    factor = clip_of(param_groups, tl.load(total), clips)
    clip = power_of(factor, norm_type)
    numel = tl.load(row + NUMEL).to(tl.float64)
    factored = tl.load(row + WIDTH) > 0
    if of_columns:
        place = as_float32(tl.load(row + OF_COLUMNS)) + nth
        first = tl.load(row + FIRST_COLUMN)
        c = tl.load(place, mask=mask, other=0.0)
        if averages:
            S = tl.load(statistic + layer_count + first + nth, mask=mask, other=0.0) * clip
            c = tl.where(stepped, averaged(c, S / tl.load(row + LAYERS).to(tl.float64), o), c)
            tl.store(place, c, mask=mask)
        if concludes and column_root is not None:
            tl.store(column_root + first + nth, tl.sqrt(c.to(tl.float64)).to(tl.float32), mask=mask)
    else:
        place = as_float32(tl.load(row + V)) + nth
        layer = tl.load(row + FIRST) + nth
        v = tl.load(place, mask=mask, other=0.0)
        once = tl.load(row + ONCE)
        counted = mask & each_of(tl.load(row + STEPS) != 0, nth)
        count = as_float32(tl.load(row + STEPS)) + tl.where(once > 0, 0, nth)
        steps = tl.load(count, mask=counted, other=0.0)
        if averages:
            S = tl.load(statistic + layer, mask=mask, other=0.0)
            if norms is not None:
                tl.store(norms + layer, S, mask=mask)
                tl.store(bad + layer, bits_of(S) > LARGEST, mask=mask & (stepped == 0))
            S = S * clip
            S = tl.where(factored, S / numel, S)
            v = tl.where(stepped, averaged(v, S, o), v)
            tl.store(place, v, mask=mask)
            moves = stepped & (v > 0)
            tl.store(active + layer, moves, mask=mask)
            steps = tl.where(once > 0, steps, steps + moves.to(tl.float32))
            tl.store(count, steps, mask=counted & each_of(once == 0, nth))
        if concludes:
            numbers = statistic + layer_count + column_count + p
            divisor = tl.where(tl.load(o + RMS) > 0, numel, 1.0)
            if factored:
                of_step = tl.load(numbers + FRESH * parameter_count) * clip
                kept = tl.load(numbers + KEPT * parameter_count)
                divisor = (of_step / numel + kept) / tl.load(row + LAYERS).to(tl.float64)
            root = v.to(tl.float64) / divisor
            root = tl.where(norm_type == 2, tl.sqrt(root), root)
            lr = tl.load(o + LR)
            beta1 = tl.load(o + BETA1)
            step_size = tl.zeros([tile], tl.float64) + lr
            ahead = tl.zeros([tile], tl.float64) + lr * beta1
            if tl.load(o + BIAS_CORRECTION) > 0:
                t = tl.maximum(steps.to(tl.int32), 1)
                decayed = powers(beta1, t)
                root = root / tl.sqrt(1.0 - powers(tl.load(o + BETA2), t))
                step_size = lr / (1.0 - decayed)
                ahead = lr * beta1 / (1.0 - decayed * beta1)
            inverse = tl.where(factored, 1.0, 1.0 / (root + tl.load(o + EPS)))
            of_update = _update_scale(
                row, o, numbers, parameter_count, mean_square + p if clipped else None, clipped, relative
            )
            grad_scale = tl.load(o + SIGN) * (factor * inverse_of(scale, scaled)) * of_update
            inside = tl.load(o + INSIDE) > 0
            of_moment = tl.where(inside, 1.0, inverse)
            record = each + layer * 4
            grad_scale = tl.where(inside, grad_scale * inverse, grad_scale)
            nesterov = tl.load(o + NESTEROV) > 0
            tl.store(record, grad_scale.to(tl.float32), mask=mask)
            tl.store(record + 1, (step_size * of_moment).to(tl.float32), mask=mask)
            decay = (lr * tl.load(o + WEIGHT_DECAY)).to(tl.float32)
            tl.store(record + 2, tl.zeros([tile], tl.float32) + decay, mask=mask)
            tl.store(record + 3, tl.where(nesterov, ahead * of_moment, 0.0).to(tl.float32), mask=mask)
            if row_root is not None:
                tl.store(row_root + layer, root.to(tl.float32), mask=mask)
            start = scramble(tl.load(o + SEED).to(tl.int64).to(tl.uint32))
            start = scramble(start ^ tl.load(row + NUMBER).to(tl.uint32))
            hashed = scramble(start ^ steps.to(tl.int64).to(tl.uint32)).to(tl.int32, bitcast=True)
            tl.store(key + layer, tl.where(tl.load(row + ROUNDS) > 0, hashed, 0), mask=mask)
