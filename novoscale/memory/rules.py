"""How many bytes of state an optimizer will keep, by rule: for plans of models that do not fit here.

A rule takes the tensors that the optimizer is given on one rank, and the bytes of their elements. Each is
checked against what its optimizer really holds (tests/memory/test_planning.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from novoscale.sharding.blocks import BLOCK
from novoscale.sharding.layers import describe
from novoscale.state.formats import FORMATS

FLOAT32 = 4
SMALL = 4096  # elements: bitsandbytes, torchao and NovoGrad leave smaller tensors in float32


@dataclass(frozen=True)
class Piece:
    """What a tensor holds of one parameter: its shape before any sharding, and how many elements lie here."""

    shape: tuple[int, ...]
    numel: int

    @property
    def unsharded_numel(self) -> int:
        """Elements of the parameter before any sharding."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Stepped:
    """A tensor as an optimizer is given it on one rank: a parameter, a shard of one, or a flat partition."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Elements, padding included."""
        return math.prod(self.shape)


Rule = Callable[[Sequence[Stepped], int], int]


def elementwise(copies: int, per_tensor: int = 0) -> Rule:
    """``copies`` of the tensor in its dtype, and some bytes for each tensor."""
    return lambda tensors, size: sum(copies * t.numel * size + per_tensor for t in tensors)


def factored(*, momentum: bool, statistics: int = 1, as_weights: bool = False) -> Rule:
    """Rows and columns of matrices (CAME: of two statistics) and a scalar; float32, or as the weights."""

    def rule(tensors: Sequence[Stepped], size: int) -> int:
        width = size if as_weights else FLOAT32
        total = 0
        for t in tensors:
            *rest, rows, columns = (1, *t.shape) if len(t.shape) > 1 else (1, 0, 0)
            second = statistics * math.prod(rest) * (rows + columns) if len(t.shape) > 1 else t.numel
            total += width * (second + (t.numel if momentum else 0)) + FLOAT32
        return total

    return rule


def bitsandbytes_8bit(states: int) -> Rule:
    """A byte for an element, a float32 scale for each block of 256, one code book for each state."""

    def rule(tensors: Sequence[Stepped], size: int) -> int:
        large = [t.numel for t in tensors if t.numel >= SMALL]
        small = sum(t.numel for t in tensors if t.numel < SMALL)
        codes = sum(n + FLOAT32 * math.ceil(n / 256) for n in large)
        return states * (codes + FLOAT32 * small + (FLOAT32 * 256 if large else 0))

    return rule


def torchao_adamw(bits: int, block: int) -> Rule:
    """Codes, a float32 scale for each block and a code book for each state; in full blocks only."""

    def rule(tensors: Sequence[Stepped], size: int) -> int:
        total = 0
        for t in tensors:
            quantised = t.numel >= SMALL and t.numel % block == 0
            codes = t.numel * bits // 8 + FLOAT32 * (t.numel // block + 2**bits)
            total += 2 * (codes if quantised else t.numel * size) + FLOAT32
        return total

    return rule


def novograd(
    momentum: str = "float32", granularity: str | int = "tensor", bias_correction: bool = False
) -> Rule:
    """The first moment in its format, and float32 scalars for each layer."""

    def rule(tensors: Sequence[Stepped], size: int) -> int:
        counts = bias_correction or momentum != "float32" or size < FLOAT32
        total = 0
        for t in tensors:
            for piece in t.pieces:
                second, steps = _second_moments(piece, granularity)
                total += FLOAT32 * (second + (steps if counts else 0))
            total += _first_moment(t, momentum)
        return total

    return rule


def _second_moments(piece: Piece, granularity: str | int) -> tuple[int, int]:
    """How many second moments, and how many counts of steps."""
    p = describe("a parameter", piece.shape, granularity)
    layers = math.ceil(piece.numel / p.layer_numel) if p.layers > 1 else 1
    return layers + p.columns, 1 if p.counts_once else layers


def _first_moment(t: Stepped, momentum: str) -> int:
    form = FORMATS[momentum]
    if not form.largest:
        return t.numel * form.dtype.itemsize
    small = sum(piece.numel for piece in t.pieces if piece.unsharded_numel < SMALL)
    blocks = sum(math.ceil(piece.numel / BLOCK) for piece in t.pieces if piece.unsharded_numel >= SMALL)
    return FLOAT32 * small + round(blocks * BLOCK * form.bytes)
