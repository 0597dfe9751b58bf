"""What ``verify`` finds: *bits* and *training*, and what passes."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from novoscale.optimizer.novograd import NovoGrad
from novoscale.verify import recording, runs
from novoscale.verify.config import Setup, load
from novoscale.verify.recording import Bits

# Of a deviation, after ten steps. float32: gradients that are summed in another order differ in their last
# bits. bfloat16: the model's weights have 8 bits, so that one unit in the last place is 2**-8; four of them.
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2.0**-6}
# Gradients rounded otherwise are drawn so often, and the ranks' are one draw more, which may be the largest:
# so many times of it passes. In bfloat16 other weights move gradients by more than they are rounded by.
DRAWS, MARGINS = 3, {torch.float32: 4, torch.bfloat16: 1}


@dataclass(frozen=True)
class Training:
    """How far the sharded run ends from one process.

    Attributes:
        passed: no parameter deviates by more than ``bound``.
        bound: what passes.
        rule: where the bound comes from, in words.
        deviations: for each parameter the largest difference of an element from one process, relative to the
            parameter's largest magnitude; largest first.
    """

    passed: bool
    bound: float
    rule: str
    deviations: dict[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The parameter that deviates most, and by how much."""
        return next(iter(self.deviations.items()))


@dataclass(frozen=True)
class Verdict:
    """The outcome of one verification.

    Attributes:
        passed: the training is the same; and for NovoGrad, which promises them, the bits are identical.
        bits: None: a wrapper steps something else than its tables say, so that nothing was compared.
        notes: what was changed in the configuration to run it here.
    """

    passed: bool
    bits: Bits | None
    training: Training
    sharding: str
    optimizer: str
    ranks: int
    steps: int
    notes: list[str]

    def to_json(self) -> str:
        """All of it, for machines."""
        content = asdict(self)
        name, deviation = self.training.worst
        content["training"]["worst"] = {"parameter": name, "deviation": deviation}
        return json.dumps(content, indent=1)


def passes(setup: Setup, bits: Bits | None, training: Training) -> bool:
    """Whether this is what the optimizer promises.

    An optimizer that is not the same bits when it is sharded may still train the same: for those that do not
    promise bits they are reported and decide nothing.
    """
    promised = issubclass(load(setup.optimizer), NovoGrad)
    return training.passed and (not promised or (bits is not None and bits.identical))


def find(setup: Setup, folder: Path, bound: float | None) -> tuple[Bits | None, Training]:
    """Do in one process what is to be compared with the sharded run that was recorded in ``folder``."""
    outcome = torch.load(folder / "outcome")
    # As many as a rank had: sums of other optimizers may depend on it, and busy cores wait for each other.
    torch.set_num_threads(outcome["threads"])
    return recording.replay(setup, folder), compare(setup, outcome["weights"], bound)


def compare(setup: Setup, found: Mapping[str, Tensor], bound: float | None) -> Training:
    """Compare weights with those of training in one process.

    Args:
        setup: of the sharded run.
        found: the weights that it ended with.
        bound: the largest deviation that passes; None: see :func:`judged_by`.
    """
    expected = runs.one_process(setup)
    deviations = {name: deviation(found[name], weight) for name, weight in expected.items()}
    worst = max(deviations.values())
    limit, rule = judged_by(setup, expected, worst) if bound is None else (bound, "the bound given")
    ordered = dict(sorted(deviations.items(), key=lambda item: item[1], reverse=True))
    return Training(worst <= limit, limit, rule, ordered)


def judged_by(setup: Setup, expected: Mapping[str, Tensor], worst: float) -> tuple[float, str]:
    """The largest deviation that passes, and where it comes from.

    A constant for the dtype of the gradients. Where that is too little, what one process changes by itself:
    with another seed, if the optimizer takes one and rounds by chance; with gradients that are rounded
    otherwise, which Adam enlarges where they are close to zero. A sharding that changes no more is the same
    training. Weights that the optimizer rounds to bfloat16 by chance are judged by another seed only.

    Args:
        setup: of the sharded run.
        expected: the weights of one process.
        worst: the deviation that is to be judged; what cannot matter to it is not run.
    """
    limit, rule = BOUNDS[setup.precision], f"the bound for {str(setup.precision).removeprefix('torch.')}"
    rounded = setup.weights == torch.bfloat16
    if rounded or worst > limit:
        of_seeds = _of_seeds(setup, expected)
        if of_seeds > limit or (rounded and of_seeds):
            limit, rule = of_seeds, "another seed in one process"
        elif rounded:
            rule += ", as no seed decides how the weights are rounded"
    margin = MARGINS[setup.precision]
    otherwise = f"{margin} times other rounding of gradients in one process"
    for draw in range(0 if rounded else DRAWS):
        if worst > limit:
            drawn = margin * _farthest(runs.one_process(setup, rounding=draw), expected)
            limit, rule = max((limit, rule), (drawn, otherwise))
    return limit, rule


def _of_seeds(setup: Setup, expected: Mapping[str, Tensor]) -> float:
    """How far another seed ends in one process; 0 if the optimizer takes none."""
    if "seed" not in inspect.signature(load(setup.optimizer)).parameters:
        return 0.0
    other = {**setup.options, "seed": setup.options.get("seed", 0) ^ 1}  # in range, whatever the range is
    return _farthest(runs.one_process(replace(setup, options=other)), expected)


def _farthest(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    return max(deviation(found[name], weight) for name, weight in expected.items())


def deviation(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest magnitude expected; infinite if not finite."""
    difference = (found.double() - expected.double()).abs().max()
    value = float(difference / expected.double().abs().max().clamp(min=1e-30))
    return value if math.isfinite(value) else math.inf
