"""How a first moment is stored: the formats, and codes and scales from numbers.

In blocks: each 128 consecutive elements of a parameter, counted from its first (and not from that of a
rank's piece of it), have one scale, and each element a signed code; its moment is their product. The scale is
the largest magnitude in the block over the largest code, rounded up to a bfloat16, which has the range of a
float32. (float16 would be finer, but moments of a large layer are below its smallest numbers, and
unnormalised gradients, with ``reg_inside_moment=False``, above its largest. What finer scales would gain is
0.4 % of the rounding error: ``docs/momentum.md``.) Codes are rounded stochastically, see
``novoscale.state.rounding``.

A format is one line of ``FORMATS``. These functions are the definition; the kernels give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from novoscale.sharding.blocks import BLOCK, SMALL
from novoscale.state import rounding

SMALLEST_SCALE = 0x00800000  # as the bits of a float32: its smallest normal number


@dataclass(frozen=True)
class Format:
    """A way to store the first moment.

    Attributes:
        name: the value of the option ``momentum_dtype``.
        dtype: of the stored tensor. int4 has two codes in a byte, that of the even element in its lower half.
        largest: the largest code, of formats in blocks; 0 for the others.
        packed: codes in an element of the stored tensor.
    """

    name: str
    dtype: torch.dtype
    largest: int = 0
    packed: int = 1

    @property
    def bytes(self) -> float:
        """Of a moment, in bytes, with its part of a block's scale."""
        return self.dtype.itemsize / self.packed + (torch.bfloat16.itemsize / BLOCK if self.largest else 0)

    def holds_codes_of(self, other: Format) -> bool:
        """Whether the codes of another format are codes of this one, for the same scales."""
        integers = not (self.dtype.is_floating_point or other.dtype.is_floating_point)
        return integers and 0 < other.largest <= self.largest


FORMATS = {
    f.name: f
    for f in (
        Format("float32", torch.float32),
        Format("bfloat16", torch.bfloat16),
        Format("int8", torch.int8, largest=127),
        Format("int4", torch.uint8, largest=7, packed=2),
    )
}


def kept_format(momentum_dtype: str, numel: int) -> Format:
    """The format of a parameter of so many elements: small ones keep float32 where others are in blocks."""
    form = FORMATS[momentum_dtype]
    return FORMATS["float32"] if form.largest and numel < SMALL else form


def known_format(exp_avg: Tensor, scale: Tensor | None) -> Format | None:
    """The format of a stored moment; None if it is in no format that is an option."""
    found = (exp_avg.dtype, None if scale is None else scale.dtype)
    for form in FORMATS.values():
        if found == (form.dtype, torch.bfloat16 if form.largest else None):
            return form
    return None


def format_of(exp_avg: Tensor, scale: Tensor | None) -> Format:
    """The same, but any floating-point one that is no option counts as float32."""
    return known_format(exp_avg, scale) or FORMATS["float32"]


def decoded(codes: Tensor, scale: Tensor, form: Format) -> Tensor:
    """The moments of blocks, float32 ``[blocks, 128]``: codes as they are stored, and scales ``[blocks]``."""
    return unpacked(codes, form).float() * scale[:, None].float()


def unpacked(codes: Tensor, form: Format) -> Tensor:
    """Codes as int8 ``[..., codes]``, from elements as they are stored."""
    if form.packed == 1:
        return codes
    # Four bits with a sign: shifted to the top of the byte and back.
    low, high = (codes << 4).view(torch.int8) >> 4, codes.view(torch.int8) >> 4
    return torch.stack((low, high), dim=-1).flatten(-2)


def packed(codes: Tensor, form: Format) -> Tensor:
    """Codes as they are stored, from int8 ``[..., codes]``."""
    if form.packed == 1:
        return codes
    pairs = codes.view(torch.uint8).view(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    low, high = pairs.unbind(-1)
    return (low & 15) | (high << 4)


def encode(
    values: Tensor, bits: Tensor, form: Format, largest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of blocks.

    Args:
        values: ``[blocks, 128]``, float32; float64 is rounded to it.
        bits: 16 random bits for each.
        form: one in blocks.
        largest: of each block the largest magnitude, if others have elements of it too.

    Returns:
        Codes as they are stored, and bfloat16 scales ``[blocks]``. A block with a value that is not finite
        has the scale NaN.
    """
    values = values.float()
    largest = values.abs().amax(dim=1) if largest is None else largest
    # Up to the next bfloat16, so that no code is beyond the largest.
    wide = (largest * (1 / form.largest)).view(torch.int32).long()
    wide = ((wide + 0xFFFF) & ~0xFFFF).clamp(min=SMALLEST_SCALE)
    wide = torch.where(largest == 0, 0, torch.where(largest.isfinite(), wide, rounding.NAN_BFLOAT16 << 16))
    scale = wide.to(torch.int32).view(torch.float32)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    # In the middle of one of 2**16 equal parts of 0..1: exact, as is the sum's floor.
    chance = (bits * 2 + 1).float() * 2.0**-17
    codes = (values * inverse[:, None] + chance).floor()
    codes = codes.clamp(-form.largest, form.largest).nan_to_num(nan=0.0).to(torch.int8)
    return packed(codes, form), (wide >> 16).to(torch.int16).view(torch.bfloat16)
