"""31,085 verses in English and Spanish, as tokens of a vocabulary that was trained on them."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.tasks import data

PAD, START, END = 0, 1, 2
MODULES = {"english": "engKJV2006eb", "spanish": "spaRV1909eb"}


class Verse(NamedTuple):
    """A verse in both languages."""

    book: str
    english: str
    spanish: str


@cache
def verses() -> list[Verse]:
    """All verses that both translations have, in their order."""
    return [Verse(*verse) for verse in data.prepared("verses", _read)]


@cache
def tokenizer(vocabulary: int, english: bool, spanish: bool) -> Tokenizer:
    """A byte-level BPE that was trained on the verses of some languages; PAD, START, END come first."""
    name = "-".join(
        [f"bpe{vocabulary}", *(["english"] if english else []), *(["spanish"] if spanish else [])]
    )

    def train() -> str:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<pad>", "<start>", "<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        texts = [v.english for v in verses()] * english + [v.spanish for v in verses()] * spanish
        bpe.train_from_iterator(texts, trainer)
        return bpe.to_str()

    return Tokenizer.from_str(data.prepared(name, train))


def _read() -> list[tuple[str, str, str]]:
    from pysword.modules import SwordModules

    library = SwordModules(str(data.path("debian", "usr", "share", "sword")))
    library.parse_modules()
    english, spanish = (library.get_bible_from_module(name) for name in MODULES.values())
    found = []
    for books in english.get_structure().get_books().values():
        for book in books:
            for chapter, length in enumerate(book.chapter_lengths, 1):
                for verse in range(1, length + 1):
                    texts = [_text(bible, book.name, chapter, verse) for bible in (english, spanish)]
                    if all(texts):
                        found.append((book.name, *texts))
    return found


def _text(bible: Any, *place: Any) -> str:
    try:
        return bible.get(*place).strip()
    except ValueError:  # this translation has no such verse
        return ""
