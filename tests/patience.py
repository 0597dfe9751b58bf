"""How long a test waits: longer on a machine that has other work."""

from __future__ import annotations

import os


def patient(seconds: float) -> float:
    """So many seconds of a quiet machine: as many times more as it has processes waiting, and twice at least.

    ``NOVOSCALE_PATIENCE`` is a factor beside that, for a machine that is slow.
    """
    waiting = os.getloadavg()[0] / (os.cpu_count() or 1)
    return seconds * max(2.0, waiting) * float(os.environ.get("NOVOSCALE_PATIENCE", "1"))
