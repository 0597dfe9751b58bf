"""Translation: verses from English to Spanish, by a small transformer over a vocabulary of both."""

from __future__ import annotations

from typing import ClassVar

import torch
from sacrebleu.metrics import CHRF
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BartConfig, BartForConditionalGeneration

from benchmarks.tasks import bible
from benchmarks.tasks.bible import END, PAD, START
from benchmarks.tasks.task import Task, samples

IGNORED = -100  # as torch's cross entropy and transformers have it


class Translation(Task):
    """A book is learned from as a whole, or held out as a whole."""

    name = "translation"
    steps = 600
    batch = 16
    clip = 1.0
    measures: ClassVar = {"loss": "nats per token", "chrf": "chrF (sacrebleu), 0 to 100"}
    data = "sword-text-kjv and sword-text-sparv of Debian: 31,085 pairs of verses (public domain)"
    vocabulary = 2048
    longest = 40  # tokens; verses with more are left out
    held_out = ("Ruth", "Esther", "Joel", "Jonah", "Mark", "Galatians", "James", "I John")
    held_out_verses, translated = 512, 48

    def __init__(self) -> None:
        self.tokenizer = bible.tokenizer(self.vocabulary, english=True, spanish=True)
        verses = bible.verses()
        sources = [e.ids for e in self.tokenizer.encode_batch([v.english for v in verses])]
        targets = [e.ids for e in self.tokenizer.encode_batch([v.spanish for v in verses])]
        short = [i for i in range(len(verses)) if max(len(sources[i]), len(targets[i])) < self.longest]
        pairs = [(verses[i], _sequence(sources[i]), _sequence(targets[i])) for i in short]
        self.training = [pair[1:] for pair in pairs if pair[0].book not in self.held_out]
        held_out = [pair for pair in pairs if pair[0].book in self.held_out]
        held_out = held_out[:: max(len(held_out) // self.held_out_verses, 1)][: self.held_out_verses]
        self.validation = [pair[1:] for pair in held_out]
        self.references = [pair[0].spanish for pair in held_out[:: len(held_out) // self.translated]]

    def model(self) -> nn.Module:
        """0.6M parameters; one embedding for both languages and the head."""
        width = 96
        return BartForConditionalGeneration(
            BartConfig(
                vocab_size=self.vocabulary, d_model=width, max_position_embeddings=2 * self.longest,
                encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width, dropout=0.0, activation_function="relu",
                pad_token_id=PAD, bos_token_id=START, eos_token_id=END, decoder_start_token_id=START,
                forced_eos_token_id=None,
            )
        )  # fmt: skip

    def loss(self, model: nn.Module, count: int, step: int, seed: int) -> Tensor:
        """Nats per token of the translation."""
        return _loss(
            model, [self.training[i] for i in samples(len(self.training), count, step, seed).tolist()]
        )

    def evaluate(self, model: nn.Module, full: bool) -> dict[str, float]:
        """Over verses of other books, an eighth of them if not full; chrF of translations of some."""
        pairs = self.validation if full else self.validation[::8]
        losses = [(_loss(model, part).item(), _tokens(part)) for part in _parts(pairs, 32)]
        total = sum(tokens for _, tokens in losses)
        measured = {"loss": sum(loss * tokens for loss, tokens in losses) / total}
        if full:
            measured["chrf"] = self.chrf(model)
        return measured

    def chrf(self, model: nn.Module) -> float:
        """Of greedy translations."""
        chosen = self.validation[:: len(self.validation) // self.translated]
        source = pad_sequence([pair[0] for pair in chosen], True, PAD)
        made = model.generate(
            input_ids=source, attention_mask=source != PAD, max_new_tokens=self.longest,
            num_beams=1, do_sample=False,
        )  # fmt: skip
        texts = self.tokenizer.decode_batch(made.tolist(), skip_special_tokens=True)
        return float(CHRF().corpus_score(texts, [self.references]).score)


def _sequence(ids: list[int]) -> Tensor:
    return torch.tensor([*ids, END])


def _parts(pairs: list[tuple[Tensor, ...]], size: int) -> list[list[tuple[Tensor, ...]]]:
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]


def _tokens(pairs: list[tuple[Tensor, ...]]) -> int:
    return sum(len(target) for _, target in pairs)


def _loss(model: nn.Module, pairs: list[tuple[Tensor, ...]]) -> Tensor:
    source = pad_sequence([pair[0] for pair in pairs], True, PAD)
    target = pad_sequence([pair[1] for pair in pairs], True, IGNORED)
    return model(input_ids=source, attention_mask=source != PAD, labels=target).loss
