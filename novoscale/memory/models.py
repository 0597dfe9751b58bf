"""Models to measure and to plan for: from transformers configs, without weights and without a network."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from novoscale.verify import runs

FOLDER = Path(__file__).parent / "models"
BUILTIN = "builtin"
TOKENS = 32  # of a sample, unless told otherwise: state is what is measured here, not activations


class MemoryToolError(ValueError):
    """Something that cannot be measured or planned; says what and what to do."""


def build(name: str, device: str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a name or file, with random weights of seed 0; on the device "meta" without weights.

    Args:
        name: "builtin" (the small language model of ``novoscale verify``), a shipped config such as
            "llama-8b", a model type of transformers such as "gpt2" (with the defaults of its config), or
            the path of a ``config.json`` or of its folder.
        device: where its parameters are made.
        dtype: of the parameters; None: float32, or as the config says. The builtin model is float32.

    Raises:
        MemoryToolError: there is no such model, or its config cannot be built.
    """
    torch.manual_seed(0)
    with torch.device(device), _quiet():
        if name == BUILTIN:
            return runs.builtin_model()[0]
        config, options = _config(name), {} if dtype is None else {"dtype": dtype}
        from transformers import AutoModelForCausalLM

        try:
            model: nn.Module = AutoModelForCausalLM.from_config(config, **options)
        except Exception as error:  # transformers and its models raise what they like
            raise MemoryToolError(
                f"{name}: transformers cannot build a causal language model of this config: "
                f"{str(error).splitlines()[0]}"
            ) from None
    return model


def batch(name: str, model: nn.Module, device: str, length: int = TOKENS) -> dict[str, Tensor]:
    """One sample of so many random tokens, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    if name == BUILTIN:
        tokens = {"tokens": torch.randint(61, (1, length), generator=generator)}
    else:
        vocabulary: Any = model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
        ids = torch.randint(vocabulary, (1, length), generator=generator)
        tokens = {"input_ids": ids, "labels": ids}
    return {key: value.to(device) for key, value in tokens.items()}


def shipped() -> list[str]:
    """Names of the configs that come with novoscale."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of packages that transformers looks at when it is imported."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _config(name: str) -> Any:
    try:
        from transformers import CONFIG_MAPPING, AutoConfig
        from transformers.models.auto import modeling_auto
    except ImportError:
        raise MemoryToolError(f"model {name}: needs transformers: pip install 'novoscale[memory]'") from None
    path = FOLDER / f"{name}.json" if name in shipped() else Path(name)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        try:
            content = json.loads(path.read_text())
            return AutoConfig.for_model(**content)
        except Exception as error:  # not JSON, no "model_type", or options that its class refuses
            what = str(error).splitlines()[0]
            raise MemoryToolError(f"{path}: not a transformers config that can be built: {what}") from None
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if name in causal and name in CONFIG_MAPPING:
        return AutoConfig.for_model(name)
    raise MemoryToolError(unknown("model", name, [BUILTIN, *shipped(), *causal]) + ", or a config.json file")


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not known: the nearest known ones."""
    names = list(known)
    lower = {n.lower(): n for n in names}
    near = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.4)
    near += [n for n in lower if name.lower() in n and n not in near][: 3 - len(near)]
    return f"no {kind} {name!r}; did you mean: {', '.join(lower[n] for n in near) or ', '.join(names[:20])}"
