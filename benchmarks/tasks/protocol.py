"""What is run, decided before the first run: the same for every task and every optimizer.

1. **Learning rate.** Rates that differ by factors of two, from the optimizer's usual one on, until two that
   are worse have been tried on either side of the best. Seed 0, no weight decay.
2. **Weight decay**, of matrices only: at the best rate, its half and its double. 0.1; 0.001 for optimizers
   whose rates are larger by orders of magnitude (SGD, the paper's NovoGrad), for a step takes off lr * decay.
3. **Seeds.** The best of all these trials has further ones: five in all for AdamW, three for the others.
4. **Formats.** What differs from another optimizer in the format of its state only (and Adam-mini, which is
   said to take AdamW's options) has that one's rate and decay, and three seeds.
5. **Robustness**, at the best rate and decay, seed 0: no warm-up; initial matrices times 4, and by 4.
6. **Large batch**: eight times the batch, an eighth of the steps; a rate search of its own, from twice the
   best rate on, until one that is worse has been tried on either side.

7. **Long run**: a smaller model for 20,000 steps, AdamW and the preset in three formats, at the best rate and
   decay that they have on language-bpe; one seed.
8. **Fine-tuning**, of all weights and of LoRA: points 1 to 4 for AdamW and every form of NovoGrad.

A task's batch, steps, clipping and schedule (warm-up over a twentieth, cosine to a tenth) are the same for
all. A trial is as good as its loss on held-out data at the end of its schedule; one that diverged is worst.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

BETAS = (0.9, 0.98)
MOST_RATES = 14


@dataclass(frozen=True)
class Method:
    """An optimizer with its options.

    Attributes:
        kind: its class: of torch.optim, of pytorch_optimizer, of bitsandbytes.optim, or NovoGrad.
        rate: the learning rate that its search begins at.
        decay: the weight decay that is tried beside none.
        options: keyword arguments, beside lr and weight_decay.
        seeds: of the best run.
        like: the method that it has the rate and the decay of, instead of a search.
        robust: whether points 5 and 6 are for it.
    """

    kind: str
    rate: float = 0.002
    decay: float = 0.1
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 3
    like: str | None = None
    robust: bool = True


def _preset(momentum_dtype: str) -> Method:
    options = {"preset": "adamw", "momentum_dtype": momentum_dtype}
    return Method("NovoGrad", options=options, like="NovoGrad, adamw", robust=False)


# What is asked for first comes first.
METHODS = {
    "AdamW": Method("AdamW", options={"betas": BETAS}, seeds=5),
    "NovoGrad, adamw": Method("NovoGrad", options={"preset": "adamw"}),
    "NovoGrad, adamw, int8": _preset("int8"),
    "NovoGrad, adamw, int4": _preset("int4"),
    "NovoGrad, paper": Method("NovoGrad", 0.02, 0.001),
    "SGD": Method("SGD", 0.1, 0.001, {"momentum": 0.9}),
    # With all of its momentum_decay over at once, torch's NAdam has a constant beta1 (Dozat 2016).
    "NAdamW": Method(
        "NAdam", options={"betas": BETAS, "momentum_decay": 1e9, "decoupled_weight_decay": True}
    ),
    # Its rate is relative to the root mean square of the weights.
    "Adafactor": Method("Adafactor", 0.02),
    "AdamW8bit": Method("AdamW8bit", options={"betas": BETAS}, like="AdamW", robust=False),
    "Adam-mini": Method("AdamMini", options={"betas": BETAS}, like="AdamW", robust=False),
    "Lion": Method("Lion", 0.00025, options={"betas": (0.9, 0.99)}, robust=False),
}
BASELINE = "AdamW"


FORMS = ("NovoGrad, adamw", "NovoGrad, adamw, int8", "NovoGrad, adamw, int4")


@dataclass(frozen=True)
class Scope:
    """What of the protocol is for a task that is not one of the four.

    Attributes:
        methods: those it is for.
        like: the task whose best rates and decays it has, instead of a search.
        seeds: of the best run, at most.
    """

    methods: tuple[str, ...]
    like: str | None = None
    seeds: int = 3


SCOPES = {
    "long": Scope((BASELINE, *FORMS), like="language-bpe", seeds=1),
    "fine-tuning": Scope((BASELINE, "NovoGrad, paper", *FORMS)),
    "lora": Scope((BASELINE, "NovoGrad, paper", *FORMS)),
}


@dataclass(frozen=True)
class Variant:
    """How a training differs from the task's own."""

    warmup: bool = True
    init: float = 1.0  # a factor of the initial matrices
    batch: int = 1  # a factor of the batch; the samples stay


