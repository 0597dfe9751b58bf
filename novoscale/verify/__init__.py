"""Is the training the same when the model is cut? Runs the user's configuration and finds out.

The model is trained for some steps on CPU ranks of this machine under the given configuration, and in one
process that computes the same gradients and updates float64 copies of the weights. What differs is the cut.
Any torch optimizer can be put to the test.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from novoscale.ranks import run_ranks
from novoscale.verify import runs
from novoscale.verify.config import Setup, VerifyError, load, prepare

__all__ = ["BOUNDS", "Setup", "Verdict", "VerifyError", "verify"]

# Relative to the largest magnitude of a parameter, after ten steps. float32: gradients that are summed in
# another order differ in their last bits. bfloat16: the model's weights have 8 bits, so that one unit in the
# last place is 2**-8; four of them.
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2.0**-6}


@dataclass(frozen=True)
class Verdict:
    """The outcome of one verification.

    Attributes:
        passed: no parameter deviates by more than ``bound``, or than by another seed.
        bound: what passes; see ``of_seeds``.
        deviations: for each parameter the largest difference of an element from one process, relative to the
            parameter's largest magnitude; largest first.
        notes: what was changed in the configuration to run it here.
        of_seeds: the largest deviation between two runs in one process that differ in the option ``seed``
            only, where it decides: an optimizer that rounds by chance (its momentum, its weights) does not
            compute the same numbers twice once a gradient differs in its last bit. A cut that changes less
            than another seed would is the same training. None: not needed, or there is no such option.
    """

    passed: bool
    bound: float
    deviations: dict[str, float]
    cut: str
    optimizer: str
    ranks: int
    steps: int
    notes: list[str]
    of_seeds: float | None = None

    @property
    def worst(self) -> tuple[str, float]:
        """The parameter that deviates most, and by how much."""
        return next(iter(self.deviations.items()))

    def to_json(self) -> str:
        """All of it, for machines."""
        name, deviation = self.worst
        return json.dumps({**asdict(self), "worst": {"parameter": name, "deviation": deviation}}, indent=1)


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
) -> Verdict:
    """Train under a configuration on local CPU ranks and in one process; compare every parameter.

    Args:
        config: a DeepSpeed config (a dict, or the path of a JSON file), the path of an Accelerate YAML, or
            "ddp" or "fsdp2".
        ranks: gloo ranks to start.
        steps: optimizer steps.
        model: ``package.module:function``; the function returns an ``nn.Module`` whose forward takes a
            batch's entries and returns the loss (or has it in ``.loss``), and a function
            ``batch(step, samples)`` that returns a dict of tensors of ``samples`` rows each.
        optimizer: ``package.module:Class`` of any torch optimizer; default: the config's, or NovoGrad.
        options: keyword arguments of ``optimizer``.
        bound: largest deviation that passes; default: 2e-5 for float32, 2**-6 for bfloat16, or what another
            ``seed`` of the optimizer changes in one process, if that is more.
        timeout: seconds for each of the two runs.

    Raises:
        VerifyError: something that cannot be put to the test; nothing has been run.
        RankError: a rank failed; with its traceback.
    """
    setup, notes = prepare(config, ranks, steps, model, optimizer, options)
    os.environ["DS_ACCELERATOR"] = "cpu"  # also where there is a GPU
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of the ranks
    expected = run_ranks(runs.one_process, 1, setup, timeout=timeout)[0]
    if setup.cut == "deepspeed":
        runner = importlib.import_module("novoscale.integrations.deepspeed_training").train
    else:
        runner = runs.under_torch
    found = run_ranks(runner, ranks, setup, timeout=timeout)[0]
    deviations = {name: deviation(found[name], w) for name, w in expected.items()}
    ordered = dict(sorted(deviations.items(), key=lambda item: item[1], reverse=True))
    limit = BOUNDS[setup.precision] if bound is None else bound
    worst = max(deviations.values())
    of_seeds = None
    if bound is None and worst > limit and "seed" in inspect.signature(load(setup.optimizer)).parameters:
        of_seeds = deviation_of_seeds(setup, expected, timeout)
        limit = max(limit, of_seeds)
    return Verdict(worst <= limit, limit, ordered, setup.cut, setup.optimizer, ranks, steps, notes, of_seeds)


def deviation_of_seeds(setup: Setup, expected: dict[str, Tensor], timeout: float) -> float:
    """How far another seed ends in one process: the largest deviation of a parameter.

    Args:
        setup: of the run with the first seed.
        expected: its weights.
        timeout: seconds.
    """
    other = {**setup.options, "seed": setup.options.get("seed", 0) ^ 1}  # in range, whatever the range is
    found = run_ranks(runs.one_process, 1, replace(setup, options=other), timeout=timeout)[0]
    return max(deviation(found[name], weight) for name, weight in expected.items())


def deviation(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest magnitude expected; infinite if not finite."""
    difference = (found.double() - expected.double()).abs().max()
    value = float(difference / expected.double().abs().max().clamp(min=1e-30))
    return value if math.isfinite(value) else math.inf
