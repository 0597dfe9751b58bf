"""Sums of squares in Triton without float64, for GPUs that have little of it: three float32 words for each.

High, middle and low word are added up without an error but for the low one's rounding (the error-free
transformations of Ogita, Rump and Oishi, SIAM J. Sci. Comput. 26, 2005), which is 2**-70 of the sum: it is as
exact as the one in float64, and all there is of float64 is its last step. Only float32's range is smaller: a
sum outside of that in which no digit is lost has to be made anew in float64, see :func:`is_exact`.

No multiply-add may be fused, and none of these operations reordered.
"""

from __future__ import annotations

import triton.language as tl

from novoscale.kernels.triton_formats import jit

# Sums of up to 2**20 squares from here on have lost at most 2**-58 of themselves: what is below float32's
# smallest number, 2**-149, of each product and of its rest.
LEAST = tl.constexpr(2.0**-70)
_SMALLEST = tl.constexpr(2.0**-149)


@jit
def _two_sum(a: tl.tensor, b: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The rounded sum, and what it lacks."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


@jit
def add_square(
    high: tl.tensor, middle: tl.tensor, low: tl.tensor, value: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add value**2 to sums; one that is not 0 leaves none that is 0."""
    product = value * value
    rest = tl.fma(value, value, -product)
    high, of_high = _two_sum(high, product)
    middle, of_middle = _two_sum(middle, of_high)
    middle, of_rest = _two_sum(middle, rest)
    return high, middle, low + (of_middle + of_rest) + tl.minimum(tl.abs(value), _SMALLEST)


@jit
def add(
    high: tl.tensor,
    middle: tl.tensor,
    low: tl.tensor,
    other_high: tl.tensor,
    other_middle: tl.tensor,
    other_low: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add two sums."""
    high, of_high = _two_sum(high, other_high)
    middle, of_middle = _two_sum(middle, other_middle)
    middle, of_both = _two_sum(middle, of_high)
    return high, middle, (low + other_low) + (of_middle + of_both)


@jit
def total(high: tl.tensor, middle: tl.tensor, low: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """Sums along an axis, as float64."""
    high, middle, low = tl.reduce((high, middle, low), axis, add)
    return high.to(tl.float64) + (middle.to(tl.float64) + low.to(tl.float64))


@jit
def is_exact(sums: tl.tensor) -> tl.tensor:
    """Whether sums of three words are right: nothing was below or beyond the range of float32, nor NaN."""
    return (sums == 0) | ((sums >= LEAST) & (sums < float("inf")))
