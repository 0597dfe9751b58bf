"""What a process runs for the tests of phases: a recorder has to start before the memory that it counts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from novoscale.memory.optimizers import CANDIDATES
from novoscale.memory.phases import Recorder


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
