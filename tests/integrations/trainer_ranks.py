"""What each rank runs for the tests of Accelerate and the Trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn


def model() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64, n_positions=16, n_embd=24, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
    )


def rows(count: int = 32) -> list[dict[str, torch.Tensor]]:
    sequences = [(torch.arange(16) + start) % 64 for start in range(count)]
    return [{"input_ids": t, "labels": t} for t in sequences]


def trainer(folder: str, ds: dict[str, Any] | None, route: dict[str, Any]) -> dict[str, Any]:
    """Train by the Trainer; the optimizer that really stepped, and the losses."""
    if ds is not None:
        import novoscale.integrations.deepspeed  # noqa: F401

    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=folder,
        deepspeed=ds,
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        adam_beta1=0.95,
        adam_beta2=0.98,
        weight_decay=0.01,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    t = Trainer(model(), arguments, train_dataset=rows(), **route)
    t.train()
    optimizer = t.model_wrapped.basic_optimizer if ds is not None else t.optimizer.optimizer
    return {
        "optimizer": f"{type(optimizer).__module__}.{type(optimizer).__name__}",
        "betas": [tuple(g["betas"]) for g in optimizer.param_groups],
        "losses": [entry["loss"] for entry in t.state.log_history if "loss" in entry],
        "layers": len(optimizer.layer_norms()),
        "ranks": t.accelerator.num_processes,
    }


def trained(folder: str, release: bool, **options: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights after a training by the Trainer with NovoGrad, and the gradient norms that it logged."""
    from novoscale.integrations.transformers import ReleaseGradients
    from transformers import Trainer, TrainingArguments

    from novoscale import NovoGrad

    arguments = TrainingArguments(
        output_dir=folder,
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "max_grad_norm": 0.0,
            "warmup_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        },
    )
    made = Trainer(
        model(),
        arguments,
        train_dataset=rows(),
        callbacks=[ReleaseGradients()] if release else [],
        optimizer_cls_and_kwargs=(NovoGrad, {"lr": 0.02, "preset": "adamw", "momentum_dtype": "int4"}),
    )
    made.train()
    norms = [entry["grad_norm"] for entry in made.state.log_history if "grad_norm" in entry]
    return made.model.state_dict(), norms


def accelerate(config: str, lr: float) -> dict[str, Any]:
    """Train by Accelerate with a DeepSpeed JSON and a DummyOptim."""
    import novoscale.integrations.deepspeed  # noqa: F401

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(Path(config))
    from accelerate import Accelerator
    from accelerate.utils import DummyOptim, InitProcessGroupKwargs

    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    m = model()
    engine, _ = accelerator.prepare(m, DummyOptim(m.parameters(), lr=lr))
    losses = []
    for row in rows()[accelerator.process_index :: accelerator.num_processes]:
        loss = engine(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss
        accelerator.backward(loss)
        losses.append(loss.item())
    return {"optimizer": type(engine.basic_optimizer).__name__, "lr": engine.get_lr(), "losses": losses}


def accelerate_client(config: str) -> str:
    """What DeepSpeed steps when a NovoGrad is given to Accelerate, or the error."""
    import novoscale.integrations.deepspeed  # noqa: F401

    from novoscale import NovoGrad

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = config
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    m = model()
    try:
        engine, _ = accelerator.prepare(m, NovoGrad(m.parameters(), lr=0.1, preset="paper"))
    except RuntimeError as error:
        return str(error)
    return type(engine.basic_optimizer).__name__


def accelerate_before_local_rank(config: str) -> str:
    """The error where LOCAL_RANK is not set until DeepSpeed starts, as when MPI has started the ranks."""
    import novoscale.integrations.deepspeed  # noqa: F401

    local_rank = os.environ.pop("LOCAL_RANK")
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = config
    from accelerate import Accelerator
    from accelerate.utils import DummyOptim

    accelerator = Accelerator()
    os.environ["LOCAL_RANK"] = local_rank
    m = model()
    try:
        accelerator.prepare(m, DummyOptim(m.parameters()))
    except RuntimeError as error:
        return str(error)
    return "no error"


def trainer_error(folder: str, ds: dict[str, Any], route: str) -> str:
    from novoscale import NovoGrad

    m = model()
    given = {
        "optimizers": {"optimizers": (NovoGrad(m.parameters(), lr=0.1, preset="paper"), None)},
        "class": {"optimizer_cls_and_kwargs": (NovoGrad, {"lr": 0.1})},
    }[route]
    try:
        trainer(folder, ds, given)
    except RuntimeError as error:
        return str(error)
    return "no error"
