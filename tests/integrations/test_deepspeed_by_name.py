"""DeepSpeed's JSON names NovoGrad, and nothing has registered it."""

import os
import subprocess
import sys

import pytest
from patience import patient

SCRIPT = """
import deepspeed, novoscale, torch
model = torch.nn.Linear(3, 2)
config = {"train_batch_size": 1, "optimizer": {"type": "%s", "params": {"lr": 0.01}}, "zero_optimization": %s}
deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
"""


@pytest.mark.parametrize(("name", "zero"), [("NovoGrad", {"stage": 2}), ("novograd", {})])
def test_the_error_names_the_import(name, zero):
    one_rank = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT % (name, zero)],
        env={**os.environ, **one_rank},
        capture_output=True,
        text=True,
        timeout=patient(120),
    )
    assert done.returncode == 1
    assert (
        "import novoscale.integrations.deepspeed before deepspeed.initialize" in done.stderr.splitlines()[-1]
    )
