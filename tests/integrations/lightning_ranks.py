"""What the tests of Lightning train, in one process and on ranks."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from novoscale import NovoGrad

STEPS, SAMPLES = 6, 8


class Model(lightning.LightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.options = options
        self.layers = nn.Sequential(nn.Linear(20, 300), nn.Tanh(), nn.Linear(300, 3))

    def callbacks(self) -> list[Callback]:
        return []

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.layers(x).float(), y)

    def configure_optimizers(self) -> NovoGrad:
        return NovoGrad(self.parameters(), lr=0.01, preset="adamw", weight_decay=0.01, **self.options)


class Unfreezes(BackboneFinetuning):
    """After the first epoch. With any optimizer, Lightning 2.6 leaves layers frozen in a resumed training."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        if trainer.ckpt_path:
            self.make_trainable(pl_module.backbone)


class Unfreezing(Model):
    """Its first layer is frozen at first, and given to the optimizer later."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.backbone, self.head = self.layers[0], self.layers[2]

    def callbacks(self) -> list[Callback]:
        return [Unfreezes(unfreeze_backbone_at_epoch=1)]

    def configure_optimizers(self) -> NovoGrad:
        return NovoGrad(self.head.parameters(), lr=0.01, preset="adamw", **self.options)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(*(torch.randn(STEPS * SAMPLES, n, generator=generator) for n in (20, 3)))


def loader() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=SAMPLES)


def trainer(folder: Any, **options: Any) -> lightning.Trainer:
    silent = dict.fromkeys(
        ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False
    )
    settings = {"accelerator": "cpu", "max_steps": STEPS, "default_root_dir": folder, **silent, **options}
    return lightning.Trainer(**settings)


def under_ddp(folder: str) -> list[Tensor]:
    """The weights after a training on these ranks, each with half of every batch."""
    strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment())
    model, ranks = Model(), torch.distributed.get_world_size()
    trains = trainer(folder, strategy=strategy, devices=ranks, gradient_clip_val=0.05)
    in_order = DistributedSampler(data(), shuffle=False)  # Lightning's own would shuffle
    trains.fit(model, DataLoader(data(), batch_size=SAMPLES // ranks, sampler=in_order))
    return [p.detach().clone() for p in model.parameters()]
