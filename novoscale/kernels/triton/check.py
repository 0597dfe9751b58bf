"""Whether what Triton compiles for a GPU runs there and computes right: asked once, before the first step."""

from __future__ import annotations

import torch
import triton.language as tl

from novoscale.kernels.triton.formats import jit, load_elements

ELEMENTS = 256  # 0 to 255, which bfloat16 holds exactly


@jit
def _sum_of_squares(table: tl.tensor, result: tl.tensor, elements: tl.constexpr) -> None:
    """Use what the statistic depends on: an address from a table, bfloat16, float64."""
    value = load_elements(tl.load(table), tl.arange(0, elements), None, tl.bfloat16, False)
    wide = value.to(tl.float64)
    tl.store(result, tl.sum(wide * wide, 0))


def check(device: torch.device) -> None:
    """Compile and launch a small kernel, and compare its result. Waits for the device.

    Raises:
        RuntimeError: the result is wrong.
        Exception: whatever Triton raises where it cannot compile or launch.
    """
    values = torch.arange(ELEMENTS, dtype=torch.bfloat16, device=device)
    table = torch.tensor([values.data_ptr()], dtype=torch.int64, device=device)
    result = torch.zeros((), dtype=torch.float64, device=device)
    _sum_of_squares[(1,)](table, result, ELEMENTS, num_warps=4, enable_fp_fusion=False)
    found, right = result.item(), sum(n * n for n in range(ELEMENTS))
    if found != right:
        raise RuntimeError(f"a kernel that Triton compiled for {device} gives {found} where {right} is right")
