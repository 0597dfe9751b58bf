"""Run a function on several ranks of this machine, each in a process of its own, with a timeout.

A collective that mismatches aborts its process, and a rank that is lost blocks the others: neither must
take the caller with it. Ranks are forked from a server that has imported torch (and DeepSpeed, where it is
installed) once, so that starting one costs a tenth of a second and not ten.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

_context = multiprocessing.get_context("forkserver")
# torch.optim and DeepSpeed import dynamo and inductor when first used, which takes seconds.
_context.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch._inductor.compile_fx",
        "torch.distributed.tensor",
        "deepspeed.runtime.zero.muon.original_muon",
    ]
)


class RankError(RuntimeError):
    """A rank raised, died or did not end in time."""

    def brief(self) -> str:
        """Of each rank's traceback the line that says what is wrong; of a single line, itself."""
        lines = [line for line in str(self).splitlines() if line and not line.startswith(" ")]
        errors = [line for line in lines if not line.startswith(("Traceback", "rank "))]
        return "\n".join(dict.fromkeys(errors or lines))


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120,
    backend: str = "gloo",
    quiet: bool = False,
) -> list[Any]:
    """Call ``function(*args)`` on every rank, torch.distributed being initialised.

    The environment of the first call holds for all ranks of this process.

    Args:
        function: importable by its name.
        world_size: the number of ranks.
        args: picklable.
        timeout: seconds for all ranks to end.
        backend: of the process group.
        quiet: drop what the ranks print; else it goes to this process's standard error.

    Returns:
        What each rank returned; it must be a thing that ``torch.save`` takes.

    Raises:
        RankError: with the traceback of the ranks that failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), _free_port()
        processes = [
            _context.Process(
                target=_rank, args=(rank, world_size, port, backend, folder, quiet, function, args)
            )
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, folder, timeout)
            return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(world_size)]
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
            remove_shared_memory(port)


def remove_shared_memory(port: int) -> None:
    """Remove what DeepSpeed's CPU collectives leave behind: 66 MiB of /dev/shm for each rank and run."""
    for file in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_*"):
        file.unlink(missing_ok=True)


def _wait(processes: Sequence[Any], folder: Path, timeout: float) -> None:
    end = time.monotonic() + timeout
    while any(p.exitcode is None for p in processes) and not any(p.exitcode for p in processes):
        if time.monotonic() > end:
            waiting = [rank for rank, p in enumerate(processes) if p.exitcode is None]
            raise RankError(f"ranks {waiting} of {len(processes)} did not end within {timeout} s")
        time.sleep(0.01)
    if any(p.exitcode for p in processes):
        errors = [e.read_text() for e in sorted(folder.glob("error*"))]
        codes = [p.exitcode for p in processes]
        raise RankError("\n".join(errors) or f"a rank died: exit codes {codes}")


def _rank(
    rank: int,
    world_size: int,
    port: int,
    backend: str,
    folder: Path,
    quiet: bool,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),  # else DeepSpeed probes the NUMA nodes of CPU ranks
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    if quiet:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)  # what a rank prints is not the caller's output
    torch.set_num_threads(max((os.cpu_count() or 1) // world_size, 1))
    try:
        torch.distributed.init_process_group(backend)
        torch.save(function(*args), folder / f"result{rank}")
        torch.distributed.destroy_process_group()
    except BaseException:
        (folder / f"error{rank}").write_text(f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
        os._exit(1)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
