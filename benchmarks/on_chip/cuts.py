"""Whether the training is the same when the model is cut over ranks on GPUs: by ``novoscale verify``."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.on_chip.gpu import Gpu
from benchmarks.on_chip.rows import Row, attempted
from novoscale.verify import verify

NOVOGRAD = {"lr": 0.003, "preset": "adamw", "momentum_dtype": "int8"}
CPU = {"device": "cpu"}
BF16 = {"bf16": {"enabled": True}}


def zero(stage: int, more: dict[str, Any] | None = None, **section: Any) -> dict[str, Any]:
    """A DeepSpeed config with the recommended NovoGrad."""
    optimizer = {"type": "NovoGrad", "params": NOVOGRAD}
    section |= {"stage": stage}
    return {"zero_optimization": section, "gradient_clipping": 1.0, "optimizer": optimizer, **(more or {})}


# A configuration, and on how many ranks; they share what GPUs there are.
CASES: dict[str, tuple[str | dict[str, Any], int]] = {
    "DDP": ("ddp", 2),
    "FSDP2": ("fsdp2", 3),
    "stage 1": (zero(1), 3),
    "stage 2": (zero(2), 4),
    "stage 3": (zero(3, stage3_param_persistence_threshold=0, sub_group_size=3000), 3),
    "stage 2, bf16": (zero(2, BF16), 2),
    "stage 3, bf16": (zero(3, BF16), 2),
    "BF16_Optimizer": (zero(1, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}), 2),
    "stage 2, offload_optimizer": (zero(2, offload_optimizer=CPU), 2),
    "stage 3, offload_optimizer, offload_param": (zero(3, offload_optimizer=CPU, offload_param=CPU), 2),
}


def compare(gpu: Gpu) -> Iterator[Row]:
    """Of each configuration: bits, and how far the training ends from that of one process."""
    needed = ("deepspeed", "novoscale.integrations")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    for name, (config, ranks) in CASES.items():
        row: Row = {"configuration": name, "ranks": ranks}
        if missing and not isinstance(config, str):
            yield row | {"why": f"not installed: {', '.join(missing)}"}
        else:
            yield attempted(row, partial(verified, gpu, config, ranks))


def verified(gpu: Gpu, config: str | dict[str, Any], ranks: int) -> Row:
    """What ``verify`` finds."""
    start = time.perf_counter()
    own: dict[str, Any] = (
        {"optimizer": "novoscale:NovoGrad", "options": NOVOGRAD} if isinstance(config, str) else {}
    )
    verdict = verify(config, ranks=ranks, device=gpu.device.type, **own)
    different = sum(verdict.bits.different.values()) if verdict.bits else None
    parameter, deviation = verdict.training.worst
    found = {"differ": different, "deviation": deviation, "bound": verdict.training.bound, "of": parameter}
    failed = {} if verdict.passed else {"failed": "not the same training, or other bits"}
    return {**found, "seconds": time.perf_counter() - start, **failed}
