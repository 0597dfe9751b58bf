"""``python -m novoscale.run`` serves scripts that must not be changed."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from patience import patient

from novoscale.tools.local_ranks import remove_shared_memory

ROOT = Path(__file__).parent.parent

PORT = 29613
SCRIPT = """
import sys, deepspeed, torch
model = torch.nn.Linear(3, 2)
optimizer = {"type": "NovoGrad", "params": {"lr": 0.1}}
config = {"train_batch_size": 1, "zero_optimization": {"stage": 2}, "optimizer": optimizer}
engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
print(__name__, sys.argv[1:], type(engine.basic_optimizer).__name__)
import helper
"""
ACCELERATED = """
import torch
from accelerate import Accelerator
from accelerate.utils import DummyOptim

accelerator = Accelerator()
model = torch.nn.Linear(1, 4)
data = torch.utils.data.DataLoader(torch.arange(4.0)[:, None], batch_size=1)
engine, _, data = accelerator.prepare(model, DummyOptim(model.parameters()), data)
batches = [int(batch) for batch in data]
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
assert (accelerator.process_index, accelerator.num_processes) == (rank, world)
print(f"rank {rank} of {world}: {type(engine.basic_optimizer).__name__} on {batches}\\n", end="", flush=True)
"""


def run(folder, *command):
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)}
    try:
        return subprocess.run(
            [sys.executable, *command],
            cwd=folder,
            env={**os.environ, **ranks, **address},
            capture_output=True,
            text=True,
            timeout=patient(120),
        )
    finally:
        remove_shared_memory(PORT)


@pytest.mark.usefixtures("deepspeed_operation")
def test_unchanged_script_finds_novograd_by_name(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "train.py").write_text(SCRIPT)
    (tmp_path / "sub" / "helper.py").write_text("")
    done = run(tmp_path, "-m", "novoscale.run", "sub/train.py", "--epochs", "3")
    assert "__main__ ['--epochs', '3'] NovoGrad" in done.stdout, done.stderr
    assert done.returncode == 0, done.stderr
    assert "is not a supported DeepSpeed Optimizer" in run(tmp_path, "sub/train.py").stderr


def test_missing_script_is_named(tmp_path):
    done = run(tmp_path, "-m", "novoscale.run", "absent.py")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("absent.py: there is no such file. Usage:")


@pytest.mark.usefixtures("deepspeed_operation")
def test_ranks_of_accelerate_launch_train_on_different_batches(tmp_path):
    (tmp_path / "train.py").write_text(ACCELERATED)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = ["accelerate.commands.accelerate_cli", "launch", "--main_process_port", str(port)]
    command += ["--config_file", "configs/accelerate_zero2_novograd.yaml", "-m", "novoscale.run"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command, tmp_path / "train.py"],
            cwd=ROOT,
            env={**os.environ, "LOCAL_SIZE": "2"},
            capture_output=True,
            text=True,
            timeout=patient(120),
        )
    finally:
        remove_shared_memory(port)
    assert done.returncode == 0, done.stderr
    said = sorted(re.findall("rank .*", done.stdout))
    assert said == ["rank 0 of 2: NovoGrad on [0, 2]", "rank 1 of 2: NovoGrad on [1, 3]"]
