"""How the Triton kernels read and write elements, for each format, and their random bits.

The definitions are ``state.formats`` and ``state.rounding``; these functions give the same bits. All
arithmetic is float32 or on integers of 32 bits in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from novoscale.sharding import blocks
from novoscale.state import formats, rounding

# With a type, because Triton ships none.
jit: Callable[[Callable[..., Any]], Any] = triton.jit

# The formats of weights, gradients and a first moment that is not in blocks. A further format is an entry
# here and a case in load_elements and store_elements.
FORMATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

BLOCK = tl.constexpr(blocks.BLOCK)
_SMALLEST_SCALE = tl.constexpr(formats.SMALLEST_SCALE)
_NAN = tl.constexpr(rounding.NAN_BFLOAT16)
_INFINITY = tl.constexpr(0x7F800000)  # as the bits of a float32


# ---- elements --------------------------------------------------------------------------------------------


@jit
def _pointers(address: tl.tensor, index: tl.tensor, dtype: tl.constexpr, aligned: tl.constexpr) -> tl.tensor:
    pointer = address.to(tl.pointer_type(dtype))
    if aligned:  # the compiler cannot know this of an address from a table
        pointer = tl.multiple_of(pointer, 16)
    return pointer + index


@jit
def load_elements(
    address: tl.tensor, index: tl.tensor, mask: tl.tensor, dtype: tl.constexpr, aligned: tl.constexpr
) -> tl.tensor:
    """Elements ``index`` of the tensor at ``address``, as float32."""
    if dtype == tl.bfloat16:
        # By integers: Triton's interpreter is wrong for subnormal values, and it is as fast.
        bits = tl.load(_pointers(address, index, tl.uint16, aligned), mask=mask)
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return tl.load(_pointers(address, index, dtype, aligned), mask=mask).to(tl.float32)


@jit
def store_elements(
    address: tl.tensor,
    index: tl.tensor,
    value: tl.tensor,
    bits: tl.tensor,
    mask: tl.tensor,
    dtype: tl.constexpr,
    aligned: tl.constexpr,
    live: tl.tensor = None,
    old: tl.tensor = None,
) -> None:
    """Round float32 ``value`` to ``dtype`` and write it.

    By 16 random bits if there are any (bfloat16 only); else to the nearest, to even in the middle. Where not
    ``live``, what was there is written again, ``old`` as load_elements gave it: the same bits (except that a
    NaN in float16 may become another NaN). A mask for each element would do too, but break up 128-bit stores.
    """
    if dtype == tl.bfloat16:
        # By integers: Triton's interpreter truncates, and not every GPU can do it in one instruction.
        wide = value.to(tl.uint32, bitcast=True)
        wide += 0x7FFF + ((wide >> 16) & 1) if bits is None else bits
        wide = tl.where(value == value, wide >> 16, _NAN)
        if live is not None:
            wide = tl.where(live, wide, old.to(tl.uint32, bitcast=True) >> 16)
        tl.store(_pointers(address, index, tl.uint16, aligned), wide.to(tl.uint16), mask=mask)
    else:
        if live is not None:
            value = tl.where(live, value, old)
        tl.store(_pointers(address, index, dtype, aligned), value.to(dtype), mask=mask)


@jit
def magnitudes(value: tl.tensor) -> tl.tensor:
    """The bits of float32 without their signs, int32: they order as the magnitudes, NaN above infinity."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


# ---- blocks of codes -------------------------------------------------------------------------------------
# The largest code tells the format. A further one is a case in each of the public functions here.


@jit
def code_address(address: tl.tensor, element: tl.tensor, largest: tl.constexpr) -> tl.tensor:
    """The address of the code of an element, which begins a byte."""
    packed: tl.constexpr = 2 if largest < 8 else 1
    return address + element // packed


@jit
def _codes(address: tl.tensor, block: tl.tensor, width: tl.constexpr, aligned: tl.constexpr) -> tl.tensor:
    """Pointers to the bytes of blocks of ``width`` bytes each."""
    index = block[:, None] * width + tl.arange(0, width)[None, :]
    return _pointers(address, index, tl.int8, aligned)


