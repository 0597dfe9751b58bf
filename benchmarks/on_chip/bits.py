"""Whether the kernels work on this chip, and give the reference's bits on it and on the CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.on_chip import training
from benchmarks.on_chip.gpu import Gpu
from benchmarks.on_chip.rows import Row, attempted, name_of
from benchmarks.shapes import Shapes
from novoscale import kernels

# Matrices, a vector, what fills no tile, a convolution.
SHAPES: Shapes = [(257, 384), (384,), (1000, 128), (33, 7), (5,), (64, 64, 3, 3)]
STEPS = 4

State = dict[str, list[Tensor]]


def load(gpu: Gpu) -> Iterator[Row]:
    """The fused kernel of this chip, one small kernel of which is compiled, launched and looked at."""
    start = time.perf_counter()
    reason = kernels.unfused_reason(gpu.device.type)
    row = {"fused kernel": kernels.FUSED_DEVICES[gpu.device.type], "seconds": time.perf_counter() - start}
    yield row | ({"failed": reason} if reason else {})


def compare(gpu: Gpu) -> Iterator[Row]:
    """Of each form steps against the reference on this chip, and the first against that on the CPU."""
    for dtype in training.DTYPES:
        for form in training.FORMS:
            row: Row = {"weights": name_of(dtype), "form": form, "steps": STEPS}
            yield attempted(row, partial(compared, gpu, dtype, form))


def compared(gpu: Gpu, dtype: torch.dtype, form: str) -> Row:
    """How many elements have other bits."""
    start = time.perf_counter()
    first, last = trained(gpu.device, dtype, form, fused=True)
    seconds = time.perf_counter() - start
    _, expected = trained(gpu.device, dtype, form, fused=False)
    on_cpu, _ = trained(torch.device("cpu"), dtype, form, fused=False, steps=1)
    here, there = training.differing(last, expected), training.differing(first, on_cpu)
    failed = training.failed(here, "the reference") or training.failed(there, "the reference on the CPU")
    counts = {"differ": sum(here.values()), "differ from the CPU's": sum(there.values())}
    return {**counts, "seconds": seconds, **failed}


def trained(
    device: torch.device, dtype: torch.dtype, form: str, fused: bool, steps: int = STEPS
) -> tuple[State, State]:
    """Weights and state after the first step, and after the last."""
    params = training.parameters(SHAPES, dtype, device)
    optimizer = training.optimizer(params, fused=fused, **training.FORMS[form])
    found = []
    for step in range(steps):
        for p, gradient in zip(params, training.gradients(params, step), strict=True):
            p.grad = gradient
        optimizer.step()
        if step in (0, steps - 1):
            found.append(training.snapshot(optimizer))
    return found[0], found[-1]
