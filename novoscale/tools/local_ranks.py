"""Run functions on several ranks of this machine, each in a process of its own, with a timeout.

A collective that mismatches aborts its process, and a rank that is lost blocks the others: neither must
take the caller with it. Ranks are forked from a server that has imported torch (and DeepSpeed, where it is
installed) once, so that starting one costs a tenth of a second and not ten.
"""

from __future__ import annotations

import faulthandler
import gc
import io
import multiprocessing
import os
import pickle
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch

_forks = multiprocessing.get_context("forkserver")
_spawns = multiprocessing.get_context("spawn")  # for GPUs: CUDA does not survive a fork
_preloaded: list[str] = []

_LINES = 20  # of a rank that died or hangs, in the error
# What gloo says on the ranks that have lost another one: it is not what went wrong.
_LOST = re.compile("(closed|reset) by peer|Broken pipe|Connection refused")


def preload(*modules: str) -> None:
    """Have the server of this process import modules too, those that there are; before the first rank."""
    _preloaded.extend(module for module in modules if module not in _preloaded)
    _forks.set_forkserver_preload(_preloaded)


# torch.optim and DeepSpeed import dynamo and inductor when first used, and NovoGrad's integration imports
# what of Accelerate and transformers there is: seconds, for each rank.
preload(
    __name__,
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.tensor",
    "deepspeed.runtime.zero.muon.original_muon",
    "accelerate.accelerator",
    "transformers.integrations.deepspeed",
)


class RankError(RuntimeError):
    """A rank raised, died or did not end in time."""

    def brief(self) -> str:
        """Of each rank's traceback the line that says what is wrong; of what else there is, all.

        Lines that begin with "|" are what a rank has said, or where it was.
        """
        lines = [line for line in str(self).splitlines() if line and not line.startswith(" ")]
        errors = [line for line in lines if not re.match(r"Traceback|rank \d+ of \d+:$", line)]
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

    What modules read of the environment when they are imported is of the first call of this process.

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
        RankError: with the traceback of the ranks that failed, or the last lines of one that died or hangs.
    """
    with Ranks(world_size, backend, quiet) as ranks:
        return ranks.run(function, *args, timeout=timeout)


@dataclass(frozen=True)
class _Failure:
    text: str
    lost: bool  # the rank has only lost another one


class Ranks:
    """Ranks that stay, with their process group, for one call after another.

    A call finds the environment and the random numbers as they were when the ranks were started; what else
    it changes in its process is left to the next one. Where a call fails, the ranks are closed.

    Attributes:
        closed: no rank is left.
    """

    def __init__(self, world_size: int, backend: str = "gloo", quiet: bool = False) -> None:
        """Start ``world_size`` ranks; the arguments are those of ``run_ranks``."""
        self.closed = False
        self._quiet = quiet
        self._folder = tempfile.TemporaryDirectory(prefix="novoscale-ranks-")
        self._port = _free_port()
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._shown = [0] * world_size  # bytes of what each rank has printed
        # Before multiprocessing waits, when this process ends, for the ranks to end.
        self._close = Finalize(
            self, _close, (self._processes, self._connections, self._folder, self._port), exitpriority=100
        )
        context = _spawns if backend == "nccl" else _forks
        try:
            for rank in range(world_size):
                ours, its = context.Pipe()
                self._connections.append(ours)
                where = (rank, world_size, self._port, backend, self._folder.name, dict(os.environ))
                self._processes.append(context.Process(target=_serve, args=(its, *where)))
                self._processes[-1].start()
                its.close()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the ranks, and whatever they have started."""
        self.closed = True
        self._close()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """Call ``function(*args)`` on every rank; the rest is as of ``run_ranks``."""
        if self.closed:
            raise ValueError("these ranks are closed")
        call = pickle.dumps((function, args))
        try:
            for connection in self._connections:
                with suppress(OSError):  # of a rank that is dead already: found when it does not answer
                    connection.send_bytes(call)
            results = self._results(timeout)
            self._show()
        except BaseException:
            self.close()
            raise
        remove_shared_memory(self._port)  # every rank has it mapped by now
        return [torch.load(io.BytesIO(results.pop(0)), weights_only=False) for _ in self._processes]

    def _results(self, timeout: float) -> list[bytes]:
        end = time.monotonic() + timeout
        waiting = set(range(len(self._processes)))
        results: dict[int, bytes] = {}
        failures: dict[int, _Failure] = {}
        while waiting:
            ready = wait([of for rank in waiting for of in self._speaks(rank)], 0.1)
            for rank in [rank for rank in waiting if any(of in ready for of in self._speaks(rank))]:
                waiting.remove(rank)
                try:
                    done = self._connections[rank].recv()
                    results[rank] = self._connections[rank].recv_bytes()
                except (EOFError, OSError):
                    failures[rank] = self._died(rank)
                else:
                    if not done:
                        text = f"rank {rank} of {len(self._processes)}:\n{results[rank].decode()}"
                        failures[rank] = _Failure(text, bool(_LOST.search(text)))
            self._show()
            # The rank that is lost is heard of a moment after those that have lost it.
            end = min(end, time.monotonic() + 2) if failures else end
            if any(not failure.lost for failure in failures.values()) or (waiting and time.monotonic() > end):
                break
        if failures:
            causes = [failures[rank] for rank in sorted(failures) if not failures[rank].lost]
            raise RankError("\n".join(f.text for f in causes or failures.values()))
        if waiting:
            raise RankError(self._late(sorted(waiting), timeout))
        return [results[rank] for rank in range(len(results))]

    def _speaks(self, rank: int) -> tuple[Connection, int]:
        """What is readable when a rank has answered or died."""
        return self._connections[rank], self._processes[rank].sentinel

    def _died(self, rank: int) -> _Failure:
        process = self._processes[rank]
        process.join(5)
        code = process.exitcode
        how = f"exit code {code}" if code is None or code >= 0 else signal.Signals(-code).name
        text = f"rank {rank} of {len(self._processes)} died: {how}"
        return _Failure("\n| ".join([text, *self._last_lines(rank)]), lost=False)

    def _late(self, ranks: list[int], timeout: float) -> str:
        text = [f"ranks {ranks} of {len(self._processes)} did not end within {timeout:g} s"]
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)  # for them to write where they are
        for rank in ranks:
            stack = self._read(f"stack{rank}").decode(errors="replace").splitlines()[1:_LINES]
            text += [f"rank {rank} is in (innermost first)", *map(str.strip, stack), *self._last_lines(rank)]
        return "\n| ".join(text)

    def _last_lines(self, rank: int) -> list[str]:
        lines = self._read(f"printed{rank}").decode(errors="replace").splitlines()[-_LINES:]
        return [f"the last lines of rank {rank}:", *lines] if lines else []

    def _read(self, name: str, start: int = 0) -> bytes:
        with suppress(FileNotFoundError), open(Path(self._folder.name, name), "rb") as file:
            file.seek(start)
            return file.read()
        return b""

    def _show(self) -> None:
        for rank in range(0 if self._quiet else len(self._processes)):
            printed = self._read(f"printed{rank}", self._shown[rank])
            self._shown[rank] += len(printed)
            sys.stderr.write(printed.decode(errors="replace"))


