"""Memory by phase: what was held before, at most, and after.

Two things are measured. *Allocated*: the bytes that torch's allocators have given out on each device, event
by event, as ``torch.profiler`` records them; exact, a temporary inside of an operator included. It reads no
peak counter and resets none, so DeepSpeed's own reports are not disturbed. What is allocated without torch
(pinned host memory, NCCL) is not in it. *Resident*: RSS and USS of the process, all its libraries included,
from the operating system.
"""

from __future__ import annotations

import functools
import gc
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

Span = tuple[int, int]  # nanoseconds


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
        import psutil  # which the commands that record nothing do without

        gc.collect()
        resettable = reset_peak_rss()
        with record_function(_mark(len(self._resident))):
            yield
            _synchronize()
        resident = psutil.Process().memory_full_info()
        self._resident.append((name, resident.rss, resident.uss, peak_rss() if resettable else None))

    def phases(self) -> list[Phase]:
        """The phases in the order in which they ran; call it after the recorder has been left."""
        spans, histories = self._recorded
        updates = [span for name, span in spans if name.startswith("Optimizer.step#")]  # torch records it

        def allocated(start: int, stop: int) -> dict[str, Allocated]:
            return {device: history.within(start, stop) for device, history in histories.items()}

        found = []
        for (start, stop), (name, *resident) in zip(self._of_phases(spans), self._resident, strict=True):
            inside = [allocated(*span) for span in updates if start <= span[0] <= stop]
            found.append(Phase(name, allocated(start, stop), inside, *resident))
        return found

    def timelines(self, slices: int) -> list[dict[str, list[int]]]:
        """Of each phase, by type of device: the most bytes in each of so many equal slices of its time."""
        spans, histories = self._recorded
        found = []
        for start, stop in self._of_phases(spans):
            edges = [start + (stop - start) * k // slices for k in range(slices + 1)]
            found.append(
                {
                    device: [history.within(*of_slice).peak for of_slice in itertools.pairwise(edges)]
                    for device, history in histories.items()
                }
            )
        return found

    @functools.cached_property
    def _recorded(self) -> tuple[list[tuple[str, Span]], dict[str, _History]]:
        """The names and times of what ran, and what was allocated on each type of device."""
        recorded: Any = self._profile.profiler
        events = recorded.kineto_results.events()
        spans = [(e.name(), (e.start_ns(), e.start_ns() + e.duration_ns())) for e in events]
        changes: dict[str, list[tuple[int, int]]] = {"cpu": []}
        for e in events:
            if e.name() == "[memory]":
                changes.setdefault(_device(e), []).append((e.start_ns(), e.nbytes()))
        return spans, {device: _History(changes[device]) for device in sorted(changes)}

    def _of_phases(self, spans: list[tuple[str, Span]]) -> list[Span]:
        named = dict(spans)
        return [named[_mark(index)] for index in range(len(self._resident))]


class _History:
    """What was allocated at each time."""

    def __init__(self, changes: list[tuple[int, int]]) -> None:
        changes = sorted(changes, key=lambda change: change[0])
        self._times = [at for at, _ in changes]
        self._levels = list(itertools.accumulate((change for _, change in changes), initial=0))

    def within(self, start: int, stop: int) -> Allocated:
        first, last = bisect_left(self._times, start), bisect_right(self._times, stop)
        levels = self._levels[first : last + 1]
        return Allocated(levels[0], max(levels), levels[-1])


def _mark(index: int) -> str:
    return f"novoscale.memory phase {index}"


def _device(event: Any) -> str:
    return str(event.device_type()).rsplit(".", 1)[-1].lower()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak_rss() -> bool:
    """Begin anew with the peak of RSS; False: the operating system does not let it be reset."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return False
    return True


def peak_rss() -> int | None:
    """The most bytes of this process that were in memory since the last reset; None: not known here."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