PLAIN, LARGE_BATCH = "", "batch x 8"
VARIANTS = {
    PLAIN: Variant(),
    "no warm-up": Variant(warmup=False),
    "init x 4": Variant(init=4.0),
    "init / 4": Variant(init=0.25),
    LARGE_BATCH: Variant(batch=8),
}
ROBUSTNESS = ("no warm-up", "init x 4", "init / 4")


class Run(NamedTuple):
    """One training."""

    task: str
    method: str
    lr: float
    weight_decay: float = 0.0
    seed: int = 0
    variant: str = PLAIN


class Results:
    """The losses of the runs that have ended."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.loss = {
            Run(*(row[name] for name in Run._fields)): math.inf if row["loss"] is None else row["loss"]
            for row in rows
        }

    def search(self, task: str, method: str) -> dict[Run, float]:
        """The trials of points 1 and 2: its own, or those of the task and the method that it is like."""
        task = SCOPES[task].like or task if task in SCOPES else task
        method = METHODS[method].like or method
        return {r: v for r, v in self.loss.items() if r == Run(task, method, r.lr, r.weight_decay)}

    def best(self, task: str, method: str) -> Run | None:
        """What to run at the best trial's rate and decay; None before there is a trial."""
        trials = self.search(task, method)
        if not trials:
            return None
        return min(trials, key=lambda run: trials[run])._replace(task=task, method=method)

    def large_batch(self, task: str, method: str) -> dict[Run, float]:
        """The trials of point 6."""
        return {
            r: v
            for r, v in self.loss.items()
            if r == Run(task, method, r.lr, r.weight_decay, variant=LARGE_BATCH)
        }

    def seeds(self, task: str, method: str) -> list[float]:
        """The losses of the best trial with every seed."""
        best = self.best(task, method)
        return [v for r, v in self.loss.items() if best and r == best._replace(seed=r.seed)]


def rates(first: float, loss: Callable[[float], float | None], either_side: int) -> list[float]:
    """The learning rates to try, as far as what is known tells."""
    low, high = -1, 1
    while True:
        known = {k: loss(first * 2.0**k) for k in range(low, high + 1)}
        tried = {k: v for k, v in known.items() if v is not None}
        if len(tried) == len(known) < MOST_RATES:
            best = min(tried, key=lambda k: tried[k])
            if best - low < either_side:
                low -= 1
                continue
            if high - best < either_side:
                high += 1
                continue
        return [first * 2.0**k for k in known]


def wanted(results: Results, tasks: Sequence[str], methods: Sequence[str]) -> Iterator[Run]:
    """Every run that can be told from what is known: optimizer by optimizer, robustness of all at the end."""
    pairs = [(t, m) for m in methods for t in tasks if t not in SCOPES or m in SCOPES[t].methods]
    for task, method in pairs:
        if METHODS[method].like is None and (task not in SCOPES or SCOPES[task].like is None):
            yield from search(results, task, method)
        best = results.best(task, method)
        if best is not None and finished(results, task, method):
            most = SCOPES[task].seeds if task in SCOPES else METHODS[method].seeds
            yield from (best._replace(seed=seed) for seed in range(most))
    for task, method in pairs:
        best = results.best(task, method)
        if (
            best is not None
            and METHODS[method].robust
            and task not in SCOPES
            and finished(results, task, method)
        ):
            yield from (best._replace(variant=variant) for variant in ROBUSTNESS)
            large = best._replace(variant=LARGE_BATCH)
            for lr in rates(2 * best.lr, lambda lr: results.loss.get(large._replace(lr=lr)), either_side=1):  # noqa: B023
                yield large._replace(lr=lr)


def finished(results: Results, task: str, method: str) -> bool:
    """Whether no trial is missing of the search that a method's rate on a task is from."""
    task = SCOPES[task].like or task if task in SCOPES else task
    return all(run in results.loss for run in search(results, task, METHODS[method].like or method))


def search(results: Results, task: str, method: str) -> Iterator[Run]:
    """Points 1 and 2 of a method that has a search of its own."""
    how = METHODS[method]
    plain = Run(task, method, 0.0)
    tried = rates(how.rate, lambda lr: results.loss.get(plain._replace(lr=lr)), either_side=2)
    yield from (plain._replace(lr=lr) for lr in tried)
    known = {lr: results.loss.get(plain._replace(lr=lr)) for lr in tried}
    losses = {lr: loss for lr, loss in known.items() if loss is not None}
    if len(losses) == len(known):
        best = min(losses, key=lambda lr: losses[lr])
        yield from (plain._replace(lr=lr, weight_decay=how.decay) for lr in (best / 2, best, best * 2))


def missing(results: Results, tasks: Sequence[str], methods: Sequence[str]) -> Iterator[Run]:
    """Of the wanted runs those that have no result."""
    return (run for run in dict.fromkeys(wanted(results, tasks, methods)) if run not in results.loss)
