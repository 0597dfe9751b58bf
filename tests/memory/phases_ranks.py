"""What a process runs for the tests of phases: a recorder has to start before the memory that it counts."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from typing import Any

import torch

from novoscale.memory.optimizers import CANDIDATES
from novoscale.memory.phases import Recorder

MIB = 2**20


def timeline(slices: int) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """A phase that rises to 1 MiB, after a while for a moment to 5, then to 2; and one that frees it."""
    with Recorder() as recorder:
        with recorder.phase("rises"):
            kept = [torch.empty(MIB // 4)]
            time.sleep(0.05)
            torch.empty(MIB)
            kept.append(torch.empty(MIB // 4))
            time.sleep(0.05)
        with recorder.phase("frees"):
            kept.clear()
            time.sleep(0.05)
    return [asdict(p) for p in recorder.phases()], [line["cpu"] for line in recorder.timelines(slices)]


def phases(optimizer: str) -> list[dict[str, Any]]:
    with Recorder() as recorder:
        with recorder.phase("keeps 1 MiB of 3"):
            kept = torch.ones(2**18)
            torch.ones(2**19)
        with recorder.phase("frees"):
            del kept
        with recorder.phase("step"):
            p = torch.nn.Parameter(torch.ones(2**18))
            p.grad = torch.ones(2**18)
            candidate = CANDIDATES[optimizer].make([p])
            candidate.step()
            candidate.step()
    return [asdict(phase) for phase in recorder.phases()]


def tied() -> tuple[int, int, int]:
    """Bytes of a tied embedding's gradient; bytes before the backward pass, and amid it."""
    embedding, layer = torch.nn.Embedding(5000, 64), torch.nn.Linear(64, 64)
    layer.weight.register_hook(lambda _: time.sleep(0.1))
    with Recorder() as recorder:
        with recorder.phase("forward"):
            x = layer(embedding(torch.ones(2, dtype=torch.int64)))
            loss = (x @ embedding.weight.T).sum()
        with recorder.phase("backward"):
            loss.backward()
    line = recorder.timelines(100)[1]["cpu"]
    return 4 * 5000 * 64, recorder.phases()[1].allocated["cpu"].before, statistics.mode(line)
