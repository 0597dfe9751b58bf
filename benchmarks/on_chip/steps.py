"""The whole step beside other optimizers, as ``make speed`` measures it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import plots, speed
from benchmarks.on_chip.gpu import Gpu
from benchmarks.on_chip.rows import Row, name_of
from benchmarks.shapes import CATALOGUE

CASES = (
    ("gpt2-124m", torch.float32),
    ("1000-small", torch.float32),
    ("llama-1b", torch.float32),
    ("llama-1b", torch.bfloat16),
)
OPTIMIZERS = (
    "NovoGrad",
    "NovoGrad, int8",
    "NovoGrad, adamw",
    "NovoGrad, adamw, int8",
    plots.BASELINE,
    "torch AdamW, foreach",
    "torch Adafactor",
    "bitsandbytes AdamW8bit",
    "torchao AdamW8bit",
    "Apex FusedNovoGrad",
    "Apex FusedAdam",
)
ROUNDS, STEPS = 2, 5
SHOWN = ("optimizer", "ms", "best_ms", "host_ms", "busy_ms", "launches", "GBps", "transient_MiB", "why")


def measure(gpu: Gpu) -> Iterator[Row]:
    """A row for each optimizer and shape."""
    for shape, dtype in CASES:
        names = list(OPTIMIZERS)
        found = speed.measure(
            CATALOGUE[shape](), names, gpu.device.type, dtype, ROUNDS, STEPS, clips=(False,)
        )
        base = next((r.get("ms") for r in found["rows"] if r["optimizer"] == plots.BASELINE), None)
        for row in found["rows"]:
            of_base = {"of AdamW fused": row["ms"] / base} if base and "ms" in row else {}
            kept = {key: row[key] for key in SHOWN if row.get(key) is not None}
            yield {"shape": shape, "weights": name_of(dtype), **kept, **of_base}
