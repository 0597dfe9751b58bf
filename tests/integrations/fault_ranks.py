"""What each rank runs for the tests of faults: a training that saves, and is killed or cannot write."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import fixed_gradients
import torch
import torch.distributed as dist
from tools_ranks import error_of, made, stepped
from zero_ranks import engine

from novoscale import NovoGrad

SHAPES = {"wide": (300, 1300), "blocks": (400, 256), "small": (33,), "vector": (50000,), "few": (3, 15000)}
STEPS = 6
EVERY = 2  # steps between checkpoints


def die_in(seconds: float) -> None:
    """Have this process killed, whatever it does then: by a process of its own, which no lock holds up."""
    mine = os.getpid()
    if os.fork() == 0:
        try:
            time.sleep(seconds)
            os.kill(mine, signal.SIGKILL)
        finally:
            os._exit(0)


def said(folder: str, what: str) -> None:
    """A line in this rank's log, there when the process is gone."""
    with open(Path(folder, f"log{dist.get_rank()}"), "a") as file:
        file.write(what + "\n")


class Zero:
    """A training under DeepSpeed."""

    def __init__(self, ds: dict[str, Any], folder: str) -> None:
        self.folder, self.engine = folder, engine(ds, model=fixed_gradients.FixedGradients(SHAPES))

    def step(self, number: int) -> None:
        stepped(self.engine, range(number, number + 1))

    def save(self, number: int) -> None:
        self.engine.save_checkpoint(self.folder, tag=f"step{number}")

    def load(self, tag: str) -> None:
        self.engine.load_checkpoint(self.folder, tag=tag)

    def pieces(self) -> list[fixed_gradients.Piece]:
        return fixed_gradients.pieces(self.engine.basic_optimizer)


