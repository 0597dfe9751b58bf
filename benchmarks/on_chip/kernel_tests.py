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
FILES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests" / "kernels" / "triton").glob("test_*.py"))
EXAMPLES = "20"  # of a test that draws its cases, each of which may be compiled anew
SELECTED = "not compiled_code and not instructions"  # for other chips, of one version of Triton
WORKERS = 14
NAME = re.compile(r"tests/kernels/\S+")
ENDS = {"passed": "PASSED", "failed_tests": "FAILED", "errors": "ERROR", "skipped": "SKIPPED"}


def run(gpu: Gpu, seconds: float, selected: str = SELECTED) -> Iterator[Row]:
    """One row: how many passed.

    Args:
        gpu: whose free memory limits how many run at once.
        seconds: after which they are stopped.
        selected: of pytest's ``-k``.
    """
    workers = max(1, min(WORKERS, os.cpu_count() or 1, gpu.free() >> 30))
    start = time.perf_counter()
    code, output = ended(command(selected, workers), seconds)
    lines = [line for line in output.splitlines() if "tests/kernels/" in line]
    counts = {key: sum(bool(re.search(rf"\b{word}\b", x)) for x in lines) for key, word in ENDS.items()}
    row: Row = {"files": " ".join(FILES), **counts, "seconds": time.perf_counter() - start}
    if code != 0:
        why = f"stopped after {seconds:.0f} s" if code is None else f"pytest ended with {code}"
        failed = [name for x in lines for name in NAME.findall(x) if re.search(r"\b(FAILED|ERROR)\b", x)]
        row |= {"failed": ", ".join([why, *failed]), "output": output[-5000:]}
    yield row


def command(selected: str, workers: int) -> list[str]:
    """Pytest's. Without tests/conftest.py, which needs DeepSpeed installed."""
    made = [sys.executable, "-m", "pytest", *FILES, "-k", selected]
    made += ["--noconftest", "-v", "-rN", "--tb=short", "-p", "no:cacheprovider"]
    return made + (["-n", str(workers)] if importlib.util.find_spec("xdist") else [])


def ended(command: list[str], seconds: float) -> tuple[int | None, str]:
    """The exit status of a command, None if it had to be stopped with all that it started; its output."""
    environment = {**os.environ, "NOVOSCALE_EXAMPLES": EXAMPLES}
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        code = None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        file.seek(0)
        return code, file.read()
