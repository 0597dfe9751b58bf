"""This process in memory, as the operating system has it: over time, at most, and how much more there is."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from novoscale.memory.phases import peak_rss, reset_peak_rss

EVERY = 0.2  # seconds
CGROUPS = Path("/sys/fs/cgroup")


class Recording:
    """RSS of this process while it is entered: over time, and its peak within each span.

    Attributes:
        samples: seconds since the start, and bytes.
        peak: the most bytes so far.
    """

    def __init__(self) -> None:
        self.samples: list[tuple[float, int]] = []
        self.peak = 0

    def __enter__(self) -> Recording:
        reset_peak_rss()
        self._start = time.perf_counter()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    @contextmanager
    def span(self) -> Iterator[dict[str, Any]]:
        """Record what runs inside: its first and last second, bytes at its end and at most.

        Gives a dict that has them afterwards.
        """
        self._watch()  # what was before
        reset_peak_rss()
        found: dict[str, Any] = {"start_s": self._now()}
        yield found
        rss, peak = self._watch()
        found |= {"stop_s": self._now(), "rss": rss, "peak_rss": peak}

    def _watch(self) -> tuple[int, int]:
        rss = psutil.Process().memory_info().rss
        peak = max(peak_rss() or 0, rss)
        self.peak = max(self.peak, peak)
        return rss, peak

    def _now(self) -> float:
        return round(time.perf_counter() - self._start, 2)

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self.samples.append((self._now(), process.memory_info().rss))
            if self._ended.wait(EVERY):
                return


def available() -> tuple[int, str]:
    """Bytes that this process can still have, and what limits it: the machine, or its control group."""
    free = psutil.virtual_memory().available
    left = [n for folder in _groups() if (n := _left(folder)) is not None]
    return (min(left), "its control group") if left and min(left) < free else (free, "the machine")


def _groups() -> list[Path]:
    """The folders of this process's control group, and of those that it lies in."""
    found: list[Path] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            root = CGROUPS / "memory" if controllers else CGROUPS
            group = root / path.lstrip("/")
            found += [group, *(parent for parent in group.parents if parent.is_relative_to(root))]
    return found


def _left(group: Path) -> int | None:
    """What a control group may still take; None: it has no limit. Cached files are not in the way."""
    for limit, used, files in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, held = int((group / limit).read_text()), int((group / used).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        return most - held + int(stat.get(files, 0))
    return None