class Fsdp2:
    """A training under FSDP2, saved by torch.distributed.checkpoint."""

    def __init__(self, options: dict[str, Any], folder: str) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.folder, self.model = folder, fixed_gradients.FixedGradients(SHAPES)
        fully_shard(self.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.optimizer = NovoGrad(self.model.named_parameters(), **{"preset": "paper", **options})

    def step(self, number: int) -> None:
        self.optimizer.zero_grad()
        self.model(torch.tensor(number)).backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        weights, state = get_state_dict(self.model, self.optimizer)
        return {"model": weights, "optimizer": state}

    def save(self, number: int) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(self.state(), checkpoint_id=f"{self.folder}/step{number}")

    def load(self, tag: str) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict

        state = self.state()
        dcp.load(state, checkpoint_id=f"{self.folder}/{tag}")
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def pieces(self) -> list[fixed_gradients.Piece]:
        return fixed_gradients.pieces(self.optimizer)


def training(
    given: dict[str, Any],
    folder: str,
    tag: str | None = None,
    kill: tuple[int, str, int, float] | None = None,
) -> tuple[list[fixed_gradients.Piece], dict[str, list[float]]]:
    """Train to the end, from the beginning or a checkpoint.

    Args:
        given: DeepSpeed's config, or "fsdp2" and the options.
        folder: of the checkpoints.
        tag: of one, "step" and a number.
        kill: which rank, in which phase ("step" or "save") of which step, how many seconds after it begins.

    Returns:
        What this rank holds at the end, and the seconds that each phase took.
    """
    made = Fsdp2(given["fsdp2"], folder) if "fsdp2" in given else Zero(given, folder)
    if tag is not None:
        made.load(tag)
    took: dict[str, list[float]] = {"step": [], "save": []}

    def phase(name: str, number: int) -> None:
        said(folder, f"{name} {number}")
        if kill is not None and kill[:3] == (dist.get_rank(), name, number):
            die_in(kill[3])
        start = time.monotonic()
        getattr(made, name)(number)
        took[name].append(time.monotonic() - start)
        said(folder, f"{name} {number} done")

    for number in range(0 if tag is None else int(tag.removeprefix("step")), STEPS):
        phase("step", number)
        if (number + 1) % EVERY == 0:
            phase("save", number + 1)
    if kill is not None:  # it may come late
        dist.barrier()
        time.sleep(1)
    return made.pieces(), took


# ---- faults that are no deaths -----------------------------------------------------------------------------


def disk_full(ds: dict[str, Any], folder: str, rank: int, limit: int) -> tuple[str, str, bool]:
    """A rank cannot write: the error, what "latest" names then, and whether saving works again after it."""
    made = Zero(ds, folder)
    made.step(0)
    made.save(1)
    made.step(1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    error = error_of(lambda: made.save(2))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    latest = Path(folder, "latest").read_text()
    made.save(3)
    other = Zero(ds, folder)
    other.load("step3")
    same = all(
        torch.equal(a[2], b[2]) and torch.equal(a[3], b[3])
        for a, b in zip(made.pieces(), other.pieces(), strict=True)
    )
    return error, latest, same


def distributed_disk_full(folder: str, rank: int, limit: int) -> tuple[str, bool]:
    """The error where a rank cannot write, and whether the checkpoint before loads."""
    from torch.distributed.checkpoint.api import CheckpointException  # no Exception

    made = Fsdp2({"lr": 0.05, "momentum_dtype": "int4"}, folder)
    made.step(0)
    made.save(1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    error = "no error"
    try:
        made.save(2)
    except CheckpointException as exception:
        error = str(exception)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    other = Fsdp2({"lr": 0.05, "momentum_dtype": "int4"}, folder)
    other.load("step1")
    return error, all(
        torch.equal(a[2], b[2]) and torch.equal(a[3], b[3])
        for a, b in zip(made.pieces(), other.pieces(), strict=True)
    )


def loading_error(ds: dict[str, Any], folder: str, tag: str | None, shapes: Any = SHAPES) -> tuple[str, bool]:
    """The error of loading a checkpoint, and whether the optimizer's state and weights are what they were."""
    e = engine(ds, model=fixed_gradients.FixedGradients(shapes))
    stepped(e, range(1))
    before = [(w.clone(), m.clone()) for *_, w, m in fixed_gradients.pieces(e.basic_optimizer)]
    error = error_of(lambda: e.load_checkpoint(folder, tag=tag))
    after = fixed_gradients.pieces(e.basic_optimizer)
    return error, all(
        torch.equal(a, w) and torch.equal(b, m) for (a, b), (*_, w, m) in zip(before, after, strict=True)
    )


def saved_once(ds: dict[str, Any], folder: str) -> None:
    made = Zero(ds, folder)
    made.step(0)
    made.save(1)


def nan_in_a_micro_batch(ds: dict[str, Any], rank: int, micro: int) -> list[bool]:
    """Whether a step with a NaN in one rank's part of one micro-batch changes nothing, and the next does."""
    e = made(ds, steps=0)
    accumulate = e.gradient_accumulation_steps()

    def step(number: int, poison: bool) -> None:
        for nth in range(accumulate):
            loss = e(torch.tensor(number))
            e.backward(loss * float("nan") if poison and (dist.get_rank(), nth) == (rank, micro) else loss)
            e.step()

    def held() -> list[torch.Tensor]:
        tensors = [t for s in e.basic_optimizer.state.values() for t in s.values()]
        return [t.clone() for t in (*tensors, *(w for *_, w, _ in fixed_gradients.pieces(e.basic_optimizer)))]

    step(0, False)
    before = held()
    step(1, True)
    skipped = held()
    step(2, False)
    same = [torch.equal(a, b) for a, b in zip(before, skipped, strict=True)]
    return [all(same), not all(torch.equal(a, b) for a, b in zip(skipped, held(), strict=True))]


def options_differ(ds: dict[str, Any], option: str, value: Any) -> str:
    """The error where the last rank has another value of an option."""
    if dist.get_rank() == dist.get_world_size() - 1:
        ds["optimizer"]["params"][option] = value

    def run() -> None:
        stepped(engine(ds, model=fixed_gradients.FixedGradients()), range(2))

    return error_of(run)


def kinds_of_state(ds: dict[str, Any]) -> list[str]:
    """The classes of all that is in the optimizer's state dict."""
    found = set()

    def look(value: Any) -> None:
        found.add("Tensor" if isinstance(value, torch.Tensor) else type(value).__name__)
        if isinstance(value, dict):
            for key, item in value.items():
                look(key)
                look(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                look(item)

    optimizer = made(ds).basic_optimizer
    look(list(optimizer.state.values()))
    look([{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups])
    return sorted(found)
