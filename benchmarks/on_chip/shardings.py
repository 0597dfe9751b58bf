"""Whether a model that is sharded over ranks on GPUs trains the same, by ``novoscale verify``."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from functools import partial

from benchmarks.configurations import CONFIGURATIONS
from benchmarks.on_chip.gpu import Gpu
from benchmarks.on_chip.rows import Row, attempted
from novoscale.verify import verify

NOVOGRAD = {"lr": 0.003, "preset": "adamw", "momentum_dtype": "int8"}
# The world size of each; the ranks share the GPUs of this machine.
CASES = {
    "DDP": 2,
    "FSDP2": 3,
    "stage 1": 3,
    "stage 2": 4,
    "stage 3, sub-groups": 3,
    "stage 3, no persistent parameters": 3,
    "stage 2, bf16": 2,
    "stage 3, bf16": 2,
    "stage 1, bf16, grad_accum_dtype fp32 (BF16_Optimizer)": 2,
    "stage 2, offload_optimizer": 2,
    "stage 3, offload_optimizer, offload_param": 2,
}


def compare(gpu: Gpu) -> Iterator[Row]:
    """Of each configuration how many bits differ, and how far the training ends from that of one process."""
    needed = ("deepspeed", "novoscale.integrations")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    for name, ranks in CASES.items():
        row: Row = {"configuration": name, "ranks": ranks}
        if missing and isinstance(CONFIGURATIONS[name], dict):  # DeepSpeed's
            yield row | {"why": f"not installed: {', '.join(missing)}"}
        else:
            yield attempted(row, partial(verified, gpu, name, ranks))


def verified(gpu: Gpu, name: str, ranks: int) -> Row:
    """What ``verify`` finds of the recommended NovoGrad under a configuration."""
    start = time.perf_counter()
    verdict = verify(
        CONFIGURATIONS[name],
        ranks=ranks,
        optimizer="novoscale:NovoGrad",
        options=NOVOGRAD,
        device=gpu.device.type,
    )
    different = sum(verdict.bits.different.values()) if verdict.bits else None
    parameter, deviation = verdict.training.worst
    found = {"differ": different, "deviation": deviation, "bound": verdict.training.bound, "of": parameter}
    failed = {} if verdict.passed else {"failed": "not the same training, or other bits"}
    return {**found, "seconds": time.perf_counter() - start, **failed}
