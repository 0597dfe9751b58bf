"""Sums of squares in Triton almost without float64, for GPUs that have little of it: three words of float32.

A sum is a high, a middle and a low word. What a rounding loses of one word goes to the next (the error-free
transformations of Ogita, Rump and Oishi, SIAM J. Sci. Comput. 26, 2005), and only the roundings of the low
word are lost, 2**-70 of the sum. So the sum is as exact as in float64. But the range of float32 is smaller:
where numbers are too small or too large for it, ``total`` says so, and the sum has to be made in float64.

Nothing of this may be reordered, and no multiply-add fused but the one that is written.
"""

from __future__ import annotations

import triton.language as tl

from novoscale.kernels.triton.formats import jit

# A sum of up to 2**20 squares that is not below this lacks at most 2**-58 of itself: what is below float32's
# smallest number, of each product and of its rest.
_LEAST = tl.constexpr(2.0**-70)
_INFINITY = tl.constexpr(float("inf"))


@jit
def _two_sum(a: tl.tensor, b: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The rounded sum, and its error."""
    result = a + b
    of_b = result - a
    return result, (a - (result - of_b)) + (b - of_b)


@jit
def square(value: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """value**2 in three words; not 0 where the value is not."""
    product = value * value
    smallest = tl.full([], 1, tl.int32).to(tl.float32, bitcast=True)  # as a number it would be float64
    return product, tl.fma(value, value, -product), tl.minimum(tl.abs(value), smallest)


@jit
def add(
    high: tl.tensor,
    middle: tl.tensor,
    low: tl.tensor,
    other_high: tl.tensor,
    other_middle: tl.tensor,
    other_low: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The sum of two sums."""
    high, of_high = _two_sum(high, other_high)
    middle, of_middle = _two_sum(middle, of_high)
    middle, of_other = _two_sum(middle, other_middle)
    return high, middle, (low + other_low) + (of_middle + of_other)


@jit
def total(
    high: tl.tensor, middle: tl.tensor, low: tl.tensor, axis: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The sums along an axis, as float64; and which of them are wrong.

    A sum is wrong where it is beyond or below float32's range, or NaN.
    """
    high, middle, low = tl.reduce((high, middle, low), axis, add)
    right = ((high >= _LEAST) & (high < _INFINITY)) | ((high == 0) & (low == 0))
    return high.to(tl.float64) + (middle.to(tl.float64) + low.to(tl.float64)), right == 0
