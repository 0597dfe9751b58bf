"""Is the training the same when the model is sharded? Runs the user's configuration and finds out.

The model is trained for some steps under the given configuration, on ranks of this machine (of its CPU, or of
its GPUs), and in one process. Two things are found:

- *bits*: the gradients that the sharded optimizer was given, recorded at each step, are given to the same
  optimizer in one process. Its weights end identical, to the bit, or they do not. Only the sharding differs.
- *training*: one process computes its own gradients, in float64, and updates float64 copies of the weights.
  How far the sharded run ends from that is compared with what one process changes by itself, with another
  seed where the optimizer rounds by chance. The sharding differs, and the order in which gradients are
  summed.

*Training* decides what passes, for any torch optimizer. NovoGrad promises bits: for NovoGrad they have to be
identical too. Those of another optimizer are reported and decide nothing: a norm that is summed in another
order is another bit, and no other training. They tell where a fault lies: if the bits are identical and the
training is not the same, the wrapper's gradients are not those of one process.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from novoscale.tools.local_ranks import run_ranks
from novoscale.verify import findings, runs
from novoscale.verify.config import Setup, VerifyError, prepare
from novoscale.verify.findings import Training, Verdict
from novoscale.verify.recording import Bits

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}

__all__ = ["Bits", "Setup", "Training", "Verdict", "VerifyError", "verify"]


def verify(
    config: str | Path | dict[str, Any],
    *,
    ranks: int = 2,
    steps: int = 10,
    model: str = "novoscale.verify.runs:builtin_model",
    optimizer: str | None = None,
    options: dict[str, Any] | None = None,
    bound: float | None = None,
    timeout: float = 300,
    device: str = "cpu",
) -> Verdict:
    """Train under a configuration on local ranks and in one process; compare every parameter.

    Args:
        config: a DeepSpeed config (a dict, or the path of a JSON file), the path of an Accelerate YAML, or
            "ddp" or "fsdp2".
        ranks: to start.
        steps: optimizer steps.
        model: ``package.module:function``; the function returns an ``nn.Module`` whose forward takes a
            batch's entries and returns the loss (or has it in ``.loss``), and a function
            ``batch(step, samples)`` that returns a dict of tensors of ``samples`` rows each.
        optimizer: ``package.module:Class`` of any torch optimizer; default: the config's, or NovoGrad.
        options: keyword arguments of ``optimizer``.
        bound: largest deviation of the training that passes; default: see ``findings.judged_by``.
        timeout: seconds for DeepSpeed's operation to be built, for the ranks, and again for the one process.
        device: of the ranks: "cpu", with gloo; or "cuda", with NCCL, where ranks that outnumber the GPUs
            share them.

    Raises:
        VerifyError: something that cannot be put to the test; nothing has been run.
        RankError: a rank failed; with its traceback.
    """
    check_device(device)
    setup, notes = prepare(config, ranks, steps, model, optimizer, options, device)
    runs.check_model(setup)
    os.environ["DS_ACCELERATOR"] = device
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of the ranks
    if setup.sharding == "deepspeed" and device == "cpu":
        importlib.import_module("novoscale.tools.deepspeed_operation").build(timeout)
    by_deepspeed = setup.sharding == "deepspeed"
    where = "novoscale.integrations.deepspeed.training" if by_deepspeed else "novoscale.verify.torch_training"
    train = importlib.import_module(where).train
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = partial(run_ranks, timeout=timeout, backend=BACKENDS[device])
        run(train, ranks, setup, folder)
        bits, training = run(findings.find, 1, setup, folder, bound)[0]
    passed = findings.passes(setup, bits, training)
    return Verdict(passed, bits, training, setup.sharding, setup.optimizer, ranks, steps, notes)


def check_device(device: str) -> None:
    """Find out whether ranks can be on a type of device.

    Raises:
        VerifyError: they cannot.
    """
    if device not in BACKENDS:
        raise VerifyError(f"device {device}: there are {' and '.join(BACKENDS)}")
    if device == "cuda" and not (torch.cuda.is_available() and torch.distributed.is_nccl_available()):
        raise VerifyError(f"device cuda: torch {torch.__version__} finds no GPU, or has no NCCL")
