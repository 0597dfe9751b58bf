"""Where a result comes from: versions, machine, command, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("novoscale", "torch", "deepspeed", "accelerate", "transformers", "numpy", "triton"),
    *("bitsandbytes", "came-pytorch", "gefen-x", "pytorch_optimizer", "torchao"),
)


# What benchmarks and pictures write. A benchmark that is started again finds its own results there; they are
# no change of the code that its next results come from.
WRITTEN = ("benchmarks/results", "docs")


def make_command(target: str) -> str:
    """How ``make`` was asked for this process, by a target that starts it with ``ARGS``."""
    arguments = shlex.join(_arguments())
    return f'make {target} ARGS="{arguments}"' if arguments else f"make {target}"


def _arguments() -> list[str]:
    """The arguments of this process; of paths of this machine only the names: others have other folders."""
    parts = [argument.rpartition("=") for argument in sys.argv[1:]]
    return ["".join((*name, Path(a).name if Path(a).is_absolute() else a)) for *name, a in parts]


def provenance(command: str | None = None) -> dict[str, Any]:
    """Versions, machine, command and commit of this run.

    Args:
        command: what the user typed to get this result; default: this process's own command line.
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command or shlex.join(["python", sys.argv[0], *_arguments()]),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}


def _commit() -> str:
    """The commit of novoscale's repository; marked if tracked files differ from it, except in WRITTEN."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # an installed copy may lie in another's
        looked_at = (":(top)", *(f":(top,exclude){folder}" for folder in WRITTEN))
        modified = _git("status", "--porcelain", "-uno", "--", *looked_at)
        return _git("rev-parse", "--short=12", "HEAD") + (" (modified)" if modified else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
