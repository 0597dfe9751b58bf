"""The optimizers that are compared, by name: how to make each, what it needs, keeps and moves.

One catalogue for ``novoscale memory`` and ``novoscale plan`` and for the benchmarks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from novoscale.memory import rules
from novoscale.memory.rules import Rule
from novoscale.optimizer import presets
from novoscale.optimizer.param_groups import param_groups
from novoscale.state.formats import FORMATS

LR = 1e-3


@dataclass(frozen=True)
class Candidate:
    """An optimizer to measure.

    Attributes:
        path: ``module:Class``.
        options: keyword arguments.
        package: what to install.
        takes_model: its constructor takes the model and not parameters.
        state: bytes of state, by rule; None: not known before it is measured.
        timed_on: types of device on which the speed benchmark runs it.
        moved: of weight, gradient and state how often an element is read or written in a step without
            clipping; None where that depends on the shape.
        state_bytes: of an element of state that is moved; None: as the weight.
        clips: the option that clips by the global norm in the step, if it has one.
        orthogonal: it moves hidden matrices along orthogonal directions, and needs them whole.
        unfused: a step is many operations of torch's, on a CPU several times slower.
    """

    path: str
    options: dict[str, Any]
    package: str = "torch"
    takes_model: bool = False
    state: Rule | None = None
    timed_on: tuple[str, ...] = ()
    moved: tuple[int, int, int] | None = None
    state_bytes: float | None = None
    clips: str | None = None
    unfused: bool = False
    orthogonal: bool = False

    def make(self, params: Iterable[Tensor] | nn.Module, clip: float | None = None) -> torch.optim.Optimizer:
        """The optimizer of some parameters, or of the trained parameters of a model.

        Raises:
            ImportError: its package is not installed.
        """
        module, name = self.path.split(":")
        options = {**self.options, **({self.clips: clip} if clip and self.clips else {})}
        if isinstance(params, nn.Module) and not self.takes_model:
            given: Any = [p for p in params.parameters() if p.requires_grad]
            given = param_groups(params, preset="muon") if self.orthogonal else given
        else:
            given = params
        made: torch.optim.Optimizer = getattr(importlib.import_module(module), name)(given, **options)
        return made

    def installed(self) -> bool:
        """Whether its package is."""
        return importlib.util.find_spec(self.path.split(":")[0].split(".")[0]) is not None

    def bytes_moved(self, elements: int, size: int, clip: bool) -> float | None:
        """By count, with weights and gradients of ``size`` bytes.

        Clipping from outside reads the gradient twice and writes it once.
        """
        if self.moved is None:
            return None
        weight, grad, state = self.moved
        outside = 3 if clip and self.clips is None else 0
        of_state = size if self.state_bytes is None else self.state_bytes
        return elements * ((weight + grad + outside) * size + state * of_state)


def novograd_rule(options: Mapping[str, Any]) -> Rule:
    """Bytes of state of a NovoGrad with some options."""
    known = {**presets.PRESETS[options.get("preset", presets.DEFAULT)], **options}
    momentum = known.get("momentum_dtype", "float32")
    return rules.novograd(momentum, known["granularity"], known["bias_correction"])


def _novograd(**options: Any) -> Candidate:
    return Candidate(
        "novoscale:NovoGrad",
        {"lr": LR, **options},
        "novoscale",
        state=novograd_rule(options),
        timed_on=BOTH,
        moved=None if options.get("preset") == "muon" else (3 if options.get("scale_parameter") else 2, 2, 2),
        state_bytes=FORMATS[options.get("momentum_dtype", "float32")].bytes,
        clips="max_grad_norm",
        unfused=options.get("fused") is False,
        orthogonal=options.get("preset") == "muon",
    )


def why_not_sharded(name: str, sharding: str) -> str | None:
    """Why an optimizer of the catalogue cannot have a model sharded so; None: it can."""
    if not CANDIDATES[name].orthogonal or sharding in ("none", "ddp"):
        return None
    return f"{name} needs whole matrices on each rank, which {sharding} does not leave: use none or ddp"


def _adamw(
    timed_on: tuple[str, ...] = (), moved: tuple[int, int, int] | None = None, **options: Any
) -> Candidate:
    state = rules.elementwise(2, per_tensor=4)
    return Candidate(
        "torch.optim:AdamW",
        {"lr": LR, **options},
        state=state,
        timed_on=timed_on,
        moved=moved,
        unfused="fused" not in options,
    )


def _sgd(
    timed_on: tuple[str, ...] = (), moved: tuple[int, int, int] | None = None, **options: Any
) -> Candidate:
    options = {"lr": LR, "momentum": 0.9, **options}
    return Candidate("torch.optim:SGD", options, state=rules.elementwise(1), timed_on=timed_on, moved=moved)


def _transformers_adafactor(**options: Any) -> Candidate:
    return Candidate(
        "transformers.optimization:Adafactor",
        {"lr": LR, "relative_step": False, "scale_parameter": False, **options},
        "transformers",
        state=rules.factored(momentum="beta1" in options),
    )


BOTH = ("cpu", "cuda")
CUDA = ("cuda",)
CANDIDATES: dict[str, Candidate] = {
    # The paper's form, of one second moment for each tensor.
    "NovoGrad": _novograd(preset="paper"),
    "NovoGrad, bfloat16": _novograd(preset="paper", momentum_dtype="bfloat16"),
    "NovoGrad, int8": _novograd(preset="paper", momentum_dtype="int8"),
    "NovoGrad, int4": _novograd(preset="paper", momentum_dtype="int4"),
    "NovoGrad, int8, by row": _novograd(
        preset="paper", momentum_dtype="int8", granularity="row", normalize="rms"
    ),
    "NovoGrad, adamw": _novograd(preset="adamw"),
    "NovoGrad, adamw, scaled": _novograd(preset="adamw", scale_parameter=True),
    "NovoGrad, adamw, int8": _novograd(preset="adamw", momentum_dtype="int8"),
    "NovoGrad, adamw, int4": _novograd(preset="adamw", momentum_dtype="int4"),
    "NovoGrad, muon": _novograd(preset="muon"),
    "NovoGrad, muon, int8": _novograd(preset="muon", momentum_dtype="int8"),
    "NovoGrad, muon, int4": _novograd(preset="muon", momentum_dtype="int4"),
    "NovoGrad, reference": _novograd(preset="paper", fused=False),
    "torch AdamW": _adamw(),
    "torch AdamW, fused": _adamw(BOTH, (2, 1, 4), fused=True),
    "torch AdamW, foreach": _adamw(BOTH, foreach=True),
    "torch SGD with momentum": _sgd(),
    "torch SGD with momentum, fused": _sgd(BOTH, (2, 1, 2), fused=True),
    "torch Adafactor": Candidate(
        "torch.optim:Adafactor",
        {"lr": LR},
        state=rules.factored(momentum=False, as_weights=True),
        timed_on=BOTH,
        unfused=True,
    ),
    "transformers Adafactor": _transformers_adafactor(),
    "transformers Adafactor, beta1": _transformers_adafactor(beta1=0.9),
    "Lion": Candidate("pytorch_optimizer:Lion", {"lr": LR}, "pytorch_optimizer", state=rules.elementwise(1)),
    "Adam-mini": Candidate("pytorch_optimizer:AdamMini", {"lr": LR}, "pytorch_optimizer", takes_model=True),
    "CAME": Candidate(
        "came_pytorch:CAME", {"lr": LR}, "came-pytorch", state=rules.factored(momentum=True, statistics=2)
    ),
    "LAMB (pytorch_optimizer)": Candidate("pytorch_optimizer:Lamb", {"lr": LR}, "pytorch_optimizer"),
    "NovoGrad (pytorch_optimizer)": Candidate("pytorch_optimizer:NovoGrad", {"lr": LR}, "pytorch_optimizer"),
    "bitsandbytes AdamW8bit": Candidate(
        "bitsandbytes.optim:AdamW8bit",
        {"lr": LR},
        "bitsandbytes",
        state=rules.bitsandbytes_8bit(2),
        timed_on=CUDA,
    ),
    "bitsandbytes Lion8bit": Candidate(
        "bitsandbytes.optim:Lion8bit", {"lr": LR}, "bitsandbytes", state=rules.bitsandbytes_8bit(1)
    ),
    "torchao AdamW8bit": Candidate(
        "torchao.optim:AdamW8bit", {"lr": LR}, "torchao", state=rules.torchao_adamw(8, 256), timed_on=CUDA
    ),
    "torchao AdamW4bit": Candidate(
        "torchao.optim:AdamW4bit", {"lr": LR}, "torchao", state=rules.torchao_adamw(4, 128)
    ),
    "gefen-x": Candidate("gefen:Gefen", {"lr": LR}, "gefen-x", timed_on=CUDA),
    "flashoptim AdamW": Candidate("flashoptim:FlashAdamW", {"lr": LR}, "flashoptim", timed_on=CUDA),
    "DeepSpeed CPUAdam": Candidate(
        "deepspeed.ops.adam:DeepSpeedCPUAdam",
        {"lr": LR},
        "deepspeed",
        timed_on=("cpu",),
        moved=(2, 1, 4),
        state_bytes=4,
    ),
    "DeepSpeed FusedAdam": Candidate(
        "deepspeed.ops.adam:FusedAdam", {"lr": LR}, "deepspeed", timed_on=CUDA, moved=(2, 1, 4)
    ),
    "Apex FusedNovoGrad": Candidate("apex.optimizers:FusedNovoGrad", {"lr": LR}, "apex", timed_on=CUDA),
    "Apex FusedAdam": Candidate("apex.optimizers:FusedAdam", {"lr": LR}, "apex", timed_on=CUDA),
}

# What `novoscale memory` measures unless told otherwise, and `make memory`: one of each kind.
COMPARED = (
    "NovoGrad",
    "NovoGrad, bfloat16",
    "NovoGrad, int8",
    "NovoGrad, int4",
    "NovoGrad, adamw, int8",
    "NovoGrad, adamw, int4",
    "torch AdamW, fused",
    "torch AdamW, foreach",
    "torch SGD with momentum",
    "Lion",
    "Adam-mini",
    "CAME",
    "torch Adafactor",
    "transformers Adafactor",
    "transformers Adafactor, beta1",
    "bitsandbytes AdamW8bit",
    "bitsandbytes Lion8bit",
    "gefen-x",
    "torchao AdamW8bit",
    "torchao AdamW4bit",
)
