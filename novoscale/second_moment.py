"""One scalar per layer: the second moment, and what the update makes of it.

But for :func:`allocate` pure functions of vectors with one element per layer, in float64; ``options`` is a
param group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from novoscale.layout import Layout, by_rows, cuts_rows, from_local


def allocate(p: Tensor, layout: Layout) -> Tensor:
    """Zeros, one for each layer that this rank has of a tensor: float32.

    The rows of a DTensor that is cut by rows are a DTensor cut as it is; else the vector is the same on every
    rank of its mesh.
    """
    zeros = torch.zeros(layout.layers, dtype=torch.float32, device=p.device)
    if not isinstance(p, DTensor) or not by_rows(p, layout.held[0].parameter):
        return zeros
    placements = [x if cuts_rows(x) else Replicate() for x in p.placements]
    return from_local(zeros, p, (p.shape[0],), placements) if any(map(cuts_rows, p.placements)) else zeros


def averaged(v: Tensor, S: Tensor, options: Mapping[str, Any]) -> Tensor:
    """The running average of S (the sum of squares, or the largest magnitude): float32."""
    beta2 = options["betas"][1]
    average = beta2 * v.double() + (1 - beta2) * S
    # "First step" is v == 0, decided on the device: frameworks call step() with zero gradients
    # before training, and a layer may get its first gradient late.
    return (average if options["init_zero"] else torch.where(v == 0, S, average)).float()


def coefficients(
    v: Tensor, t: Tensor | None, numel: Tensor | None, scale: Tensor | None, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_scale, step_size and decay of each layer: see ``kernels.Coefficients``.

    Args:
        v: the second moment after this step.
        t: each layer's number of steps, for the bias correction; None without it.
        numel: each layer's number of elements, to divide by the root mean square; None: by the norm.
        scale: 0-dim: what the gradients are multiplied by; None: 1.
        options: of the param group.
    """
    beta1, beta2 = options["betas"]
    norm = v.double().sqrt() if options["norm_type"] == 2 else v.double()
    if numel is not None:
        norm = norm / numel.double().sqrt()
    correction1: Tensor | float = 1.0
    if t is not None:
        t = t.double().clamp(min=1)
        correction1 = 1 - torch.pow(beta1, t)
        norm = norm / (1 - torch.pow(beta2, t)).sqrt()
    sign = -1.0 if options["maximize"] else 1.0
    inverse = 1 / (norm + options["eps"])
    ones = torch.ones_like(norm)
    grad_scale = ones * (sign if scale is None else sign * scale)
    lr = options["lr"]
    # A number is not moved to the device: that would be a copy, which a CUDA graph cannot hold.
    lr = lr.to(v.device).double().reshape(()) if isinstance(lr, Tensor) else float(lr)
    step_size = ones * (lr / correction1)
    decay = ones * (lr * options["weight_decay"])
    if options["reg_inside_moment"]:
        return grad_scale * inverse, step_size, decay
    return grad_scale, step_size * inverse, decay


def clip_coefficient(total: Tensor, max_grad_norm: float | None) -> Tensor | None:
    """What ``torch.nn.utils.clip_grad_norm_`` multiplies the gradients by; None without clipping.

    Args:
        total: 0-dim: the sum of squares of the whole model.
        max_grad_norm: None or 0: no clipping.
    """
    if not max_grad_norm:
        return None
    return (max_grad_norm / (total.sqrt() + 1e-6)).clamp(max=1)
