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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks import trials
from benchmarks.trials import BETAS, NADAMW, rates

MOST_RATES = 14


@dataclass(frozen=True)
class Method:
    """An optimizer with its options.

    Attributes:
        kind: its class: see trials.make_optimizer.
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


def _preset(preset: str, momentum_dtype: str) -> Method:
    options = {"preset": preset, "momentum_dtype": momentum_dtype}
    return Method("NovoGrad", options=options, like=f"NovoGrad, {preset}", robust=False)


# What is asked for first comes first.
METHODS = {
    "AdamW": Method("AdamW", options={"betas": BETAS}, seeds=5),
    "NovoGrad, adamw": Method("NovoGrad", options={"preset": "adamw"}),
    "NovoGrad, adamw, int8": _preset("adamw", "int8"),
    "NovoGrad, adamw, int4": _preset("adamw", "int4"),
    # Added when Adafactor, whose rate is relative to the weights too, had won on translation.
    "NovoGrad, adamw, scaled": Method("NovoGrad", 0.02, options={"preset": "adamw", "scale_parameter": True}),
    "NovoGrad, paper": Method("NovoGrad", 0.02, 0.001, {"preset": "paper"}),
    "NovoGrad, muon": Method("NovoGrad", options={"preset": "muon"}),
    "NovoGrad, muon, int8": _preset("muon", "int8"),
    "NovoGrad, muon, int4": _preset("muon", "int4"),
    "SGD": Method("SGD", 0.1, 0.001, {"momentum": 0.9}),
    "NAdamW": Method("NAdam", options=NADAMW),
    # Its rate is relative to the root mean square of the weights.
    "Adafactor": Method("Adafactor", 0.02),
    "AdamW8bit": Method("AdamW8bit", options={"betas": BETAS}, like="AdamW", robust=False),
    "Adam-mini": Method("AdamMini", options={"betas": BETAS}, like="AdamW", robust=False),
    "Lion": Method("Lion", 0.00025, options={"betas": (0.9, 0.99)}, robust=False),
}
BASELINE = "AdamW"
FORMS = ("NovoGrad, adamw", "NovoGrad, adamw, int8", "NovoGrad, adamw, int4")
MUON = ("NovoGrad, muon", "NovoGrad, muon, int8", "NovoGrad, muon, int4")


@dataclass(frozen=True)
class Scope:
    """What of the protocol is for a task.

    Attributes:
        methods: those it is for.
        like: the task whose best rates and decays it has, instead of a search.
        seeds: of the best run, at most.
        papers: whether it is one of the paper's tasks: points 5 and 6 are for those only.
    """

    methods: tuple[str, ...] = tuple(METHODS)
    like: str | None = None
    seeds: int = 5
    papers: bool = True


SCOPES = {
    "long": Scope((BASELINE, *FORMS, *MUON), like="language-bpe", seeds=1, papers=False),
    "fine-tuning": Scope((BASELINE, "NovoGrad, paper", *FORMS, *MUON), seeds=3, papers=False),
    "lora": Scope((BASELINE, "NovoGrad, paper", *FORMS, *MUON), seeds=3, papers=False),
}


def scope(task: str) -> Scope:
    """That of a task: all of the protocol, unless SCOPES says less."""
    return SCOPES.get(task, Scope())


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
    """The runs that have ended.

    Attributes:
        rows: what was measured, by run.
        loss: of each run; infinite if it diverged.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = trials.by_run(Run, rows)
        self.loss = trials.losses(Run, rows)

    def search(self, task: str, method: str) -> dict[Run, float]:
        """The trials of points 1 and 2: its own, or those of the task and the method that it is like."""
        task, method = searched(task, method)
        return {r: v for r, v in self.loss.items() if r == Run(task, method, r.lr, r.weight_decay)}

    def best(self, task: str, method: str) -> Run | None:
        """What to run at the best trial's rate and decay; None before no trial is missing."""
        if not all(run in self.loss for run in search(self, *searched(task, method))):
            return None
        best = trials.best(self.search(task, method))
        return best and best._replace(task=task, method=method)

    def by_rate(self, run: Run) -> dict[float, float]:
        """The losses of a run with every learning rate that it has, in their order."""
        return dict(sorted((r.lr, loss) for r, loss in self.loss.items() if r == run._replace(lr=r.lr)))

    def large_batch(self, task: str, method: str) -> dict[Run, float]:
        """The trials of point 6."""
        plain = Run(task, method, 0.0, variant=LARGE_BATCH)
        return {
            r: v for r, v in self.loss.items() if r == plain._replace(lr=r.lr, weight_decay=r.weight_decay)
        }


def searched(task: str, method: str) -> tuple[str, str]:
    """The task and the method whose search gives the rate of a method on a task."""
    return scope(task).like or task, METHODS[method].like or method


def search(results: Results, task: str, method: str) -> Iterator[Run]:
    """Points 1 and 2 of a method that has a search of its own."""
    how, plain = METHODS[method], Run(task, method, 0.0)
    losses = results.by_rate(plain)
    tried = rates((how.rate / 2, how.rate, how.rate * 2), losses.get, either_side=2, most=MOST_RATES)
    yield from (plain._replace(lr=lr) for lr in tried)
    if all(lr in losses for lr in tried):
        best = trials.best({lr: losses[lr] for lr in tried})
        yield from (plain._replace(lr=lr, weight_decay=how.decay) for lr in (best / 2, best, best * 2))


def large_batch(results: Results, best: Run) -> Iterator[Run]:
    """Point 6."""
    plain = best._replace(variant=LARGE_BATCH)
    known = results.by_rate(plain)
    tried = rates((best.lr, 2 * best.lr, 4 * best.lr), known.get, either_side=1, most=MOST_RATES)
    yield from (plain._replace(lr=lr) for lr in tried)


def wanted(
    results: Results, tasks: Sequence[str], methods: Sequence[str], robustness: bool = True
) -> Iterator[Run]:
    """Every run that can be told from what is known, optimizer by optimizer; points 5 and 6 if asked."""
    for task, method in ((t, m) for m in methods for t in tasks if m in scope(t).methods):
        if searched(task, method) == (task, method):
            yield from search(results, task, method)
        if (best := results.best(task, method)) is None:
            continue
        seeds = min(METHODS[method].seeds, scope(task).seeds)
        yield from (best._replace(seed=seed) for seed in range(seeds))
        if robustness and METHODS[method].robust and scope(task).papers:
            yield from (best._replace(variant=variant) for variant in ROBUSTNESS)
            yield from large_batch(results, best)


def missing(
    results: Results, tasks: Sequence[str], methods: Sequence[str], robustness: bool = True
) -> Iterator[Run]:
    """Of the wanted runs those that have no result."""
    return (
        run for run in dict.fromkeys(wanted(results, tasks, methods, robustness)) if run not in results.loss
    )
