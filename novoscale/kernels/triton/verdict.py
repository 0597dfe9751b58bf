"""Before and after the collective of a step, in Triton: sums over layers, and whether there is a step.

The buffer of the collective is packed and unpacked here too: see ``plan.Packing``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from novoscale.kernels.triton.formats import jit
from novoscale.kernels.triton.formulas import (
    BETA2,
    COUNT,
    FIRST,
    FIRST_COLUMN,
    FRESH,
    GROUP,
    KEPT,
    LARGEST,
    NORM_TYPE,
    ONCE,
    OPTIONS,
    RECORD,
    STEPS,
    WEIGHTS,
    WIDTH,
    V,
    as_float32,
    bits_of,
    clip_of,
    each_of,
    fresh_of,
    inverse_of,
    power_of,
)
from novoscale.sharding import exchange

ALIKE = tl.constexpr(exchange.ALIKE)

# With a type, as jit. Compiled once for all steps, and not anew for 1 and for multiples of 16.
_jit_of_any_step: Callable[[Callable[..., Any]], Any] = triton.jit(do_not_specialize=["step"])


@jit
def _settled(
    statistic: tl.tensor,
    index: tl.tensor,
    mask: tl.tensor,
    buffer: tl.tensor,
    slots: tl.tensor,
    reduced: tl.constexpr,
) -> tl.tensor:
    """Numbers of the vector of the step, into which those that were reduced are copied from the buffer."""
    value = tl.load(statistic + index, mask=mask)
    if reduced:
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
def _begun(
    statistic: tl.tensor,
    index: tl.tensor,
    mask: tl.tensor,
    buffer: tl.tensor,
    slots: tl.tensor,
    factor: tl.tensor,
    scaled: tl.constexpr,
    reduced: tl.constexpr,
) -> tl.tensor:
    """The same, if ``scaled`` multiplied by ``factor``, in the vector too."""
    value = _settled(statistic, index, mask, buffer, slots, reduced)
    if scaled:
        value = value * factor
        tl.store(statistic + index, value, mask=mask)
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
    reduced: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """The sum of the statistics of a parameter's layers, and the largest of all its numbers.

    Each parameter has a program. Before the collective (not ``reduced``) the statistic is divided by a loss
    scale, and FRESH and KEPT are added up; after it what was reduced is copied to its place in the vector.
    """
    count = tl.num_programs(0)
    p = tl.program_id(0)
    row = parameters + p * RECORD
    o = param_groups + tl.load(row + GROUP) * OPTIONS
    factor = power_of(inverse_of(scale, scaled), tl.load(o + NORM_TYPE))
    first = tl.load(row + FIRST)
    here = tl.load(row + COUNT).to(tl.int32)
    v = as_float32(tl.load(row + V))
    total = tl.zeros([tile], tl.float64)
    fresh = tl.zeros([tile], tl.float64)
    kept = tl.zeros([tile], tl.float64)
    most = tl.zeros([tile], tl.int64)
    for offset in range(0, here, tile):
        nth = offset + tl.arange(0, tile)
        mask = nth < here
        S = _begun(statistic, first + nth, mask, buffer, slots, factor, scaled, reduced)
        total += S
        most = tl.maximum(most, bits_of(S))
        if numbers > 0 and not reduced:
            old = tl.load(v + nth, mask=mask, other=0.0)
            fresh += fresh_of(old, S, o)
            kept += tl.load(share + first + nth, mask=mask, other=0.0) * old.to(tl.float64)
    first = layer_count + tl.load(row + FIRST_COLUMN)
    width = tl.load(row + WIDTH).to(tl.int32)
    for offset in range(0, width, tile):
        nth = offset + tl.arange(0, tile)
        mask = nth < width
        S = _begun(statistic, first + nth, mask, buffer, slots, factor, scaled, reduced)
        most = tl.maximum(most, bits_of(S))
    highest = tl.max(most, 0)
    if numbers > 0:
        number = layer_count + column_count + p
        if reduced:
            of_step = _settled(statistic, number + FRESH * count, None, buffer, slots, reduced)
            remains = _settled(statistic, number + KEPT * count, None, buffer, slots, reduced)
        else:
            of_step, remains = tl.sum(fresh, 0), tl.load(o + BETA2) * tl.sum(kept, 0)
            tl.store(statistic + number + FRESH * count, of_step)
            tl.store(statistic + number + KEPT * count, remains)
        weights = _settled(statistic, number + WEIGHTS * count, None, buffer, slots, reduced)
        highest = tl.maximum(highest, bits_of(of_step))
        highest = tl.maximum(highest, tl.maximum(bits_of(remains), bits_of(weights)))
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
    vote: tl.tensor,
    length: tl.tensor,
    parameter_count: tl.tensor,
    vote_count: tl.tensor,
    shared: tl.constexpr,
    scattered: tl.constexpr,
    vetoed: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Write this rank's buffer of the collective, the last program its end: see ``plan.Packing``."""
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
        votes = buffer + length + 1 + scattered
        for offset in range(0, vote_count, tile):
            nth = offset + tl.arange(0, tile)
            mask = nth < vote_count
            tl.store(votes + nth, tl.load(vote + nth, mask=mask, other=0.0), mask=mask)
        if shared:
            _share_norm(votes + vote_count, sums, sum_of, parameter_count, tile)


