"""``python -m novoscale.run`` serves scripts that must not be changed."""

import os
import subprocess
import sys

import pytest

from novoscale.ranks import remove_shared_memory

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
            timeout=120,
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
