"""What a rank of ``novoscale verify`` does under DDP or FSDP2."""

from __future__ import annotations

from pathlib import Path

from novoscale.verify import runs
from novoscale.verify.config import Setup
from novoscale.verify.recording import Recorder, whole_tensors


def train(setup: Setup, folder: Path) -> None:
    """Train on this rank under ``setup.cut``; record it in ``folder``."""
    model, micro_batches = runs.make_model(setup)
    trained = runs.cut(model, setup.cut)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    params = list(named.values())
    optimizer = runs.make_optimizer(setup, params)
    recorder, where = Recorder(folder), whole_tensors(params)
    for step in range(setup.steps):
        optimizer.zero_grad()
        for batch in runs.mine(setup, micro_batches(step)):
            runs.loss_of(trained, batch, setup.dtype).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        recorder.end_step(where)
    recorder.end(where, {name: runs.whole(p.detach()) for name, p in named.items()})
