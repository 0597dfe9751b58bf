"""The tensors that an optimizer is given for models of today: a catalogue of shapes."""

from __future__ import annotations

from collections.abc import Callable

Shapes = list[tuple[int, ...]]


def gpt2() -> Shapes:
    """GPT-2 124M, as transformers has it; embedding and head are one."""
    d = 768
    block: Shapes = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,)]
    block += [(d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *block * 12, (d,), (d,)]


def llama(vocab: int, d: int, layers: int, mlp: int, kv: int, tied: bool) -> Shapes:
    """A Llama; ``kv`` is the width of keys and values."""
    block: Shapes = [(d, d), (kv, d), (kv, d), (d, d), (mlp, d), (mlp, d), (d, mlp), (d,), (d,)]
    return [(vocab, d), *block * layers, (d,), *([] if tied else [(vocab, d)])]


def shard(shapes: Shapes, ranks: int) -> Shapes:
    """What FSDP2 gives the first of so many ranks: a slice of each tensor along its first dimension."""
    return [(-(-rows // ranks), *rest) for rows, *rest in shapes]


LLAMA_1B = llama(128256, 2048, 16, 8192, 512, tied=True)
LLAMA_7B = llama(32000, 4096, 32, 11008, 4096, tied=False)

CATALOGUE: dict[str, Callable[[], Shapes]] = {
    "gpt2-124m": gpt2,
    "llama-1b": lambda: LLAMA_1B,
    "llama-1b-rank-of-16": lambda: shard(LLAMA_1B, 16),
    "llama-7b-rank-of-8": lambda: shard(LLAMA_7B, 8),
    "llama-7b-rank-of-64": lambda: shard(LLAMA_7B, 64),
    "1000-small": lambda: [(16, 16)] * 1000,
    "16x4m": lambda: [(2048, 2048)] * 16,
    "flat-64m": lambda: [(1 << 26,)],
}

# What is measured unless told otherwise, by type of device: on a CPU all, which fit in 24 GiB.
DEFAULT = {
    "cpu": list(CATALOGUE),
    "cuda": ["gpt2-124m", "1000-small", "16x4m", "flat-64m", "llama-1b", "llama-7b-rank-of-8"],
}
