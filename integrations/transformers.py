"""The Hugging Face Trainer: gradients are released in it, and a NovoGrad is not dropped without a word.

Under DeepSpeed the Trainer drops ``optimizers=`` and trains with AdamW, and an ``optimizer`` in the DeepSpeed
config wins over ``optimizer_cls_and_kwargs``, both silently (transformers 5.23, ``deepspeed_init``; its
issues 38753 and 15784). Importing this module has it refuse to do that to a NovoGrad. Importing
``novoscale.integrations.deepspeed`` imports this one.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import transformers.integrations.deepspeed as hf_deepspeed
from transformers import TrainerCallback

from novoscale import NovoGrad, ReleasedGradients, release_gradients

from .accelerate import OptimizerReplacedError

ADVICE = (
    'Name it in the DeepSpeed config, "optimizer": {"type": "NovoGrad", ...}, or leave the config without an '
    'optimizer and pass optimizer_cls_and_kwargs=(NovoGrad, {"lr": ...}) to the Trainer'
)


class ReleaseGradients(TrainerCallback):  # type: ignore[misc]
    """Releases gradients in the backward pass: ``Trainer(..., callbacks=[ReleaseGradients()])``.

    See ``novoscale.release_gradients``. ``gradient_accumulation_steps`` is followed. The Trainer clips by
    default: set ``max_grad_norm=0``.
    """

    def __init__(self) -> None:
        self._handle: ReleasedGradients | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Before the first step.

        Raises:
            ValueError: the Trainer is to clip, or something that ``release_gradients`` refuses.
            RuntimeError: an earlier training has failed in the middle of a step.
        """
        if args.max_grad_norm:
            raise ValueError(
                f"max_grad_norm={args.max_grad_norm} (the Trainer's default is 1.0) needs the gradients of "
                "the whole model, which are never there when they are released: set max_grad_norm=0 in "
                "TrainingArguments, and clip_threshold=1.0 of NovoGrad, which clips each parameter's update"
            )
        if self._handle is not None:
            self._handle.refuse_half_a_step()
            self._handle.remove()
        self._handle = release_gradients(given["model"], given["optimizer"])

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """After the last step."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def register() -> None:
    """Guard the Trainer's choice of an optimizer under DeepSpeed. Called on import; idempotent."""
    original = hf_deepspeed.deepspeed_init
    if hasattr(original, "_novoscale"):
        return

    @functools.wraps(original)
    def guarded(trainer: Any, num_training_steps: int, inference: bool = False) -> Any:
        if not inference:
            _refuse_replacement(trainer)
        return original(trainer, num_training_steps, inference)

    guarded._novoscale = True  # type: ignore[attr-defined]
    hf_deepspeed.deepspeed_init = guarded
    if "transformers.trainer" in sys.modules:  # it has imported the function by name
        sys.modules["transformers.trainer"].deepspeed_init = guarded  # type: ignore[attr-defined]


def _refuse_replacement(trainer: Any) -> None:
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
    named = str(config.get("optimizer", {}).get("type", ""))
    if isinstance(trainer.optimizer, NovoGrad):
        instead = named or f"the Trainer's own ({getattr(trainer.args.optim, 'value', trainer.args.optim)})"
        raise OptimizerReplacedError(
            f"The Trainer drops optimizers= under DeepSpeed: it would train with {instead}, not NovoGrad. "
            f"{ADVICE}"
        )
    asked = getattr(trainer, "optimizer_cls_and_kwargs", None)
    if asked is not None and asked[0] is NovoGrad and named and named.lower() != "novograd":
        raise OptimizerReplacedError(
            "The Trainer ignores optimizer_cls_and_kwargs where the DeepSpeed config names an optimizer: "
            f"it would train with {named}, not NovoGrad. {ADVICE}"
        )


register()
