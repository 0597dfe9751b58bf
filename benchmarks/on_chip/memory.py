"""What a step takes beside weights and gradients: state, which stays, and what is held only meanwhile."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from benchmarks.on_chip.gpu import Gpu
from benchmarks.on_chip.rows import Row, attempted
from benchmarks.shapes import CATALOGUE
from novoscale.memory.optimizers import CANDIDATES, Candidate

SHAPE = "llama-1b"
OPTIMIZERS = (
    "NovoGrad",
    "NovoGrad, int8",
    "NovoGrad, int4",
    "NovoGrad, adamw, int8",
    "torch AdamW, fused",
    "torch AdamW, foreach",
    "torch Adafactor",
    "bitsandbytes AdamW8bit",
    "torchao AdamW8bit",
)


def measure(gpu: Gpu) -> Iterator[Row]:
    """Of each optimizer, of bfloat16 weights and gradients."""
    for name in OPTIMIZERS:
        candidate = CANDIDATES[name]
        row: Row = {"optimizer": name, "shape": SHAPE}
        if candidate.installed():
            yield attempted(row, partial(of_steps, gpu, candidate))
        else:
            yield row | {"why": f"not installed: {candidate.package}"}
        gc.collect()


def of_steps(gpu: Gpu, candidate: Candidate) -> Row:
    """State, and the peaks of the first step, which makes it, and of the second."""
    shapes = CATALOGUE[SHAPE]()
    params = [nn.Parameter(torch.ones(s, dtype=torch.bfloat16, device=gpu.device)) for s in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = candidate.make(params)
    before = gpu.allocated()
    first = gpu.peak(optimizer.step)
    after = gpu.allocated()
    later = gpu.peak(optimizer.step)
    return {
        "state, bytes a parameter": (after - before) / sum(map(math.prod, shapes)),
        "transient MiB, first step": (first - after) / 2**20,
        "transient MiB": (later - after) / 2**20,
    }
