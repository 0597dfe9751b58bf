"""What the parts ask of a GPU: what ran on it, how long, in how much memory; graphs; what it is."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], Any]

QUERIED = ("name", "driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit", "memory.total")


class Gpu:
    """The present CUDA or ROCm device. What the tests put in its place has no other.

    Attributes:
        device: where tensors are made.
    """

    device = torch.device("cuda")

    def wait(self) -> None:
        """Until all that was asked of the device is done."""
        torch.cuda.synchronize()

    def ran(self, run: Run) -> list[tuple[str, float]]:
        """The kernels and copies that ran on the device, each with its microseconds."""
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            run()
            self.wait()
        on_device = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return [(e.name, e.device_time) for e in on_device]

    def allocated(self) -> int:
        """Bytes that torch has given out."""
        return torch.cuda.memory_allocated()

    def free(self) -> int:
        """Bytes that other processes can have."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def peak(self, run: Run) -> int:
        """Bytes allocated at most while it ran."""
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.wait()
        return torch.cuda.max_memory_allocated()

    def warm(self, run: Run, times: int = 3) -> None:
        """Run on another stream, as torch asks for before a capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(times):
                run()
        torch.cuda.current_stream().wait_stream(stream)

    def captured(self, run: Run) -> Run:
        """A CUDA graph of a run, which is not run: what replays it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def about(self) -> dict[str, Any]:
        """Name, capability, and what the driver says of it, where it has ``nvidia-smi``."""
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        found = {"name": torch.cuda.get_device_name(), "capability": capability}
        command = ["nvidia-smi", f"--query-gpu={','.join(QUERIED)}", "--format=csv,noheader"]
        command += [f"--id={torch.cuda.current_device()}"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return found
        return dict(zip(QUERIED, said.strip().split(", "), strict=False)) | found
