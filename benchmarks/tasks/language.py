"""Language: the demo's GPT-2 over bytes of Python's sources, and a smaller one over tokens of the Bible."""

from __future__ import annotations

from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

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
        tokens = text.batch(self.training, count, self.context, seed, step)
        return model(input_ids=tokens, labels=tokens).loss

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
        return self.tokens(0, None)

    def tokens(self, first: int, last: int | None) -> tuple[Tensor, Tensor]:
        """Of the verses from ``first`` to before ``last``."""
        bpe = bible.tokenizer(self.vocabulary, english=True, spanish=False)
        found = [e.ids for e in bpe.encode_batch([v.english + "\n" for v in bible.verses()[first:last]])]
        held_out = range(19, len(found), 20)
        training = [ids for i, ids in enumerate(found) if i not in held_out]
        joined = [list(chain.from_iterable(part)) for part in (training, [found[i] for i in held_out])]
        return torch.tensor(joined[0]), torch.tensor(joined[1])

    def model(self) -> nn.Module:
        """0.73M parameters, 0.52M of them in the embedding, which is the head too."""
        return gpt2(self.vocabulary, self.context, self.width, self.layers)


class Long(Words):
    """A smaller one, for 20,000 steps; with what becomes of tokens that are rarely seen."""

    name = "long"
    steps = 20_000
    batch = 4
    context = 32
    windows = 1024
    width, layers = 32, 2
    rare = 10  # times in the text
    measures: ClassVar = {
        "loss": "nats per token",
        "rare_loss": f"nats per token that is {rare} times or less in the text",
        "rare_rms": "root mean square of the embedding of such tokens",
        "frequent_rms": "the same of the others",
    }

    def evaluate(self, model: nn.Module, full: bool) -> dict[str, float]:
        """Over fixed windows; if full, of rare tokens for themselves."""
        if not full:
            return super().evaluate(model, full)
        counts = torch.bincount(self.training, minlength=self.vocabulary)
        windows = text.windows(self.validation, self.windows, self.context, seed=1)
        logits = torch.cat([model(input_ids=part).logits[:, :-1].flatten(0, 1) for part in windows.split(64)])
        targets = windows[:, 1:].flatten()
        losses = functional.cross_entropy(logits, targets, reduction="none")
        rare = counts <= self.rare
        embedding = model.get_input_embeddings().weight
        return {
            "loss": losses.mean().item(),
            "rare_loss": losses[rare[targets]].mean().item(),
            "rare_rms": embedding[rare].square().mean().sqrt().item(),
            "frequent_rms": embedding[~rare].square().mean().sqrt().item(),
        }