@jit
def _share_norm(
    norm: tl.tensor, sums: tl.tensor, sum_of: tl.tensor, parameter_count: tl.tensor, tile: tl.constexpr
) -> None:
    """Write what this rank's plain tensors add to the norm of the model: see ``exchange.Exchange``."""
    plain = tl.zeros([tile], tl.float64)
    for offset in range(0, parameter_count, tile):
        nth = offset + tl.arange(0, tile)
        mask = nth < parameter_count
        alone = tl.load(sum_of + nth, mask=mask, other=0) == -1
        plain += tl.where(alone, tl.load(sums + nth, mask=mask, other=0.0), 0.0)
    x = tl.sum(plain, 0)
    tl.store(norm, x)
    tl.store(norm + 1, 0.0)
    tl.store(norm + 2, x * x)
    tl.store(norm + 3, 0.0)
    tl.store(norm + 4, x)
    tl.store(norm + 5, 0.0)


@jit
def _norm_of_plain(norm: tl.tensor, ranks: tl.tensor) -> tl.tensor:
    """What the plain tensors of all ranks add to the norm of the model: of replicas once."""
    x, squares, each = tl.load(norm), tl.load(norm + 2), tl.load(norm + 4)
    alike = ranks * squares - x * x <= ALIKE * (x * x)
    return tl.where(alike, x / ranks, each)


@jit
def _differ(
    votes: tl.tensor,
    expected: tl.tensor,
    nth: tl.tensor,
    voting: tl.tensor,
    twice: tl.constexpr,
) -> tl.tensor:
    """Of some tensors, whether ranks have voted otherwise than this one."""
    mask = nth < voting
    differ = tl.load(votes + nth, mask=mask, other=0.0) != tl.load(expected + nth, mask=mask, other=0.0)
    if twice:
        of_none = tl.load(votes + voting + nth, mask=mask, other=0.0)
        differ = differ | (of_none != tl.load(expected + voting + nth, mask=mask, other=0.0))
    return differ & mask


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
    """Count the step of each parameter that has one count of steps.

    ``stepped``: whether there is a step; with ``verdicts`` the address of that, for each parameter.
    """
    clip = clip_of(param_groups, total, clips)
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
        moves = moves & (of_step * power_of(clip, norm_type) + kept > 0)
        if verdicts:
            moves = moves & (tl.load(stepped + nth, mask=moves, other=0) != 0)
        if not verdicts:
            moves = moves & each_of(stepped, nth)
        tl.store(as_float32(steps), tl.load(as_float32(steps), mask=moves, other=0.0) + 1.0, mask=moves)


@_jit_of_any_step
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
    expected: tl.tensor,
    uneven: tl.tensor,
    noted_uneven: tl.tensor,
    in_order: tl.tensor,
    step: tl.tensor,
    first_number: tl.tensor,
    length: tl.tensor,
    parameter_count: tl.tensor,
    voting: tl.tensor,
    alike_count: tl.tensor,
    ranks: tl.tensor,
    twice: tl.constexpr,
    shared: tl.constexpr,
    counted: tl.constexpr,
    scattered: tl.constexpr,
    vetoed: tl.constexpr,
    clips: tl.constexpr,
    reduced: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """One program finds whether there is a step, and the sum over the layers of the model, and writes them.

    ``counted``: some parameters have one count of steps for all their layers: count the step here.
    ``shared``: the norm has to be the same on all ranks, and ``in_order`` are the parameters that all have.
    """
    added = tl.zeros([tile], tl.float64)
    most = tl.zeros([tile], tl.int64)
    for offset in range(0, parameter_count, tile):
        nth = offset + tl.arange(0, tile)
        mask = nth < parameter_count
        if not shared:
            part = tl.load(sums + nth, mask=mask, other=0.0)
            if reduced:
                part = tl.where(tl.load(sum_of + nth, mask=mask, other=0) == 0, part, 0.0)
            added += part
        most = tl.maximum(most, tl.load(largest + nth, mask=mask, other=0))
    if shared:
        for offset in range(0, alike_count, tile):
            nth = offset + tl.arange(0, tile)
            mask = nth < alike_count
            which_one = tl.load(in_order + nth, mask=mask, other=0)
            added += tl.load(sums + which_one, mask=mask, other=0.0)
    model_total = tl.sum(added, 0)
    bad = tl.max(most, 0) > LARGEST
    if reduced:
        bad = bad | (tl.load(buffer + length) > 0)
        for which in range(scattered):
            model_total += tl.load(buffer + length + 1 + which)
        votes = buffer + length + 1 + scattered
        if shared:
            model_total += _norm_of_plain(votes + voting * (1 + twice), ranks)
        differing = tl.zeros([tile], tl.int32)
        for offset in range(0, voting, tile):
            nth = offset + tl.arange(0, tile)
            differ = _differ(votes, expected, nth, voting, twice)
            tl.store(uneven + nth, differ, mask=nth < voting)
            differing = tl.maximum(differing, differ.to(tl.int32))
        bad = bad | (tl.max(differing, 0) > 0)
        if bad:
            for offset in range(0, voting, tile):
                nth = offset + tl.arange(0, tile)
                differ = _differ(votes, expected, nth, voting, twice)
                tl.store(noted_uneven + nth, differ, mask=nth < voting)
    if vetoed:
        bad = bad | (tl.load(veto).to(tl.int32) != 0)
    tl.store(total, model_total)
    tl.store(finite, bad == 0)
    tl.store(skipped, tl.load(skipped) + bad.to(tl.int64))
    if bad:
        tl.store(bad_at, step)
    if counted:
        _count_steps(
            parameters,
            param_groups,
            statistic,
            model_total,
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
    """One program counts the step of each parameter that has one count of steps for all its layers."""
    stepped = finite if verdicts else tl.load(finite) != 0
    model_total = tl.load(total)
    _count_steps(
        parameters,
        param_groups,
        statistic,
        model_total,
        stepped,
        first_number,
        parameter_count,
        clips,
        verdicts,
        tile,
    )
