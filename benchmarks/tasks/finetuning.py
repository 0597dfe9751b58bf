"""Fine-tuning: a model of one half of the Bible goes on with the other half; all weights, and LoRA."""

from __future__ import annotations

from functools import cached_property

import peft
import torch
from torch import Tensor, nn

from benchmarks.tasks import bible, data
from benchmarks.tasks.language import Words
from benchmarks.tasks.task import learn
from benchmarks.trials import BETAS


class FirstHalf(Words):
    """What the model has learned before; no task of its own."""

    def texts(self) -> tuple[Tensor, Tensor]:
        """The first half."""
        return self.tokens(0, len(bible.verses()) // 2)


class FineTuning(Words):
    """All weights."""

    name = "fine-tuning"
    steps = 200
    pretraining_steps, pretraining_lr = 1000, 0.004

    def texts(self) -> tuple[Tensor, Tensor]:
        """The second half."""
        return self.tokens(len(bible.verses()) // 2, None)

    def model(self) -> nn.Module:
        """What AdamW made of the first half."""
        model = super().model()
        model.load_state_dict(self.pretrained)
        return model

    @cached_property
    def pretrained(self) -> dict[str, Tensor]:
        """Weights; made once on this machine."""
        return data.prepared("pretrained", self.pretrain)

    def pretrain(self) -> dict[str, Tensor]:
        """Train on the first half."""
        torch.manual_seed(0)
        half = FirstHalf()
        model = half.model()
        optimizer = torch.optim.AdamW(model.parameters(), self.pretraining_lr, BETAS)
        for _ in learn(half, model, optimizer, self.pretraining_steps, seed=0):
            pass
        return model.state_dict()


class LoRA(FineTuning):
    """Of rank 8 beside every matrix of the blocks; the rest is frozen."""

    name = "lora"

    def model(self) -> nn.Module:
        """0.03M trained parameters."""
        config = peft.LoraConfig(r=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
        return peft.get_peft_model(super().model(), config)
