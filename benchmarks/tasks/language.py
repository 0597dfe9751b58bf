"""Language: the demo's GPT-2 over bytes of Python's sources, and a smaller one over tokens of the Bible."""

from __future__ import annotations

from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks import text
from benchmarks.language_models import gpt2
from benchmarks.tasks import bible
from benchmarks.tasks.task import Task


class _Language(Task):
    """A text as one tensor of tokens, of which random windows are learned."""

    clip = 1.0
    context = 128
    windows = 64  # that are held out

    def __init__(self) -> None:
        self.training, self.validation = self.texts()

    def texts(self) -> tuple[Tensor, Tensor]:
        """Tokens to learn from, and held out."""
        raise NotImplementedError

    def loss(self, model: nn.Module, count: int, step: int, seed: int) -> Tensor:
        """Nats per token."""
        tokens = text.windows(self.training, count, self.context, seed=seed * 1_000_003 + step)
        return model(input_ids=tokens, labels=tokens).loss  # type: ignore[no-any-return]

    def evaluate(self, model: nn.Module, full: bool) -> dict[str, float]:
        """Over fixed windows of the held-out text; a quarter of them if not full."""
        windows = text.windows(self.validation, self.windows, self.context, seed=1)
        parts = (windows if full else windows[: self.windows // 4]).split(16)
        return {"loss": sum(model(input_ids=part, labels=part).loss.item() for part in parts) / len(parts)}


class Bytes(_Language):
    """Bytes of the standard library's source."""

    name = "language-bytes"
    steps = 300
    batch = 8
    measures: ClassVar = {"loss": "nats per byte"}
    data = "Python's standard library, its source (PSF)"

    def texts(self) -> tuple[Tensor, Tensor]:
        """Every twentieth file is held out."""
        return text.load(None)

    def model(self) -> nn.Module:
        """0.84M parameters."""
        return gpt2()


class Words(_Language):
    """A vocabulary as language models have them, most of which is rare."""

    name = "language-bpe"
    steps = 400
    batch = 8
    context = 64
    windows = 128
    vocabulary = 8192
    width, layers = 64, 4
    measures: ClassVar = {"loss": "nats per token"}
    data = "sword-text-kjv of Debian: the King James Version (public domain)"

    def texts(self) -> tuple[Tensor, Tensor]:
        """Every twentieth verse is held out."""
        bpe = bible.tokenizer(self.vocabulary, english=True, spanish=False)
        found = [e.ids for e in bpe.encode_batch([v.english + "\n" for v in bible.verses()])]
        training = [ids for i, ids in enumerate(found) if i % 20 != 19]
        return tuple(torch.tensor(list(chain.from_iterable(part))) for part in (training, found[19::20]))  # type: ignore[return-value]

    def model(self) -> nn.Module:
        """0.73M parameters, 0.52M of them in the embedding, which is the head too."""
        return gpt2(self.vocabulary, self.context, self.width, self.layers)


class Long(Words):
    """A smaller one, for 20,000 steps."""

    name = "long"
    steps = 20_000
    batch = 4
    context = 32
    width, layers = 32, 2
