"""DeepSpeed's operation for collectives of CPU ranks: built once, before the ranks start.

DeepSpeed has torch build it (half a minute of two cores) when its first process group is made, on every rank
at once: one builds, the others wait for a lock file. That file has no owner: when a build is killed it stays,
and every later start waits for it without a word. And torch's folder for it is one for all environments of
a user, while the commands name the environment: two environments make each other build again and again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO

from novoscale.tools.local_ranks import run_ranks

NAME = "deepspeed_shm_comm"
FOLDER = "TORCH_EXTENSIONS_DIR"  # torch's variable


_built: set[str] = set()  # folders, by this process


class LockError(RuntimeError):
    """A lock that no process holds any more, or one holds for too long."""


def build(timeout: float = 600) -> None:
    """Build the operation in a process of its own, if it is not there and DeepSpeed would want it.

    Unless the environment has ``TORCH_EXTENSIONS_DIR``, it is set here, to a folder of this environment and
    machine: what is started afterwards finds the operation there. A lock that was left there is removed; in
    a folder of the user's choice it is named.

    Args:
        timeout: seconds to wait for another process that builds, and then to build.

    Raises:
        RankError: a lock that was left (``LockError``), a compiler that fails, or no end in time; with what
            the build has printed last.
    """
    if sys.platform != "linux":  # DeepSpeed has it for no other
        return
    own = str(own_folder())
    folder = os.environ.setdefault(FOLDER, own)
    if folder in _built and not Path(folder, NAME, "lock").exists():
        return
    run_ranks(load, 1, folder == own, timeout, timeout=2 * timeout, quiet=True)
    _built.add(folder)


def own_folder() -> Path:
    """Where this environment builds on this machine."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    identity = hashlib.sha256(repr((sys.prefix, sys.version, socket.gethostname())).encode()).hexdigest()[:20]
    return home / "novoscale" / f"extensions-{identity}"


def load(own: bool, timeout: float) -> None:
    """Build and load as DeepSpeed does, when no other process is at it."""
    folder = Path(os.environ[FOLDER], NAME)
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + timeout
    # The system lets go of this one when its process ends, however it ends.
    with open(folder / "novoscale.lock", "w") as file:
        while not _locked(file):
            if time.monotonic() > end:
                raise LockError(_held(Path(file.name), timeout))
            time.sleep(0.2)
        _free(folder / "lock", own, end, timeout)
        from deepspeed.comm.torch import build_shm_op

        build_shm_op()


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _free(lock: Path, own: bool, end: float, timeout: float) -> None:
    """Wait until no process holds torch's lock; remove one that was left in a folder of our ``own``."""
    without_holder = 0
    while lock.exists():
        # Whoever releases it closes the file and then removes it: look twice.
        without_holder = 0 if _holders(lock) else without_holder + 1
        if without_holder > 1 and own:
            lock.unlink(missing_ok=True)
        elif without_holder > 1:
            raise LockError(
                f"{lock} was left by a build that was killed: no process of this machine holds it, and "
                "DeepSpeed would wait for it for ever. If no other machine builds there, delete it"
            )
        elif time.monotonic() > end:
            raise LockError(_held(lock, timeout))
        else:
            time.sleep(0.2)


def _held(lock: Path, timeout: float) -> str:
    by = ", ".join(str(pid) for pid in _holders(lock) if pid != os.getpid())
    return (
        f"{lock} is still held after {timeout:g} s, by process {by}, which builds DeepSpeed's operation for "
        "CPU ranks. Wait for it, or end it"
    )


def _holders(lock: Path) -> list[int]:
    """The processes that have a file open; while torch builds, it has its lock open."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.path.samefile(entry, lock):
                found.append(int(entry.parts[2]))
        except OSError:  # gone, or another user's
            continue
    return sorted(set(found))
