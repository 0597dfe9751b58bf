"""Run a function on several gloo ranks, each in a process of its own, with a timeout.

A collective mismatch aborts the process and a lost rank blocks the others, so no test calls a
collective in pytest's own process. Ranks are forked from a server that has imported torch and DeepSpeed
once: a case costs about a second.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_context = multiprocessing.get_context("forkserver")
# DeepSpeed and torch.optim import dynamo and inductor when first used: three seconds in every rank.
_context.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch._inductor.compile_fx",
        "torch.distributed.tensor",
        "deepspeed.runtime.zero.muon.original_muon",
    ]
)


class RankError(AssertionError):
    """A rank raised, died or did not end in time."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call ``function(*args)`` on every rank, torch.distributed being initialised; return the results.

    ``function`` must be importable by name and the result a thing that ``torch.save`` takes.

    Raises:
        RankError: with the traceback of the first rank that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        processes = [
            _context.Process(target=_rank, args=(rank, world_size, port, Path(folder), function, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, Path(folder), timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [torch.load(Path(folder) / f"result{rank}", weights_only=False) for rank in range(world_size)]


def _wait(processes: list[Any], folder: Path, timeout: float) -> None:
    end = time.monotonic() + timeout
    while any(p.exitcode is None for p in processes) and all(p.exitcode in (None, 0) for p in processes):
        if time.monotonic() > end:
            raise RankError(f"ranks {[i for i, p in enumerate(processes) if p.exitcode is None]} hang")
        time.sleep(0.01)
    if any(p.exitcode for p in processes):
        errors = [e.read_text() for e in sorted(folder.glob("error*"))]
        raise RankError("\n".join(errors) or f"exit codes {[p.exitcode for p in processes]}")


def _rank(
    rank: int, world_size: int, port: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo")
        torch.save(function(*args), folder / f"result{rank}")
        torch.distributed.destroy_process_group()
    except BaseException:
        (folder / f"error{rank}").write_text(f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
        os._exit(1)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
