"""Plan and measurement agree on the model states."""

import pytest

from novoscale.memory.measuring import Job, measure
from novoscale.memory.models import build
from novoscale.memory.optimizers import CANDIDATES
from novoscale.memory.planning import plan

LIMIT = 0.01


def planned(job):
    model = build(job.model, "meta")
    return plan(model, CANDIDATES[job.optimizer].state, job.cut, job.ranks, job.precision)


@pytest.mark.parametrize(
    "job",
    [
        Job("builtin", "torch AdamW", "none"),
        Job("builtin", "NovoGrad", "zero1", 3),
        Job("builtin", "torch AdamW", "zero3", 3),
        Job("builtin", "bitsandbytes AdamW8bit", "fsdp2", 3),
        Job("builtin", "NovoGrad", "fsdp2", 2, "bf16-mixed"),
        Job("builtin", "torch AdamW", "ddp", 2, "bfloat16"),
        Job("gpt2-1m", "torch AdamW", "zero1", 2, "bf16-mixed"),
        Job("gpt2-1m", "torch SGD with momentum", "zero2", 2, "bfloat16"),
        Job("gpt2-1m", "NovoGrad", "zero3", 2, "bf16-mixed"),
        Job("gpt2-1m", "torch Adafactor", "zero2", 2),
        Job("gpt2-1m", "NovoGrad", "offload", 2, "bf16-mixed"),
        Job("gpt2-1m", "bitsandbytes Lion8bit", "zero2", 2, "bf16-mixed"),
    ],
    ids=lambda job: f"{job.model}-{job.optimizer}-{job.cut}-{job.ranks}-{job.precision}",
)
def test_plan_agrees_with_measurement(job):
    expected = planned(job)
    measured = measure(job, timeout=200).accounts
    for kind in ("parameters", "state", "master_weights", "gradients"):
        bytes_of = lambda a, kind=kind: getattr(a, kind) if kind != "state" else a.state.total  # noqa: E731
        found = max(map(bytes_of, measured))
        assert getattr(expected, kind) == pytest.approx(found, rel=LIMIT), kind
