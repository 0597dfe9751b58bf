"""What a rank of ``novoscale verify`` does under DDP or FSDP2."""

from __future__ import annotations

from pathlib import Path

from novoscale.verify import runs
from novoscale.verify.config import Setup
from novoscale.verify.recording import Recorder, full_tensors


def train(setup: Setup, folder: Path) -> None:
    """Train on this rank under ``setup.sharding``; record it in ``folder``."""
    model, micro_batches = runs.make_model(setup)
    trained = runs.shard(model, setup.sharding)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    params = list(named.values())
    optimizer = runs.make_optimizer(setup, params)
    recorder, where = Recorder(folder), full_tensors(params)
    for step in range(setup.steps):
        optimizer.zero_grad()
        for batch in runs.of_this_rank(setup, micro_batches(step)):
            runs.loss_of(trained, batch, setup.dtype).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        recorder.end_step(where)
    recorder.end(where, {name: runs.gathered(p.detach()) for name, p in named.items()})
