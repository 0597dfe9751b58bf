"""Stochastic rounding, the definition: the same random bits in every kernel and however a parameter is
sharded.

A number between two that can be stored goes up with a chance as large as its distance from the lower one, so
that the mean of many roundings is the number itself. Where rounding to the nearest would leave a small change
without any effect (a decaying momentum, a small step of a bfloat16 weight), it then has it on average.

The random bits are a hash of (seed, parameter, step, element of the parameter): no state, and every rank
computes those of the elements it holds. All integers here are of 32 bits, held in int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
NAN_BFLOAT16 = 0x7FC0


def scramble(x: Tensor, key: Tensor | int = 0) -> Tensor:
    """A bijection of the numbers of 32 bits, another one for each key, that mixes their bits.

    Each bit of the input affects each of the output. A key has to be scrambled itself: two that differ in
    their uppermost bits only give similar results. After ``lowbias32`` of Chris Wellons
    (nullprogram.com/blog/2018/07/31), which has no key and ends with a shift by 16; by 15 takes GPUs fewer
    registers, for the upper half of the result is then not what it was before.
    """
    x = (x ^ (x >> 16) ^ key) * 0x7FEB352D & MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & MASK
    return x ^ (x >> 15)


def keys(seed: int | Tensor, number: Tensor, step: Tensor) -> Tensor:
    """What the random bits of a layer's elements depend on beside the element.

    Args:
        seed: the option of its param group, or of each.
        number: of its parameter, int64.
        step: how many steps the layer has made, int64.

    Returns:
        int64, the shape of the arguments, each of 32 bits.
    """
    start = scramble(torch.zeros_like(number) + seed & MASK)
    return scramble(scramble(start ^ (number & MASK)) ^ (step & MASK))


def random_bits(key: Tensor, position: Tensor) -> Tensor:
    """32 random bits for each element: the lower half for its weight, the upper for its first moment.

    Args:
        key: of the element's layer, see :func:`keys`.
        position: the element's place in its parameter, int64.
    """
    low, high = position & MASK, position >> 32
    # Multiplied (by the golden ratio), so that elements next to each other differ in many bits.
    return scramble(low * 0x9E3779B9 & MASK, key ^ scramble(high))


def to_bfloat16(value: Tensor, bits: Tensor) -> Tensor:
    """Round float32 to one of the two nearest bfloat16, by 16 random bits; float64 to float32 before."""
    value = value.float()
    # What is cut off is compared with the random bits by an addition: a carry rounds up. Infinity has nothing
    # to cut off.
    wide = (value.view(torch.int32).long() & MASK) + (bits & 0xFFFF)
    return torch.where(value.isnan(), NAN_BFLOAT16, wide >> 16).to(torch.int16).view(torch.bfloat16)
