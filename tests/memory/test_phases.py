"""Phases: what was held before, at most and after; exact, temporaries inside of operators included."""

import subprocess
import sys

import pytest

MIB = 2**20

# In a process of its own: a recorder has to start before the memory that it counts.
CODE = """
import json, sys, torch
from dataclasses import asdict
from novoscale.memory.optimizers import CANDIDATES
from novoscale.memory.phases import Recorder
with Recorder() as recorder:
    with recorder.phase("keeps 1 MiB of 3"):
        kept = torch.ones(2**18)
        torch.ones(2**19)
    with recorder.phase("frees"):
        del kept
    with recorder.phase("step"):
        p = torch.nn.Parameter(torch.ones(2**18))
        p.grad = torch.ones(2**18)
        optimizer = CANDIDATES[sys.argv[1]].make([p])
        optimizer.step()
        optimizer.step()
print(json.dumps([asdict(p) for p in recorder.phases()]))
"""


def phases(optimizer):
    import json

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, optimizer], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return {phase["name"]: phase for phase in json.loads(done.stdout.splitlines()[-1])}


def test_peak_and_rest_of_a_phase():
    found = phases("NovoGrad")
    first, frees = found["keeps 1 MiB of 3"]["allocated"]["cpu"], found["frees"]["allocated"]["cpu"]
    assert (first["before"], first["peak"], first["after"]) == (0, 3 * MIB, MIB)
    assert (frees["before"], frees["peak"], frees["after"]) == (MIB, MIB, 0)
    assert all(p["rss"] >= p["uss"] > 0 for p in found.values())
    peak = found["step"]["peak_rss"]
    assert peak is None or peak > 100 * MIB


@pytest.mark.parametrize(
    ("optimizer", "least", "most"),
    [("NovoGrad", 0, 0.05), ("torch AdamW, fused", 0, 0.05), ("torch AdamW, foreach", 1, 1.05)],
)
def test_what_an_update_takes_besides_its_result(optimizer, least, most):
    """Of the weights' 1 MiB: foreach AdamW holds a copy for a moment, NovoGrad nothing that grows."""
    warm_up, update = (u["cpu"] for u in phases(optimizer)["step"]["updates"])
    assert warm_up["after"] > update["before"] - MIB
    assert update["after"] == update["before"]
    assert least * MIB <= update["peak"] - update["after"] <= most * MIB
