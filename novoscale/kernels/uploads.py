"""Small tables that are made on the CPU and read on a device."""

from __future__ import annotations

import torch
from torch import Tensor


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Upload:
    """A table on a device, which may be written anew at any step without waiting for the device.

    While a CUDA graph is captured, the copy becomes part of the graph, which reads the same memory of the
    host at each replay. That memory is written to for that capture only, and kept.

    Args:
        values: on the CPU.
        device: where the table is.

    Attributes:
        on_device: the table.
    """

    def __init__(self, values: Tensor, device: torch.device) -> None:
        self._pinned = values.pin_memory() if device.type == "cuda" else values
        self.on_device = self._pinned.to(device, non_blocking=True)

    def write(self, values: Tensor) -> None:
        """Replace the table by ``values``: a tensor on the CPU, of the same shape and dtype."""
        if self.on_device.device.type != "cuda":
            self.on_device.copy_(values)
        elif capturing():
            self.on_device.copy_(self._pinned.copy_(values), non_blocking=True)
        else:
            # Other memory at each step, for the host runs ahead of the device; torch keeps a pool of it.
            self.on_device.copy_(values.pin_memory(), non_blocking=True)
