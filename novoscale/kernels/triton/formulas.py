"""Arithmetic of the pass over the layers, in Triton: the formulas of ``reference.layers``, in float64."""

from __future__ import annotations

import struct

import triton.language as tl

from novoscale.kernels import layers
from novoscale.kernels.triton.formats import jit
from novoscale.sharding.plan import FLOAT32_MAX

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
# The largest float32, as of bits_of: above it are infinity and NaN.
LARGEST = tl.constexpr(struct.unpack("<q", struct.pack("<d", FLOAT32_MAX))[0])


@jit
def as_float32(address: tl.tensor) -> tl.tensor:
    """An address from a table, of float32."""
    return address.to(tl.pointer_type(tl.float32))


@jit
def power_of(factor: tl.tensor, norm_type: tl.tensor) -> tl.tensor:
    """What multiplies a statistic where the gradients are multiplied by a factor."""
    return tl.where(norm_type == 2, factor * factor, factor)


@jit
def inverse_of(scale: tl.tensor, scaled: tl.constexpr) -> tl.tensor:
    """What multiplies the gradients for a loss scale."""
    one = tl.full((), 1.0, tl.float64)
    if scaled:
        one = one / tl.load(scale).to(tl.float64)
    return one


@jit
def clip_of(param_groups: tl.tensor, total: tl.tensor, clips: tl.constexpr) -> tl.tensor:
    """What clipping the norm of the gradients of the model multiplies them by."""
    factor = tl.full((), 1.0, tl.float64)
    if clips:
        norm = tl.sqrt(total) + tl.full((), 1e-6, tl.float64)
        factor = tl.load(param_groups + LIMIT) / norm
        factor = tl.where(factor > 1.0, 1.0, factor)
    return factor


@jit
def powers(base: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    """See ``reference.layers.powers``; the exponent is int32."""
    result = tl.zeros_like(exponent).to(tl.float64) + 1.0
    for _ in range(25):
        result = tl.where((exponent & 1) > 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@jit
def each_of(number: tl.tensor, nth: tl.tensor) -> tl.tensor:
    """Whether a number is not 0, for each lane: the interpreter cannot broadcast a comparison's result."""
    return tl.zeros_like(nth) + number.to(tl.int32) != 0


@jit
def fresh_of(v: tl.tensor, S: tl.tensor, o: tl.tensor) -> tl.tensor:
    """What a statistic adds to the running average of each layer."""
    first = tl.where(tl.load(o + INIT_ZERO) > 0, v < 0, v == 0)
    return tl.where(first, S, (1.0 - tl.load(o + BETA2)) * S)


@jit
def averaged(v: tl.tensor, S: tl.tensor, o: tl.tensor) -> tl.tensor:
    """The running average."""
    return (tl.load(o + BETA2) * v.to(tl.float64) + fresh_of(v, S, o)).to(tl.float32)


@jit
def bits_of(value: tl.tensor) -> tl.tensor:
    """Numbers that are not negative, as integers in the same order; NaN, of either sign, above all."""
    return tl.abs(value).to(tl.int64, bitcast=True)
