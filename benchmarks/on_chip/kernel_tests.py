"""The kernels' own tests, on this chip."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.on_chip.gpu import Gpu
from benchmarks.on_chip.rows import Row

ROOT = Path(__file__).parent.parent.parent
FILES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests" / "kernels").glob("test_triton*.py"))
EXAMPLES = "20"  # of a test that draws its cases, each of which may be compiled anew
SELECTED = "not compiled_code"  # for other chips
WORKERS = 14
ENDS = {"passed": "PASSED", "failed_tests": "FAILED", "errors": "ERROR", "skipped": "SKIPPED"}


def run(gpu: Gpu, seconds: float, selected: str = SELECTED) -> Iterator[Row]:
    """One row: how many passed.

    Args:
        gpu: not asked: the tests find it.
        seconds: after which they are stopped.
        selected: of pytest's ``-k``.
    """
    # Without tests/conftest.py, which needs DeepSpeed installed.
    command = [
        sys.executable,
        "-m",
        "pytest",
        *FILES,
        "--noconftest",
        "-v",
        "-rN",
        "--tb=short",
        "-k",
        selected,
    ]
    command += ["-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    environment = {**os.environ, "NOVOSCALE_EXAMPLES": EXAMPLES}
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        file.seek(0)
        output = file.read()
    counts = {key: len(re.findall(rf"\b{word}\b", output)) for key, word in ENDS.items()}
    row: Row = {"files": " ".join(FILES), **counts}
    row["seconds"] = time.perf_counter() - start
    if code is None:
        row["failed"] = f"stopped after {seconds:.0f} s"
    elif code:
        row |= {"failed": f"pytest ended with {code}", "output": output[-5000:]}
    yield row
