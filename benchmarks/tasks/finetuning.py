"""Fine-tuning: a model of one half of the Bible goes on with the other half; all weights, and LoRA."""

from __future__ import annotations

from functools import cached_property

import peft
import torch
from torch import Tensor, nn

from benchmarks.language_models import schedule
from benchmarks.tasks import bible, data
from benchmarks.tasks.language import Words


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
        return data.prepared("pretrained", self.pretrain)  # type: ignore[no-any-return]

    def pretrain(self) -> dict[str, Tensor]:
        """Train on the first half."""
        torch.manual_seed(0)
        model = super().model()
        half = Words.__new__(Words)
        half.training, half.validation = self.tokens(0, len(bible.verses()) // 2)
        optimizer = torch.optim.AdamW(model.parameters(), self.pretraining_lr, (0.9, 0.98))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(self.pretraining_steps))
        for step in range(self.pretraining_steps):
            half.loss(model, self.batch, step, seed=0).backward()
            nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return model.state_dict()


class LoRA(FineTuning):
    """Of rank 8 beside every matrix of the blocks; the rest is frozen."""

    name = "lora"

    def model(self) -> nn.Module:
        """0.07M trained parameters."""
        config = peft.LoraConfig(r=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
        return peft.get_peft_model(super().model(), config)
