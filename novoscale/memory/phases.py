"""Memory by phase: what was held before, at most, and after.

Two things are measured. *Allocated*: the bytes that torch's allocators have given out on each device, event
by event, as ``torch.profiler`` records them; exact, a temporary inside of an operator included. It reads no
peak counter and resets none, so DeepSpeed's own reports are not disturbed. What is allocated without torch
(pinned host memory, NCCL) is not in it. *Resident*: RSS and USS of the process, all its libraries included,
from the operating system.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity, profile, record_function


@dataclass(frozen=True)
class Allocated:
    """Bytes that torch had given out on one type of device; ``peak`` is the most within the phase."""

    before: int
    peak: int
    after: int

    @property
    def transient(self) -> int:
        """Bytes of the peak that the phase neither found nor left behind."""
        return self.peak - max(self.before, self.after)


@dataclass(frozen=True)
class Phase:
    """One phase of training on this rank.

    Attributes:
        name: as it was given to ``Recorder.phase``.
        allocated: by type of device, "cpu" or "cuda".
        updates: the same of each call of a torch optimizer's ``step`` in it, without the wrappers around it.
        rss: bytes of the process that are in memory, after the phase.
        uss: bytes that only this process has, after the phase.
        peak_rss: the most within the phase; None where the operating system does not let it be reset.
    """

    name: str
    allocated: dict[str, Allocated]
    updates: list[dict[str, Allocated]]
    rss: int
    uss: int
    peak_rss: int | None


class Recorder:
    """Records the phases that run inside of it: ``with Recorder() as r: with r.phase("step"): ...``.

    Start it before the model is made: memory that was allocated before is not known to it.
    """

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._resident: list[tuple[Any, ...]] = []  # name, rss, uss, peak_rss

    def __enter__(self) -> Recorder:
        self._profile.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.stop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record what runs inside as one phase.

        Garbage is collected before: DeepSpeed leaves gradients in reference cycles, whose end is chance.
        """
        gc.collect()
        resettable = _reset_peak_rss()
        with record_function(_mark(len(self._resident))):
            yield
            _synchronize()
        resident = psutil.Process().memory_full_info()
        self._resident.append((name, resident.rss, resident.uss, _peak_rss() if resettable else None))

    def phases(self) -> list[Phase]:
        """The phases in the order in which they ran; call it after the recorder has been left."""
        recorded: Any = self._profile.profiler
        events = recorded.kineto_results.events()
        spans = [(e.name(), (e.start_ns(), e.start_ns() + e.duration_ns())) for e in events]
        named = dict(spans)
        updates = [span for name, span in spans if name.startswith("Optimizer.step#")]  # torch records it
        memory = [(_device(e), e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        memory.sort(key=lambda event: event[1])
        devices = {"cpu", *(device for device, _, _ in memory)}
        changes = {
            device: [(at, change) for d, at, change in memory if d == device] for device in sorted(devices)
        }

        def allocated(span: tuple[int, int]) -> dict[str, Allocated]:
            return {device: _allocated(changes[device], span) for device in changes}

        found = []
        for index, (name, *resident) in enumerate(self._resident):
            start, stop = named[_mark(index)]
            inside = [allocated(span) for span in updates if start <= span[0] <= stop]
            found.append(Phase(name, allocated((start, stop)), inside, *resident))
        return found


def _allocated(changes: list[tuple[int, int]], span: tuple[int, int]) -> Allocated:
    start, stop = span
    before = sum(change for at, change in changes if at < start)
    inside = [change for at, change in changes if start <= at <= stop]
    running = list(itertools.accumulate(inside, initial=before))
    return Allocated(before, max(running), running[-1])


def _mark(index: int) -> str:
    return f"novoscale.memory phase {index}"


def _device(event: Any) -> str:
    return str(event.device_type()).rsplit(".", 1)[-1].lower()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak_rss() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return False
    return True


def _peak_rss() -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