def remove_shared_memory(port: int) -> None:
    """Remove what DeepSpeed's CPU collectives leave behind: 66 MiB of /dev/shm for each rank and run."""
    for file in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_*"):
        file.unlink(missing_ok=True)


def _close(
    processes: list[Any],
    connections: list[Connection],
    folder: tempfile.TemporaryDirectory[str],
    port: int,
) -> None:
    started = [process for process in processes if process.pid is not None]
    _kill({process.pid for process in started})
    for process in started:
        process.kill()  # it may not lead a session yet
        process.join()
    for connection in connections:
        connection.close()
    folder.cleanup()
    remove_shared_memory(port)


def _serve(
    connection: Connection,
    rank: int,
    world_size: int,
    port: int,
    backend: str,
    folder: str,
    environment: dict[str, str],
) -> None:
    """What a rank does: calls that come, until the caller is gone."""
    os.setsid()
    caller = multiprocessing.parent_process()
    threading.Thread(target=_die_with, args=(caller, port), daemon=True).start()
    environment = environment | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),  # else DeepSpeed probes the NUMA nodes of CPU ranks
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.dup2(os.open(Path(folder, f"printed{rank}"), os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    os.dup2(2, 1)  # what a rank prints is not the caller's output
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # there when the rank dies
    faulthandler.enable()
    stack = os.open(Path(folder, f"stack{rank}"), os.O_CREAT | os.O_WRONLY)
    faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
    if backend == "nccl":
        environment |= _on_gpu(rank, world_size)
    gc.freeze()  # what the server has imported is no garbage, and looking at it copies its memory
    torch.set_num_threads(max((os.cpu_count() or 1) // world_size, 1))
    numbers = torch.get_rng_state()
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            os._exit(0)
        os.environ.clear()
        os.environ.update(environment)
        torch.set_rng_state(numbers)
        try:
            if not torch.distributed.is_initialized():
                torch.distributed.init_process_group(backend)
            function, args = pickle.loads(call)
            result = io.BytesIO()
            torch.save(function(*args), result)
        except BaseException:
            connection.send(False)
            connection.send_bytes(traceback.format_exc().encode())
            os._exit(1)
        connection.send(True)
        connection.send_bytes(result.getbuffer())


def _on_gpu(rank: int, world_size: int) -> dict[str, str]:
    """Give this rank its GPU; returns what its environment needs besides."""
    gpus = torch.cuda.device_count()
    torch.cuda.set_device(rank % gpus)
    if world_size <= gpus:
        return {}
    # NCCL takes a GPU once on a host: ranks that share one pass for ranks of different hosts.
    return {"LOCAL_RANK": str(rank % gpus), "NCCL_HOSTID": f"rank{rank}", "NCCL_SOCKET_IFNAME": "lo"}


def _die_with(caller: Any, port: int) -> None:
    """Also when it is killed, and this rank hangs: with whatever the rank has started."""
    wait([caller.sentinel])
    remove_shared_memory(port)
    _kill({os.getpid()})


def _kill(leaders: set[int]) -> None:
    """Ranks, and whatever they have started: in groups of their own too, as ninja's compilers are."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            session = int(file.read_text().rsplit(")", 1)[1].split()[3])
            if session in leaders and int(file.parent.name) not in leaders:
                os.kill(int(file.parent.name), signal.SIGKILL)
    for leader in leaders:
        with suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
