"""The pass over the layers in Triton: a few launches for any number of layers and param groups.

``reference_layers`` is the definition. The state is known by its addresses. What the ranks tell each other is
packed and unpacked here too, if it is one collective: see ``collectives.Plan``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from novoscale.collectives import FLOAT32_MAX, Noted, Packing
from novoscale.kernels import layers, reference_layers
from novoscale.kernels.layers import LayerTable, OptionTable
from novoscale.kernels.shards import Coefficients
from novoscale.kernels.triton_formats import jit, scramble

TILE = 1024  # layers that a program does at once
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}

LR = tl.constexpr(layers.LR)
BETA1 = tl.constexpr(layers.BETA1)
BETA2 = tl.constexpr(layers.BETA2)
WEIGHT_DECAY = tl.constexpr(layers.WEIGHT_DECAY)
EPS = tl.constexpr(layers.EPS)
CLIP_THRESHOLD = tl.constexpr(layers.CLIP_THRESHOLD)
SIGN = tl.constexpr(layers.SIGN)
NORM_TYPE = tl.constexpr(layers.NORM_TYPE)
BIAS_CORRECTION = tl.constexpr(layers.BIAS_CORRECTION)
INIT_ZERO = tl.constexpr(layers.INIT_ZERO)
RMS = tl.constexpr(layers.RMS)
NESTEROV = tl.constexpr(layers.NESTEROV)
INSIDE = tl.constexpr(layers.INSIDE)
RELATIVE = tl.constexpr(layers.RELATIVE)
SEED = tl.constexpr(layers.SEED)
LIMIT = tl.constexpr(layers.LIMIT)
OPTIONS = tl.constexpr(layers.OPTIONS)

GROUP = tl.constexpr(layers.GROUP)
FIRST = tl.constexpr(layers.FIRST)
COUNT = tl.constexpr(layers.COUNT)
FIRST_COLUMN = tl.constexpr(layers.FIRST_COLUMN)
WIDTH = tl.constexpr(layers.WIDTH)
NUMEL = tl.constexpr(layers.NUMEL)
LAYERS = tl.constexpr(layers.LAYERS)
NUMBER = tl.constexpr(layers.NUMBER)
ONCE = tl.constexpr(layers.ONCE)
ROUNDS = tl.constexpr(layers.ROUNDS)
SCATTERED = tl.constexpr(layers.SCATTERED)
V = tl.constexpr(layers.V)
OF_COLUMNS = tl.constexpr(layers.OF_COLUMNS)
STEPS = tl.constexpr(layers.STEPS)
RECORD = tl.constexpr(layers.RECORD)

FRESH = tl.constexpr(layers.FRESH)
KEPT = tl.constexpr(layers.KEPT)
WEIGHTS = tl.constexpr(layers.WEIGHTS)
LEAST_SCALE = tl.constexpr(layers.LEAST_SCALE)
# As _bits: above it are infinity and NaN.
LARGEST = tl.constexpr(struct.unpack("<q", struct.pack("<d", FLOAT32_MAX))[0])


# ---- arithmetic ------------------------------------------------------------------------------------------


@jit
def _float32(address: tl.tensor) -> tl.tensor:
    return address.to(tl.pointer_type(tl.float32))


@jit
def _power_of(factor: tl.tensor, norm_type: tl.tensor) -> tl.tensor:
    """What multiplies a statistic where the gradients are multiplied by a factor."""
    return tl.where(norm_type == 2, factor * factor, factor)


@jit
def _inverse(scale: tl.tensor, scaled: tl.constexpr) -> tl.tensor:
    one = tl.full((), 1.0, tl.float64)
    if scaled:
        one = one / tl.load(scale).to(tl.float64)
    return one


@jit
def _clip(param_groups: tl.tensor, total: tl.tensor, clips: tl.constexpr) -> tl.tensor:
    """What clipping the norm of the whole gradient multiplies it by."""
    factor = tl.full((), 1.0, tl.float64)
    if clips:
        norm = tl.sqrt(total) + tl.full((), 1e-6, tl.float64)
        factor = tl.load(param_groups + LIMIT) / norm
        factor = tl.where(factor > 1.0, 1.0, factor)
    return factor


@jit
def _powers(base: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    """See ``reference_layers.powers``; the exponent is int32."""
    result = tl.zeros_like(exponent).to(tl.float64) + 1.0
    for _ in range(25):
        result = tl.where((exponent & 1) > 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@jit
def _each(number: tl.tensor, nth: tl.tensor) -> tl.tensor:
    """Whether a number is not 0, of each lane: Triton's interpreter cannot spread what a comparison gave."""
    return tl.zeros_like(nth) + number.to(tl.int32) != 0


