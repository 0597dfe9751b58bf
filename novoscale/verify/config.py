"""What is put to the test: the user's configuration, made ready to run on ranks of this machine."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from novoscale.tools import configs

SHARDINGS = ("none", "ddp", "fsdp2")
MICRO_BATCH = 4
LR = 0.003


class VerifyError(ValueError):
    """The configuration, model or optimizer cannot be put to the test; says why."""


@dataclass(frozen=True)
class Setup:
    """What every rank needs to know; picklable.

    Attributes:
        sharding: "deepspeed", "fsdp2", "ddp" or "none".
        deepspeed: the DeepSpeed config, ready to use, if the sharding is DeepSpeed's.
        model: import path of a function that returns the model and the function ``batch``.
        optimizer: import path of the optimizer's class.
        client: give DeepSpeed the optimizer, rather than let it make one from the config.
        dtype: of the model.
        precision: of the gradients; that of autocast if there is one.
        weights: dtype of those that the optimizer updates.
        device: type of the ranks' device, and of the one process's: "cpu" or "cuda".
    """

    sharding: str
    model: str
    optimizer: str
    options: dict[str, Any]
    steps: int
    ranks: int
    deepspeed: dict[str, Any] = field(default_factory=dict)
    client: bool = True
    accumulate: int = 1
    clip: float = 0.0
    dtype: torch.dtype = torch.float32
    precision: torch.dtype = torch.float32
    weights: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def samples(self) -> int:
        """Samples of a step, of all ranks."""
        return MICRO_BATCH * self.ranks * self.accumulate


def prepare(
    config: str | Path | dict[str, Any],
    ranks: int,
    steps: int,
    model: str,
    optimizer: str | None,
    options: dict[str, Any] | None,
    device: str = "cpu",
) -> tuple[Setup, list[str]]:
    """Make a :class:`Setup` of the user's configuration; say what was changed in it."""
    sharding, given = read(config)
    load(model)
    if optimizer is not None:
        load(optimizer)
    name, kwargs, client = optimizer, dict(options or {}), True
    if given is None:
        name = name or "novoscale:NovoGrad"
        kwargs.setdefault("lr", LR)
        return Setup(sharding, model, name, kwargs, steps, ranks, device=device), []
    if "optimizer" in given and name is None:
        name, kwargs, client = *_optimizer_of(given["optimizer"]), False
    else:
        name = name or "novoscale:NovoGrad"
        kwargs.setdefault("lr", LR)
    ds, notes = _runnable(given, ranks, name, kwargs, client)
    setup = Setup(
        sharding,
        model,
        name,
        kwargs,
        steps,
        ranks,
        deepspeed=ds,
        client=client,
        accumulate=ds["gradient_accumulation_steps"],
        clip=ds["gradient_clipping"],
        dtype=torch.bfloat16 if ds.get("bf16", {}).get("enabled") is True else torch.float32,
        precision=torch.bfloat16 if _has_bfloat16_gradients(ds) else torch.float32,
        weights=torch.bfloat16 if ds.get("bf16", {}).get("bf16_master_weights_and_grads") else torch.float32,
        device=device,
    )
    return setup, notes


def _has_bfloat16_gradients(ds: dict[str, Any]) -> bool:
    return any(ds.get(key, {}).get("enabled") is True for key in ("bf16", "torch_autocast"))


def read(config: str | Path | dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """The sharding, and the DeepSpeed config if it is DeepSpeed's."""
    if isinstance(config, dict):
        return "deepspeed", config
    if config in SHARDINGS:
        return str(config), None
    path = Path(config)
    if not path.is_file():
        raise VerifyError(f"{config}: there is no such file, and it is none of {', '.join(SHARDINGS)}")
    try:
        found = configs.read(path)
    except configs.ConfigError as error:
        raise VerifyError(str(error)) from None
    if found.deepspeed is not None:
        return "deepspeed", found.deepspeed
    assert found.accelerate is not None  # what is not DeepSpeed's is a YAML
    return _sharding_of(path, found.accelerate), None


def _sharding_of(path: Path, accelerate: dict[str, Any]) -> str:
    """The sharding that an Accelerate YAML asks for, which is not DeepSpeed's."""
    kind = str(accelerate["distributed_type"])
    if kind == "FSDP":
        version = configs.section_of(accelerate, "fsdp_config").get("fsdp_version", 1)
        if int(version) != 2:
            raise VerifyError(f"{path}: fsdp_version {version}: NovoGrad supports FSDP2, set fsdp_version: 2")
        return "fsdp2"
    if kind in ("NO", "MULTI_CPU", "MULTI_GPU"):
        return "ddp"
    raise VerifyError(f"{path}: distributed_type {kind} is not known to verify")


def _optimizer_of(section: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The class that DeepSpeed makes of its "optimizer" section, and its options."""
    kind, params = str(section.get("type")), dict(section.get("params", {}))
    kwargs = {key: value for key, value in params.items() if value != "auto"}
    for key in ("torch_adam", "adam_w_mode"):
        kwargs.pop(key, None)
    kwargs.setdefault("lr", LR)
    if kind.lower() == "novograd":
        return "novoscale:NovoGrad", kwargs
    if kind.lower() in ("adam", "adamw"):
        plain = kind.lower() == "adam" and params.get("adam_w_mode") is False
        return f"torch.optim:{'Adam' if plain else 'AdamW'}", kwargs
    if hasattr(torch.optim, kind):
        return f"torch.optim:{kind}", kwargs
    raise VerifyError(
        f'"optimizer": {{"type": "{kind}"}} has no counterpart in torch.optim: name a class to test'
    )


def _runnable(
    given: dict[str, Any], ranks: int, name: str, kwargs: dict[str, Any], client: bool
) -> tuple[dict[str, Any], list[str]]:
    ds, notes = copy.deepcopy(given), []
    for key in ("scheduler", "train_batch_size", "tensorboard", "wandb", "csv_monitor", "flops_profiler"):
        if ds.pop(key, None) is not None and key == "scheduler":
            notes.append('"scheduler" left out: the learning rate is constant')
    if ds.get("fp16", {}).get("enabled") in (True, "auto"):
        ds.pop("fp16")
        notes.append('"fp16" left out: the ranks train in float32')
    if ds.get("bf16", {}).get("enabled") == "auto":
        ds["bf16"]["enabled"] = False
        notes.append('"bf16": "auto" taken for off')
    accumulate = ds.get("gradient_accumulation_steps", 1)
    ds["gradient_accumulation_steps"] = accumulate if isinstance(accumulate, int) else 1
    ds["train_micro_batch_size_per_gpu"] = MICRO_BATCH
    clip = ds.get("gradient_clipping", 1.0)
    ds["gradient_clipping"] = float(clip) if isinstance(clip, (int, float)) else 1.0
    if client:
        ds.pop("optimizer", None)
        ds["zero_force_ds_cpu_optimizer"] = False
        ds["zero_allow_untested_optimizer"] = True
    else:
        adam = {"torch_adam": True} if name in ("torch.optim:Adam", "torch.optim:AdamW") else {}
        ds["optimizer"]["params"] = {**kwargs, **adam}
    zero = ds.get("zero_optimization", {})
    for key in [key for key, value in zero.items() if value == "auto"]:
        zero.pop(key)
    return ds, notes


def load(path: str) -> Any:
    """What ``package.module:name`` names.

    Raises:
        VerifyError: if there is no such thing.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise VerifyError(f"{path}: cannot be imported ({error}); write it as package.module:name") from None
