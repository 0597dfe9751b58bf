"""What ranks do that raise, die or hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist


def identity() -> tuple[int, int]:
    """The process, and how often this was called in it."""
    identity.calls = getattr(identity, "calls", 0) + 1
    return os.getpid(), identity.calls


def changes_its_environment() -> str:
    found = os.environ.get("NOVOSCALE_TEST", "absent")
    os.environ["NOVOSCALE_TEST"] = "changed"
    return found


def fails(how: str, folder: str) -> None:
    """Rank 1 fails, having started a process and said something; the others wait for it in a collective."""
    where = f"127.0.0.1_{os.environ['MASTER_PORT']}_{dist.get_rank()}"
    buffer = f"deepspeed_allreduce_buffer_{os.getuid()}_{where}"
    Path("/dev/shm", buffer).touch()  # as DeepSpeed does
    Path(folder, str(os.getpid())).write_text(buffer)
    if dist.get_rank() == 1:
        started = subprocess.Popen(["sleep", "1000"])
        Path(folder, str(started.pid)).touch()
        print("the last words of rank 1")
        if how == "raises":
            raise ValueError("no way to shard this")
        if how == "exits":
            os._exit(3)
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        hangs()
    dist.barrier()


def hangs() -> None:
    time.sleep(1000)


def caller(folder: str) -> None:
    """A process of ours with ranks that hang: to be killed."""
    from novoscale.tools.local_ranks import run_ranks

    run_ranks(fails, 2, "hangs", folder, timeout=1000)


if __name__ == "__main__":
    caller(sys.argv[1])
