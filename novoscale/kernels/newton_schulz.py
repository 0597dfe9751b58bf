"""The nearest matrix with orthonormal rows or columns, by the iteration of Newton and Schulz: the definition.

Plain torch on every device, one matrix at a time: the same bits for the same matrix on one kind of device and
number of threads, whatever other matrices a model has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Five steps of x -> a*x + b*x**3 + c*x**5 bring every singular value from about 0.005 to 1 between 0.68 and
# 1.21, which is near enough to 1: kellerjordan.github.io/posts/muon.
COEFFICIENTS = 3.4445, -4.7750, 2.0315
LEAST_NORM = 1e-30  # of a matrix that is all zero, which stays so


def orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """The orthogonal factor of a matrix, about: its singular vectors with singular values near 1.

    Args:
        matrix: ``[R, C]``. bfloat16: products are of bfloat16, with sums in float32. float32 or float64:
            everything is.
        steps: of the iteration.

    Returns:
        ``[R, C]``, of the same dtype; all zero where the matrix is.
    """
    with torch.autocast(matrix.device.type, enabled=False):
        norm = torch.linalg.vector_norm(matrix, dtype=_dtype_of_norm(matrix)).clamp(min=LEAST_NORM)
        x = (matrix / norm).to(matrix.dtype)
        wide = x if matrix.shape[0] <= matrix.shape[1] else x.T
        found = _by_gram(wide, steps) if gram_is_cheaper(wide, steps) else _directly(wide, steps)
    return found if wide is x else found.T


def gram_is_cheaper(wide: Tensor, steps: int) -> bool:
    """Whether the iteration takes fewer operations on ``wide @ wide.T``, which is ``[R, R]``.

    Not in bfloat16: the eigenvalues of that matrix are the squares of singular values, of which small ones
    are lost in 8 bits.
    """
    if wide.dtype == torch.bfloat16:
        return False
    return flops(wide.shape, steps, gram=True) < flops(wide.shape, steps, gram=False)


def flops(shape: Sequence[int], steps: int, gram: bool) -> int:
    """How many operations the products of one matrix take, a multiplication and an addition counting two.

    Args:
        shape: of the matrix.
        steps: of the iteration.
        gram: see :func:`gram_is_cheaper`.
    """
    short, long = sorted(shape)
    square, across = 2 * short**3, 2 * short**2 * long
    if not gram:
        return steps * (2 * across + square)
    return 2 * across + (4 * steps - 3) * square


def _directly(x: Tensor, steps: int) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _by_gram(x: Tensor, steps: int) -> Tensor:
    """The same by the polynomials of ``x @ x.T``, which all commute: x is multiplied once, at the end."""
    a, b, c = COEFFICIENTS
    gram = x @ x.T
    factor = None
    for step in range(steps):
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        factor = polynomial if factor is None else polynomial @ factor
        if step + 1 < steps:
            gram = polynomial @ (polynomial @ gram)
    return x if factor is None else factor @ x


def _dtype_of_norm(matrix: Tensor) -> torch.dtype:
    return torch.promote_types(matrix.dtype, torch.float32)