@jit
def _fresh(v: tl.tensor, S: tl.tensor, o: tl.tensor) -> tl.tensor:
    first = tl.where(tl.load(o + INIT_ZERO) > 0, v < 0, v == 0)
    return tl.where(first, S, (1.0 - tl.load(o + BETA2)) * S)


@jit
def _averaged(v: tl.tensor, S: tl.tensor, o: tl.tensor) -> tl.tensor:
    return (tl.load(o + BETA2) * v.to(tl.float64) + _fresh(v, S, o)).to(tl.float32)


@jit
def _bits(value: tl.tensor) -> tl.tensor:
    """Of numbers that are not negative, as integers in the same order; NaN, of either sign, above all."""
    return tl.abs(value).to(tl.int64, bitcast=True)


# ---- before and after the collective ---------------------------------------------------------------------


@jit
def _settled(
    statistic: tl.tensor,
    index: tl.tensor,
    mask: tl.tensor,
    buffer: tl.tensor,
    slots: tl.tensor,
    cut: tl.constexpr,
) -> tl.tensor:
    """Numbers of the vector of the step; those that were reduced are put there from the buffer."""
    value = tl.load(statistic + index, mask=mask)
    if cut:
        slot = tl.load(slots + index, mask=mask)
        reduced = slot >= 0
        if mask is not None:
            reduced = reduced & mask
        value = tl.where(reduced, tl.load(buffer + slot, mask=reduced, other=0.0), value)
        tl.store(statistic + index, value, mask=mask)
    if mask is not None:
        value = tl.where(mask, value, 0.0)
    return value


