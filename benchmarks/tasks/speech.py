"""Speech: prompts of a telephone system in five languages, and a Jasper-like network with CTC."""

from __future__ import annotations

import gzip
import re
import unicodedata
import wave
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers.audio_utils import mel_filter_bank

from benchmarks.tasks import data
from benchmarks.tasks.task import Task, samples

RATE = 8000  # samples of sound per second
WINDOW, HOP, MELS = 256, 80, 40
STRIDE = 4  # frames of 10 ms in one of the network's
LONGEST = 3.0  # seconds

Prompt = tuple[Tensor, str]  # log mel energies, float32 [frames, MELS]; what is said


class Speech(Task):
    """Of each language every eighth prompt is held out."""

    name = "speech"
    steps = 400
    batch = 16
    clip = 1.0
    measures: ClassVar = {"loss": "nats per character", "cer": "% of characters wrong"}
    data = "asterisk-core-sounds-{en,es,fr,it,ru} of Debian (CC-BY-SA-3.0, Russian CC-BY-3.0)"

    def __init__(self) -> None:
        prompts = spoken()
        self.alphabet = sorted({character for _, text in prompts for character in text})
        pairs = [(frames, self.encode(text)) for frames, text in prompts]
        self.training = [pair for i, pair in enumerate(pairs) if i % 8 != 7]
        self.validation = pairs[7::8]

    def encode(self, text: str) -> Tensor:
        """Numbers of the characters; 0 is CTC's blank."""
        return torch.tensor([1 + self.alphabet.index(character) for character in text])

    def model(self) -> nn.Module:
        """0.65M parameters: residual blocks of convolutions, batch norm and ReLU over time."""
        width = 96
        return nn.Sequential(
            _convolution(MELS, width, 11, stride=2), _convolution(width, width, 11, stride=2),
            Block(width, 7), Block(width, 9), Block(width, 11),
            nn.Conv1d(width, 1 + len(self.alphabet), 1),
        )  # fmt: skip

    def loss(self, model: nn.Module, count: int, step: int, seed: int) -> Tensor:
        """CTC, in nats per character."""
        chosen = [self.training[i] for i in samples(len(self.training), count, step, seed).tolist()]
        return _ctc(*_run(model, chosen))

    def evaluate(self, model: nn.Module, full: bool) -> dict[str, float]:
        """Over the prompts that are held out, a quarter of them if not full."""
        prompts = self.validation if full else self.validation[::4]
        found = [_run(model, prompts[i : i + 32]) for i in range(0, len(prompts), 32)]
        characters = [sum(len(text) for text in texts) for _, _, texts in found]
        losses = [_ctc(*run).item() * n for run, n in zip(found, characters, strict=True)]
        wrong = [
            distance(greedy(column[:length]), text.tolist())
            for logits, lengths, texts in found
            for column, length, text in zip(logits.transpose(0, 1), lengths, texts, strict=True)
        ]
        return {"loss": sum(losses) / sum(characters), "cer": 100 * sum(wrong) / sum(characters)}


class Block(nn.Module):
    """Two convolutions and what goes past them."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.first = _convolution(width, width, kernel)
        self.second = _convolution(width, width, kernel, after=nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """``[N, width, frames]``."""
        return functional.relu(self.second(self.first(x)) + x)


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, after: nn.Module | None = None
) -> nn.Module:
    convolution = nn.Conv1d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm1d(outputs), after or nn.ReLU())


def _run(model: nn.Module, prompts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits ``[frames, N, 1 + alphabet]``, how many frames of each are its own, and the texts."""
    frames = pad_sequence([sound for sound, _ in prompts], batch_first=True).transpose(1, 2)
    lengths = torch.tensor([-(-len(sound) // STRIDE) for sound, _ in prompts])
    return model(frames).permute(2, 0, 1), lengths, [text for _, text in prompts]


def _ctc(logits: Tensor, lengths: Tensor, texts: list[Tensor]) -> Tensor:
    sizes = torch.tensor([len(text) for text in texts])
    logs = functional.log_softmax(logits, -1)
    losses = functional.ctc_loss(logs, torch.cat(texts), lengths, sizes, reduction="sum", zero_infinity=True)
    return losses / sizes.sum()


def greedy(logits: Tensor) -> list[int]:
    """The likeliest character of each frame ``[frames, 1 + alphabet]``, without repeats and blanks."""
    return [c for c in torch.unique_consecutive(logits.argmax(-1)).tolist() if c]


def distance(first: list[int], second: list[int]) -> int:
    """Levenshtein's: insertions, deletions and replacements."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        previous, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (a != b)))
    return row[-1]


def spoken() -> list[Prompt]:
    """All prompts of at most ``LONGEST`` seconds whose text says what is heard."""
    return data.prepared("speech", _read)


def _read() -> list[Prompt]:
    found = []
    for language in data.LANGUAGES:
        listed = data.path(
            "debian",
            "usr",
            "share",
            "doc",
            f"asterisk-core-sounds-{language}",
            f"core-sounds-{language}.txt.gz",
        )
        (folder,) = data.path("debian", "usr", "share", "asterisk", "sounds").glob(f"{language}_*")
        for line in gzip.decompress(listed.read_bytes()).decode().splitlines():
            name, _, said = line.partition(": ")
            text, file = normalised(said), folder / f"{name}.wav"
            if text and file.exists():
                frames = log_mels(file)
                if len(frames) <= LONGEST * RATE / HOP and len(text) * 1.25 < len(frames) / STRIDE:
                    found.append((frames, text))
    return found


def normalised(said: str) -> str:
    """Small letters, apostrophes and single spaces, without accents; empty if there is more than that."""
    letters = unicodedata.normalize("NFD", said.lower().replace("\u2019", "'"))
    plain = "".join(c for c in letters if not unicodedata.combining(c))
    if re.search(r"[\d\[(<@#]", plain):
        return ""
    return " ".join(re.sub(r"[^\w']|_", " ", plain).split())


def log_mels(file: Path) -> Tensor:
    """Log mel energies of a sound, each band with mean 0 and deviation 1: ``[frames, MELS]``."""
    with wave.open(str(file)) as sound:
        raw = np.frombuffer(sound.readframes(sound.getnframes()), dtype="<i2")
    signal = torch.tensor(raw / 32768, dtype=torch.float32)
    spectrum = torch.stft(signal, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True)
    bank = mel_filter_bank(WINDOW // 2 + 1, MELS, 60, RATE / 2, RATE, mel_scale="slaney")
    energies = torch.log(torch.tensor(bank, dtype=torch.float32).T @ spectrum.abs().square() + 1e-6).T
    return (energies - energies.mean(0)) / (energies.std(0) + 1e-3)