@jit
def load_blocks(
    address: tl.tensor,
    scales: tl.tensor,
    block: tl.tensor,
    mask: tl.tensor,
    largest: tl.constexpr,
    aligned: tl.constexpr,
) -> tl.tensor:
    """The elements of complete blocks, one after another: see ``momentum.read``.

    Args:
        address: of the codes.
        scales: address of the scales.
        block: which blocks, counted from those addresses.
        mask: which of them exist; None: all.
        largest: the largest code, which tells the format.
        aligned: whether the codes are.
    """
    packed: tl.constexpr = 2 if largest < 8 else 1
    scale = load_elements(scales, block, mask, tl.bfloat16, False)
    mask = None if mask is None else mask[:, None]
    code = tl.load(_codes(address, block, BLOCK // packed, aligned), mask=mask).to(tl.int32)
    if packed == 2:
        # Four bits with a sign: shifted to the top of the register and back.
        code = tl.join((code << 28) >> 28, code >> 4).reshape(block.shape[0], BLOCK)
    return (code.to(tl.float32) * scale[:, None]).reshape(block.shape[0] * BLOCK)


@jit
def store_blocks(
    address: tl.tensor,
    scales: tl.tensor,
    block: tl.tensor,
    value: tl.tensor,
    bits: tl.tensor,
    mask: tl.tensor,
    magnitude: tl.tensor,
    largest: tl.constexpr,
    aligned: tl.constexpr,
) -> None:
    """Write what :func:`load_blocks` reads: see ``state.formats.encode``.

    Args:
        address: see :func:`load_blocks`.
        scales: see there.
        block: see there.
        value: float32, of all elements of the blocks, one after another; 0 where this rank has none.
        bits: 16 random bits for each.
        mask: which blocks are to be written; None: all.
        magnitude: the largest magnitude of the blocks, as bits, if other ranks have elements of them too.
        largest: see :func:`load_blocks`.
        aligned: see there.
    """
    packed: tl.constexpr = 2 if largest < 8 else 1
    value = value.reshape(block.shape[0], BLOCK)
    if magnitude is None:
        # As ``magnitudes``, but by shifts: they use another pipe than the rest, which a mask would share.
        magnitude = (tl.max(value.to(tl.uint32, bitcast=True) << 1, 1) >> 1).to(tl.int32, bitcast=True)
    else:
        magnitude = magnitude + tl.zeros([block.shape[0]], tl.int32)
    finite = magnitude < _INFINITY
    wide = (magnitude.to(tl.float32, bitcast=True) * (1.0 / largest)).to(tl.int32, bitcast=True)
    wide = tl.maximum((wide + 0xFFFF) & -0x10000, _SMALLEST_SCALE)
    wide = tl.where(magnitude == 0, 0, wide)
    inverse = tl.where(magnitude == 0, 0.0, tl.div_rn(1.0, wide.to(tl.float32, bitcast=True)))
    scale = tl.where(finite, wide >> 16, _NAN).to(tl.uint16)
    tl.store(_pointers(scales, block, tl.uint16, False), scale, mask=mask)
    # (2 * bits + 1) * 2**-17 as the fraction of a number from 1 to 2, which saves a conversion: exact.
    fraction = ((bits << 7) | 0x3F800040).to(tl.float32, bitcast=True) - 1.0
    code = value * inverse[:, None] + fraction.reshape(value.shape)
    # A GPU's floor may take subnormal numbers for 0; no such sum is one, for the fraction is at least 2**-17.
    bound = tl.where(finite, largest, 0)[:, None]  # where not, the codes are 0 whatever the values became
    code = tl.minimum(tl.maximum(tl.floor(code).to(tl.int32), -bound), bound)
    if packed == 2:
        low, high = code.reshape(block.shape[0], BLOCK // 2, 2).split()
        code = (low & 15) | (high << 4)
    mask = None if mask is None else mask[:, None]
    tl.store(_codes(address, block, BLOCK // packed, aligned), code.to(tl.int8), mask=mask)


# ---- random bits -----------------------------------------------------------------------------------------


@jit
def scramble(x: tl.tensor, key: tl.tensor = 0) -> tl.tensor:
    """See ``rounding.scramble``; uint32."""
    x = (x ^ (x >> 16) ^ key) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 15)


@jit
def random_bits(key: tl.tensor, low: tl.tensor, scrambled_high: tl.tensor) -> tl.tensor:
    """See ``rounding.random_bits``; of the position the lower half, and the upper one scrambled."""
    return scramble(low * 0x9E3779B9, key ^ scrambled_high)