@jit
def begin(
    parameters: tl.tensor,
    param_groups: tl.tensor,
    statistic: tl.tensor,
    sums: tl.tensor,
    largest: tl.tensor,
    share: tl.tensor,
    scale: tl.tensor,
    buffer: tl.tensor,
    slots: tl.tensor,
    layer_count: tl.tensor,
    column_count: tl.tensor,
    numbers: tl.constexpr,
    scaled: tl.constexpr,
    cut: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Of each parameter, a program: the sum of its layers' statistics, and the largest of all its numbers.

    Before the collective (not ``cut``) the statistic is divided by a loss scale, and FRESH and KEPT are added
    up; after it what was reduced is put in its place.
    """
    count = tl.num_programs(0)
    p = tl.program_id(0)
    row = parameters + p * RECORD
    o = param_groups + tl.load(row + GROUP) * OPTIONS
    factor = _power_of(_inverse(scale, scaled), tl.load(o + NORM_TYPE))
    first = tl.load(row + FIRST)
    here = tl.load(row + COUNT).to(tl.int32)
    v = _float32(tl.load(row + V))
    total = tl.zeros([tile], tl.float64)
    fresh = tl.zeros([tile], tl.float64)
    kept = tl.zeros([tile], tl.float64)
    most = tl.zeros([tile], tl.int64)
    for offset in range(0, here, tile):
        nth = offset + tl.arange(0, tile)
        mask = nth < here
        S = _settled(statistic, first + nth, mask, buffer, slots, cut)
        if scaled:
            S = S * factor
            tl.store(statistic + first + nth, S, mask=mask)
        total += S
        most = tl.maximum(most, _bits(S))
        if numbers > 0 and not cut:
            old = tl.load(v + nth, mask=mask, other=0.0)
            fresh += _fresh(old, S, o)
            kept += tl.load(share + first + nth, mask=mask, other=0.0) * old.to(tl.float64)
    first = layer_count + tl.load(row + FIRST_COLUMN)
    width = tl.load(row + WIDTH).to(tl.int32)
    for offset in range(0, width, tile):
        nth = offset + tl.arange(0, tile)
        mask = nth < width
        S = _settled(statistic, first + nth, mask, buffer, slots, cut)
        if scaled:
            S = S * factor
            tl.store(statistic + first + nth, S, mask=mask)
        most = tl.maximum(most, _bits(S))
    highest = tl.max(most, 0)
    if numbers > 0:
        number = layer_count + column_count + p
        if cut:
            of_step = _settled(statistic, number + FRESH * count, None, buffer, slots, cut)
            remains = _settled(statistic, number + KEPT * count, None, buffer, slots, cut)
        else:
            of_step, remains = tl.sum(fresh, 0), tl.load(o + BETA2) * tl.sum(kept, 0)
            tl.store(statistic + number + FRESH * count, of_step)
            tl.store(statistic + number + KEPT * count, remains)
        weights = _settled(statistic, number + WEIGHTS * count, None, buffer, slots, cut)
        highest = tl.maximum(highest, _bits(of_step))
        highest = tl.maximum(highest, tl.maximum(_bits(remains), _bits(weights)))
    tl.store(sums + p, tl.sum(total, 0))
    tl.store(largest + p, highest)


@jit
def pack(
    sources: tl.tensor,
    statistic: tl.tensor,
    buffer: tl.tensor,
    sums: tl.tensor,
    largest: tl.tensor,
    sum_of: tl.tensor,
    veto: tl.tensor,
    length: tl.tensor,
    parameter_count: tl.tensor,
    scattered: tl.constexpr,
    vetoed: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """What this rank gives to the collective: see ``collectives.Packing``. Its end is the last program's."""
    program = tl.program_id(0)
    if program < tl.num_programs(0) - 1:
        slot = program * tile + tl.arange(0, tile)
        mask = slot < length
        source = tl.load(sources + slot, mask=mask, other=-1)
        value = tl.load(statistic + source, mask=mask & (source >= 0), other=0.0)
        # MAX need not carry a NaN from one rank to the others; infinity does, and in a sum too.
        tl.store(buffer + slot, tl.where(value == value, value, float("inf")), mask=mask)
    else:
        most = tl.zeros([tile], tl.int64)
        for offset in range(0, parameter_count, tile):
            nth = offset + tl.arange(0, tile)
            most = tl.maximum(most, tl.load(largest + nth, mask=nth < parameter_count, other=0))
        bad = tl.max(most, 0) > LARGEST
        if vetoed:
            bad = bad | (tl.load(veto).to(tl.int32) != 0)
        tl.store(buffer + length, bad.to(tl.float64))
        for which in range(scattered):
            total = tl.zeros([tile], tl.float64)
            for offset in range(0, parameter_count, tile):
                nth = offset + tl.arange(0, tile)
                mask = nth < parameter_count
                counted = tl.load(sum_of + nth, mask=mask, other=0) == which + 1
                total += tl.where(counted, tl.load(sums + nth, mask=mask, other=0.0), 0.0)
            tl.store(buffer + length + 1 + which, tl.sum(total, 0))


@jit
def _count_steps(
    parameters: tl.tensor,
    param_groups: tl.tensor,
    statistic: tl.tensor,
    total: tl.tensor,
    stepped: tl.tensor,
    first_number: tl.tensor,
    parameter_count: tl.tensor,
    clips: tl.constexpr,
    verdicts: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """``stepped``: whether there is a step; with ``verdicts`` where that is said of each parameter."""
    clip = _clip(param_groups, total, clips)
    for offset in range(0, parameter_count, tile):
        nth = offset + tl.arange(0, tile)
        row = parameters + nth * RECORD
        mask = nth < parameter_count
        norm_type = tl.load(param_groups + tl.load(row + GROUP, mask=mask, other=0) * OPTIONS + NORM_TYPE)
        number = statistic + first_number + nth
        of_step = tl.load(number + FRESH * parameter_count, mask=mask, other=0.0)
        kept = tl.load(number + KEPT * parameter_count, mask=mask, other=0.0)
        steps = tl.load(row + STEPS, mask=mask, other=0)
        moves = mask & (tl.load(row + ONCE, mask=mask, other=0) > 0) & (steps != 0)
        moves = moves & (of_step * _power_of(clip, norm_type) + kept > 0)
        if verdicts:
            moves = moves & (tl.load(stepped + nth, mask=moves, other=0) != 0)
        if not verdicts:
            moves = moves & _each(stepped, nth)
        tl.store(_float32(steps), tl.load(_float32(steps), mask=moves, other=0.0) + 1.0, mask=moves)


@triton.jit(do_not_specialize=["step"])
def verdict(
    parameters: tl.tensor,
    param_groups: tl.tensor,
    statistic: tl.tensor,
    sums: tl.tensor,
    largest: tl.tensor,
    sum_of: tl.tensor,
    buffer: tl.tensor,
    veto: tl.tensor,
    total: tl.tensor,
    finite: tl.tensor,
    skipped: tl.tensor,
    bad_at: tl.tensor,
    step: tl.tensor,
    first_number: tl.tensor,
    length: tl.tensor,
    parameter_count: tl.tensor,
    counted: tl.constexpr,
    scattered: tl.constexpr,
    vetoed: tl.constexpr,
    clips: tl.constexpr,
    cut: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """One program: whether there is a step, and the sum over the layers of the model; and it is noted.

    ``counted``: there are counts of steps that all layers of a parameter have in common: they go on here.
    """
    added = tl.zeros([tile], tl.float64)
    most = tl.zeros([tile], tl.int64)
    for offset in range(0, parameter_count, tile):
        nth = offset + tl.arange(0, tile)
        mask = nth < parameter_count
        part = tl.load(sums + nth, mask=mask, other=0.0)
        if cut:
            part = tl.where(tl.load(sum_of + nth, mask=mask, other=0) == 0, part, 0.0)
        added += part
        most = tl.maximum(most, tl.load(largest + nth, mask=mask, other=0))
    whole = tl.sum(added, 0)
    bad = tl.max(most, 0) > LARGEST
    if cut:
        bad = bad | (tl.load(buffer + length) > 0)
        for which in range(scattered):
            whole += tl.load(buffer + length + 1 + which)
    if vetoed:
        bad = bad | (tl.load(veto).to(tl.int32) != 0)
    tl.store(total, whole)
    tl.store(finite, bad == 0)
    tl.store(skipped, tl.load(skipped) + bad.to(tl.int64))
    if bad:
        tl.store(bad_at, step)
    if counted:
        _count_steps(
            parameters,
            param_groups,
            statistic,
            whole,
            bad == 0,
            first_number,
            parameter_count,
            clips,
            False,
            tile,
        )


@jit
def count(
    parameters: tl.tensor,
    param_groups: tl.tensor,
    statistic: tl.tensor,
    total: tl.tensor,
    finite: tl.tensor,
    first_number: tl.tensor,
    parameter_count: tl.tensor,
    clips: tl.constexpr,
    verdicts: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """One program: the counts of steps that all layers of a parameter have in common go on."""
    stepped = finite if verdicts else tl.load(finite) != 0
    whole = tl.load(total)
    _count_steps(
        parameters,
        param_groups,
        statistic,
        whole,
        stepped,
        first_number,
        parameter_count,
        clips,
        verdicts,
        tile,
    )


# ---- the layers ------------------------------------------------------------------------------------------


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
    """Of the normalised gradient of each parameter, a program, the mean of squares: this rank's part."""
    row = parameters + tl.program_id(0) * RECORD
    o = param_groups + tl.load(row + GROUP) * OPTIONS
    mean = tl.full((), 0.0, tl.float64)
    if tl.load(o + CLIP_THRESHOLD) > 0:
        clip = _power_of(_clip(param_groups, tl.load(total), clips), tl.load(o + NORM_TYPE))
        first = tl.load(row + FIRST)
        here = tl.load(row + COUNT).to(tl.int32)
        v = _float32(tl.load(row + V))
        steps = _float32(tl.load(row + STEPS))
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
                square = square * (1.0 - _powers(tl.load(o + BETA2), t))
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
    """What the update of a parameter is multiplied by; ``numbers``: its first one."""
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
    """Some layers, or columns, of a parameter: their second moments (``averages``), and what the update needs
    to know (``concludes``)."""
    row = stretches + tl.program_id(0) * 4
    p = tl.load(row)
    nth = tl.load(row + 1).to(tl.int32) + tl.arange(0, tile)
    mask = nth < tl.load(row + 2).to(tl.int32)
    of_columns = tl.load(row + 3) > 0
    row = parameters + p * RECORD
    o = param_groups + tl.load(row + GROUP) * OPTIONS
    norm_type = tl.load(o + NORM_TYPE)
    stepped = _each(tl.load(finite + p) if verdicts else tl.load(finite), nth)
    factor = _clip(param_groups, tl.load(total), clips)
    clip = _power_of(factor, norm_type)
    numel = tl.load(row + NUMEL).to(tl.float64)
    factored = tl.load(row + WIDTH) > 0
    if of_columns:
        place = _float32(tl.load(row + OF_COLUMNS)) + nth
        first = tl.load(row + FIRST_COLUMN)
        c = tl.load(place, mask=mask, other=0.0)
        if averages:
            S = tl.load(statistic + layer_count + first + nth, mask=mask, other=0.0) * clip
            c = tl.where(stepped, _averaged(c, S / tl.load(row + LAYERS).to(tl.float64), o), c)
            tl.store(place, c, mask=mask)
        if concludes and column_root is not None:
            tl.store(column_root + first + nth, tl.sqrt(c.to(tl.float64)).to(tl.float32), mask=mask)
    else:
        place = _float32(tl.load(row + V)) + nth
        layer = tl.load(row + FIRST) + nth
        v = tl.load(place, mask=mask, other=0.0)
        once = tl.load(row + ONCE)
        counted = mask & _each(tl.load(row + STEPS) != 0, nth)
        count = _float32(tl.load(row + STEPS)) + tl.where(once > 0, 0, nth)
        steps = tl.load(count, mask=counted, other=0.0)
        if averages:
            S = tl.load(statistic + layer, mask=mask, other=0.0)
            if norms is not None:
                tl.store(norms + layer, S, mask=mask)
                tl.store(bad + layer, _bits(S) > LARGEST, mask=mask & (stepped == 0))
            S = S * clip
            S = tl.where(factored, S / numel, S)
            v = tl.where(stepped, _averaged(v, S, o), v)
            tl.store(place, v, mask=mask)
            moves = stepped & (v > 0)
            tl.store(active + layer, moves, mask=mask)
            steps = tl.where(once > 0, steps, steps + moves.to(tl.float32))
            tl.store(count, steps, mask=counted & _each(once == 0, nth))
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
                decayed = _powers(beta1, t)
                root = root / tl.sqrt(1.0 - _powers(tl.load(o + BETA2), t))
                step_size = lr / (1.0 - decayed)
                ahead = lr * beta1 / (1.0 - decayed * beta1)
            inverse = tl.where(factored, 1.0, 1.0 / (root + tl.load(o + EPS)))
            of_update = _update_scale(
                row, o, numbers, parameter_count, mean_square + p if clipped else None, clipped, relative
            )
            grad_scale = tl.load(o + SIGN) * (factor * _inverse(scale, scaled)) * of_update
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


class LayerKernels(reference_layers.LayerKernels):
    """See ``reference_layers.LayerKernels``. Holds addresses of the states, and keeps no tensor alive.

    Args:
        known: the layers.
        device: where everything is.
    """

    completes = True

    def __init__(self, known: LayerTable, device: torch.device) -> None:
        self._table, self._device = known, device
        self._parameters, self._stretches = (t.to(device) for t in (known.records, known.stretches(TILE)))
        self._share = None if known.share is None else known.share.to(device)
        self._count, self._sizes = len(known.records), (known.layers, known.columns)
        self._sums = torch.empty(self._count, dtype=torch.float64, device=device)
        self._largest = torch.empty(self._count, dtype=torch.int64, device=device)
        self._index = self._sums.get_device()
        once = (known.records[:, layers.ONCE] > 0) & (known.records[:, layers.STEPS] != 0)
        self._counts_once, self._clips = bool(once.any()), "max_grad_norm" in known.uses
        self._noted: Noted | None = None

    def hold(self, states: Callable[[], reference_layers.States]) -> None:
        """Nothing is held: the addresses are known."""

    def release(self) -> None:
        """Nothing is held."""

    def begin(self, options: OptionTable, statistic: Tensor, scale: Tensor | None) -> None:
        """See ``reference_layers.LayerKernels.begin``."""
        self._begin(options, statistic, scale)

    def _begin(
        self,
        options: OptionTable,
        statistic: Tensor,
        scale: Tensor | None = None,
        buffer: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> None:
        with torch.cuda.device(self._index):  # nothing where it is -1, the CPU's
            begin[(self._count,)](
                self._parameters, options.table, statistic, self._sums, self._largest, self._share, scale,
                buffer, slots, *self._sizes, numbers=layers.SUMS if self._table.sums else 0,
                scaled=scale is not None, cut=buffer is not None, tile=TILE, **LAUNCH,
            )  # fmt: skip

    def complete(
        self,
        options: OptionTable,
        statistic: Tensor,
        veto: Tensor | None,
        packing: Packing | None,
        noted: Noted,
        skipped: Tensor,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        """What ``collectives.Plan.complete`` and ``record`` do, where there is one collective or none.

        Args:
            options: of the param groups.
            statistic: the vector of the step: this rank's part; changed in place.
            veto: see ``collectives.Plan.complete``.
            packing: what the collective needs; None where there is none.
            noted: where :meth:`advance` writes what the step shows of each layer.
            skipped: int64, 0-dim: how many steps were skipped.
            step: the number of the step.

        Returns:
            See ``collectives.Plan.complete``.
        """
        self._noted, buffer, sum_of = noted, None, None
        sums, length = 0, 0
        if packing is not None:
            buffer = self._packed(packing, statistic, veto)
            sum_of, sums, length, veto = packing.sum_of, packing.sums, packing.length, None
            self._begin(options, statistic, None, buffer, packing.slots)
        total = torch.empty((), dtype=torch.float64, device=self._device)
        finite = torch.empty((), dtype=torch.bool, device=self._device)
        with torch.cuda.device(self._index):
            verdict[(1,)](
                self._parameters, options.table, statistic, self._sums, self._largest, sum_of, buffer, veto,
                total, finite, skipped, noted.bad_at, step, sum(self._sizes), length, self._count,
                counted=self._counts_once, scattered=sums, vetoed=veto is not None, clips=self._clips,
                cut=buffer is not None, tile=TILE, **LAUNCH,
            )  # fmt: skip
        return finite, total

    def _packed(self, packing: Packing, statistic: Tensor, veto: Tensor | None) -> Tensor:
        """The buffer of the collective, complete."""
        length = packing.length
        buffer = torch.empty(length + 1 + packing.sums, dtype=torch.float64, device=self._device)
        with torch.cuda.device(self._index):
            pack[(triton.cdiv(length, TILE) + 1,)](
                packing.sources, statistic, buffer, self._sums, self._largest, packing.sum_of, veto, length,
                self._count, scattered=packing.sums, vetoed=veto is not None, tile=TILE, **LAUNCH,
            )  # fmt: skip
        return packing.all_reduce(buffer)

    def advance(
        self,
        options: OptionTable,
        statistic: Tensor,
        finite: Tensor,
        total: Tensor,
        scale: Tensor | None,
        share: Callable[[Tensor], Tensor],
    ) -> Coefficients:
        """See ``reference_layers.LayerKernels.advance``."""
        made = reference_layers.room(self._table, options)
        verdicts, first = finite.ndim > 0, sum(self._sizes)
        if self._counts_once and self._noted is None:  # else it is done already
            with torch.cuda.device(self._index):
                count[(1,)](
                    self._parameters, options.table, statistic, total, finite, first, self._count,
                    clips=self._clips, verdicts=verdicts, tile=TILE, **LAUNCH,
                )  # fmt: skip
        given = (options, statistic, finite, total, scale, made)
        if "clip_threshold" in self._table.uses:
            self._advance(*given, averages=True, concludes=False)
            mean = torch.empty(self._count, dtype=torch.float64, device=self._device)
            with torch.cuda.device(self._index):
                mean_square[(self._count,)](
                    self._parameters, options.table, statistic, self._share, made.active, total, mean,
                    clips=self._clips, tile=TILE, **LAUNCH,
                )  # fmt: skip
            self._advance(*given, share(mean), averages=False, concludes=True)
        else:
            self._advance(*given, averages=True, concludes=True)
        self._noted = None
        return made

    def _advance(
        self,
        options: OptionTable,
        statistic: Tensor,
        finite: Tensor,
        total: Tensor,
        scale: Tensor | None,
        made: Coefficients,
        mean: Tensor | None = None,
        *,
        averages: bool,
        concludes: bool,
    ) -> None:
        norms, bad = (None, None) if self._noted is None else (self._noted.statistic, self._noted.bad)
        with torch.cuda.device(self._index):
            advance[(len(self._stretches),)](
                self._stretches, self._parameters, options.table, statistic, finite, total, scale, mean,
                norms, bad, made.each, made.row_root, made.column_root, made.active, made.key,
                *self._sizes, self._count, averages=averages, concludes=concludes,
                verdicts=finite.ndim > 0, clips=self._clips, scaled=scale is not None,
                clipped=mean is not None, relative="scale_parameter" in self._table.uses, tile=TILE, **LAUNCH,
            )  # fmt: skip
