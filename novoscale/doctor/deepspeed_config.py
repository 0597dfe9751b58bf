"""What DeepSpeed itself says to a config, before any rank is started: what it refuses and never looks at."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import logger
from pydantic import ValidationError

BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# DeepSpeedConfig does not look at them: the launcher, the engine, Accelerate and transformers do.
READ_ELSEWHERE = ("zero_allow_untested_optimizer", "autotuning", "sequence_parallel_size", "msamp", "comment")


def refusals(config: dict[str, Any]) -> list[tuple[str, str]]:
    """The keys that DeepSpeed refuses, and what it says; without the sizes of batches and "auto" values.

    It stops at the first refusal, or at those of one section: each refused key is taken out, and it is asked
    again.
    """
    found: list[tuple[str, str]] = []
    left = copy.deepcopy(config)
    while new := [refusal for refusal in _next_refusals(left) if refusal not in found]:
        found += new
        for path, _ in new:
            _take_out(left, path.split("."))
    return found


def _take_out(section: dict[str, Any], path: list[str]) -> None:
    for key in path[:-1]:
        section = section.get(key, {})
    section.pop(path[-1], None)


def _next_refusals(config: dict[str, Any]) -> list[tuple[str, str]]:
    try:
        _make(config)
    except ValidationError as error:
        return [(_path(config, tuple(e["loc"])), e["msg"]) for e in error.errors()]
    except Exception as error:  # it raises what it likes
        text = " ".join(str(error).split())
        return [(_named(config, text), text or type(error).__name__)]
    return []


def never_read(config: dict[str, Any]) -> list[str]:
    """Top-level keys that DeepSpeed never looks at, and so ignores without a word.

    Raises:
        Exception: what DeepSpeed raises for a config that it refuses.
    """
    watched = _make(config)
    return [key for key in config if key not in watched.read and key not in READ_ELSEWHERE]


def _make(config: dict[str, Any]) -> _Watched:
    """Let DeepSpeed make its config of this one, and see what it reads."""
    plain = {k: v for k, v in copy.deepcopy(config).items() if v != "auto" and k not in BATCH}
    if any(key in config for key in BATCH[:2]):
        plain["train_micro_batch_size_per_gpu"] = 1
    watched = _Watched(plain)
    watched.read.update(BATCH)
    watched.read.update(key for key, value in config.items() if value == "auto")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        DeepSpeedConfig(watched)
    finally:
        logger.setLevel(level)
    return watched


def _path(config: dict[str, Any], location: tuple[Any, ...]) -> str:
    """The path of a key for which pydantic only says where it is in its section."""
    key = ".".join(map(str, location))
    sections = [name for name, value in config.items() if isinstance(value, dict) and location]
    return next((f"{name}.{key}" for name in sections if location[0] in config[name]), key)


def _named(config: dict[str, Any], text: str) -> str:
    """The first key that a message names, in any case of letters; before it, one of a section."""
    nested = [f"{k}.{n}" for k, v in config.items() if isinstance(v, dict) for n in v if f"{k}.{n}" in text]
    places = {key: re.search(rf"\b{re.escape(key)}\b", text, re.IGNORECASE) for key in config}
    named = sorted((place.start(), key) for key, place in places.items() if place)
    return next(iter([*nested, *(key for _, key in named)]), "config")


class _Watched(dict[str, Any]):
    """A dict that knows which of its keys were asked for."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.read: set[str] = set()

    def __copy__(self) -> _Watched:
        return self

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict."""
        self.read.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        """As of a dict; what is looked for in them is noted."""
        return _Keys(self)


class _Keys:
    def __init__(self, of: _Watched) -> None:
        self._of = of

    def __contains__(self, key: object) -> bool:
        return key in self._of

    def __iter__(self) -> Iterator[str]:
        return iter(dict.keys(self._of))
