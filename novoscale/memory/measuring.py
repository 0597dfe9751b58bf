"""What training really takes: two steps of a model, an optimizer and a sharding, on ranks of this machine."""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from novoscale.memory import models, releasing
from novoscale.memory.accounting import Account, account
from novoscale.memory.models import MemoryToolError
from novoscale.memory.optimizers import CANDIDATES, why_not_sharded
from novoscale.memory.phases import Phase, Recorder
from novoscale.memory.shardings import SHARDINGS, Training, set_up
from novoscale.tools.local_ranks import preload, run_ranks

# What models.build imports for most models; half a second for each rank.
preload("transformers.models.auto.modeling_auto", "transformers.models.gpt2.modeling_gpt2")

SLICES = 100
SAMPLED = 1024  # elements of a parameter, or a few more, by which two runs are compared


@dataclass(frozen=True)
class Job:
    """What is measured: names of a model, an optimizer, a sharding and a precision; and the number of ranks.

    Attributes:
        tokens: of the sample.
        release: gradients are released in the backward pass.
        checkpointing: activations are computed again in the backward pass (of transformers' models).
    """

    model: str
    optimizer: str
    sharding: str
    ranks: int = 1
    precision: str = "float32"
    release: bool = False
    tokens: int = models.TOKENS
    checkpointing: bool = False


@dataclass(frozen=True)
class Measured:
    """What one job took.

    Attributes:
        accounts: of each rank, after the backward pass of the second step, where everything is held.
        phases: of each rank: the model, and forward, backward and step of two steps, the first being the
            warm-up that makes the state.
        timelines: of each rank and phase, by device: the most bytes in each of ``SLICES`` parts of its time.
        alive: of each rank: the most bytes of gradients alive at once in the second step; None unless they
            are released.
        parameters: elements of the model.
        update: what two steps changed, by parameter: a sample of its elements, float32, on the CPU.
    """

    job: Job
    accounts: list[Account]
    phases: list[list[Phase]]
    timelines: list[list[dict[str, list[int]]]]
    alive: list[int | None]
    parameters: int
    update: dict[str, Tensor]

    @property
    def state_per_parameter(self) -> float:
        """Bytes of optimizer state of all ranks, over the elements of the model."""
        return sum(a.state.total for a in self.accounts) / self.parameters

    def step(self, rank: int) -> Phase:
        """The update of the second step on one rank."""
        return self.phases[rank][-1]

    def to_dict(self) -> dict[str, Any]:
        """All of it but timelines and update, for JSON; and in short, of the rank that has most.

        ``transient_bytes``: what the optimizer's second step allocates besides what it leaves; None where it
        is part of the backward pass, since gradients are released.
        """
        device = "cuda" if "cuda" in self.step(0).allocated else "cpu"
        updates = [u[device] for rank in range(len(self.phases)) for u in self.step(rank).updates]
        return {
            **asdict(self.job),
            "device": device,
            "parameters": self.parameters,
            "state_bytes_per_parameter": self.state_per_parameter,
            "state_bytes_per_rank": max(a.state.total for a in self.accounts),
            "peak_bytes_per_rank": max(
                p.allocated[device].peak for phases in self.phases for p in phases if device in p.allocated
            ),
            "gradient_bytes_per_rank": max(
                a.gradients if alive is None else alive
                for a, alive in zip(self.accounts, self.alive, strict=True)
            ),
            "transient_bytes": None if self.job.release else max(update.transient for update in updates),
            "rss_bytes_per_rank": max(p.rss for phases in self.phases for p in phases),
            "ranks_measured": [
                {"bytes": asdict(a), "phases": [asdict(p) for p in phases]}
                for a, phases in zip(self.accounts, self.phases, strict=True)
            ],
        }


def check(job: Job) -> None:
    """Raise MemoryToolError where a package is not installed, or gradients cannot be released."""
    why_not = releasing.why_not(job.optimizer, job.sharding) if job.release else None
    if why_not is not None:
        raise MemoryToolError(f"gradients are not released: {why_not}")
    if (why := why_not_sharded(job.optimizer, job.sharding)) is not None:
        raise MemoryToolError(why)
    if not CANDIDATES[job.optimizer].installed():
        raise MemoryToolError(f"not installed: pip install {CANDIDATES[job.optimizer].package}")
    if SHARDINGS[job.sharding] is not None and importlib.util.find_spec("deepspeed") is None:
        raise MemoryToolError("not installed: pip install deepspeed ninja")


def measure(job: Job, timeout: float = 300) -> Measured:
    """Train two steps on local ranks and count.

    Args:
        job: names of the catalogues; the sharding "none" has one rank, whatever the job says.
        timeout: seconds.

    Raises:
        MemoryToolError: see ``check``.
        RankError: a rank failed, or did not end in time.
    """
    check(job)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of the ranks
    backend = "nccl" if torch.cuda.device_count() >= job.ranks else "gloo"
    if backend == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"
        if SHARDINGS[job.sharding] is not None:
            importlib.import_module("novoscale.tools.deepspeed_operation").build(timeout)
    ranks = 1 if job.sharding == "none" else job.ranks
    found = run_ranks(_on_rank, ranks, job, timeout=timeout, backend=backend, quiet=True)
    *_, parameters, update = found[0]
    accounts, phases, timelines, alive = ([f[k] for f in found] for k in range(4))
    return Measured(job, accounts, phases, timelines, alive, parameters, update)


def deviation(found: Measured, unsharded: Measured) -> float:
    """How far the update of a sharded model is from that of the same training in one process.

    Every rank is given the same sample, so that the mean of the gradients is that of one process. The
    length of the difference over the length of the update: 0 is the same training.
    """
    difference = torch.cat([found.update[name] - u for name, u in unsharded.update.items()])
    return float(difference.norm() / torch.cat(list(unsharded.update.values())).norm())


def _on_rank(job: Job) -> tuple[Any, ...]:
    """What ``Measured`` has of one rank, in its order."""
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    with Recorder() as recorder:
        with recorder.phase("model"):
            model = models.build(job.model, device).train(job.checkpointing)  # it is for training only
            if job.checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
            parameters = sum(p.numel() for p in model.parameters())
            before = {name: _sample(p) for name, p in model.named_parameters()}
            training = set_up(model, CANDIDATES[job.optimizer], job.sharding, job.precision, job.release)
        sample = models.batch(job.model, model, device, job.tokens)
        for when in ("warm-up ", ""):
            held = _one_step(training, recorder, sample, when)
    trained = getattr(training.model, "module", training.model).named_parameters()
    update = {name: _sample(training.gathered(p)) - before[name] for name, p in trained}
    alive = training.alive.most if training.alive is not None else None
    return held, recorder.phases(), recorder.timelines(SLICES), alive, parameters, update


def _one_step(training: Training, recorder: Recorder, sample: dict[str, Tensor], when: str) -> Account:
    if training.alive is not None:
        training.alive.most = 0
    with recorder.phase(f"{when}forward"):
        loss = training.forward(sample)
    with recorder.phase(f"{when}backward"):
        training.backward(loss)
        del loss
    held = account(training.model, training.optimizer)
    with recorder.phase(f"{when}step"):
        training.step()
    return held


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    return flat[:: max(flat.numel() // SAMPLED, 1)].float().cpu().clone()
