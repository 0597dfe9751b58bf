"""Makes of an AdamW config one for NovoGrad; the rest of the file keeps its order, its layout, its comments.

Files are changed as text: a value is put in the place of another, by where it stands.
"""

from __future__ import annotations

import copy
import importlib
import json
import re
from dataclasses import dataclass
from json import JSONDecoder
from pathlib import Path
from typing import Any

from novoscale.tools.configs import IN_YAML, Config, ConfigError, section_of

# AdamW's that mean the same here (docs/quality.md: the preset learns at AdamW's rates).
KEPT = ("lr", "weight_decay")
BESIDE = {"preset": "adamw", "momentum_dtype": "int8"}


@dataclass(frozen=True)
class Rewritten:
    """New files, not yet written.

    Attributes:
        files: their texts.
        said: what was left out or moved, in sentences.
    """

    files: dict[Path, str]
    said: list[str]


def novograd_section(config: dict[str, Any]) -> dict[str, Any]:
    """The "optimizer" of a NovoGrad config; that of a config for NovoGrad as it stands."""
    section = section_of(config, "optimizer")
    if str(section.get("type")).lower() == "novograd":
        return copy.deepcopy(section)
    params = section_of(section, "params")
    if not section and '"auto"' in json.dumps(config):
        params = dict.fromkeys(KEPT, "auto")  # what the script says, by Accelerate or the Trainer
    return {"type": "NovoGrad", "params": {**{k: params[k] for k in KEPT if k in params}, **BESIDE}}


def rewrite(config: Config, target: Path) -> Rewritten:
    """The files of a NovoGrad config; of a YAML also the DeepSpeed JSON that it names.

    Raises:
        ConfigError: there is nothing in the config to be changed, or a file is there already.
    """
    if config.deepspeed is None:
        raise ConfigError(
            f"{config.path}: --write: without DeepSpeed the optimizer is made in the script: "
            'NovoGrad(model.named_parameters(), lr=..., preset="adamw", momentum_dtype="int8")'
        )
    if config.accelerate is None:
        text, said = _json(config)
        files = {target: text}
    else:
        beside = target.with_suffix(".json")
        if beside == target:
            raise ConfigError(f"{target}: --write: {config.path} is YAML; name a .yaml file")
        text, said = _json(config)
        files = {beside: text, target: _yaml(config, beside)}
    there = next((path for path in files if path.exists()), None)
    if there is not None:
        raise ConfigError(f"{there}: --write: is there already; name a new file")
    return Rewritten(files, said)


def _json(config: Config) -> tuple[str, list[str]]:
    content = config.deepspeed or {}
    section = novograd_section(content)
    params = section_of(section_of(content, "optimizer"), "params")
    left = [key for key in params if key not in (*section["params"], "max_grad_norm")]
    said = []
    if left:
        said.append(f"left out of optimizer.params, being the other optimizer's: {', '.join(left)}")
    changes: dict[str, Any] = {"optimizer": section}
    if "lr" not in section["params"]:
        said.append("optimizer.params has no lr: NovoGrad's default is 0.001; put the script's there")
    if "max_grad_norm" in params:
        section["params"].pop("max_grad_norm", None)
        if "gradient_clipping" not in content:
            changes["gradient_clipping"] = params["max_grad_norm"]
            said.append("optimizer.params.max_grad_norm is gradient_clipping now")
    if config.inline or config.has_comments:
        if config.has_comments:
            said.append("comments are lost, as JSON has none")
        return json.dumps({**content, **changes}, indent=2) + "\n", said
    text = config.deepspeed_text
    for key, value in changes.items():
        text = put(text, key, value)
    return text, said


def put(text: str, key: str, value: Any) -> str:
    """JSON text in which a key at the top has another value, or is added at the end."""
    start, spans = _spans(text)
    first = re.search(r"\n([ \t]+)\"", text)
    indent = first.group(1) if first else ""
    written = json.dumps(value, indent=indent or None)
    if indent:
        written = written.replace("\n", f"\n{indent}")
    if key in spans:
        at, end = spans[key]
        return text[:at] + written + text[end:]
    at = max((end for _, end in spans.values()), default=start + 1)
    comma, gap = "," if spans else "", f"\n{indent}" if indent else " " if spans else ""
    return f'{text[:at]}{comma}{gap}"{key}": {written}{text[at:]}'


def _spans(text: str) -> tuple[int, dict[str, tuple[int, int]]]:
    """Where the object begins, and where the value of each of its keys begins and ends."""
    blank = re.compile(r"[ \t\r\n]*")

    def skip(index: int) -> int:
        found = blank.match(text, index)
        assert found is not None
        return found.end()

    start = skip(0)
    found: dict[str, tuple[int, int]] = {}
    at = skip(start + 1)
    while text[at] != "}":
        key, at = JSONDecoder().raw_decode(text, at)
        at = skip(skip(at) + 1)
        _, end = JSONDecoder().raw_decode(text, at)
        found[key] = (at, end)
        at = skip(end)
        at = skip(at + 1) if text[at] == "," else at
    return start, found


def _yaml(config: Config, beside: Path) -> str:
    """The YAML with the new DeepSpeed file in it; every other line as it was."""
    yaml: Any = importlib.import_module("yaml")
    root = yaml.compose(config.text)
    top = {key.value: (key, value) for key, value in root.value}
    section = top["deepspeed_config"][1] if "deepspeed_config" in top else None
    if section is None or section.flow_style or not section.value:
        raise ConfigError(f"{config.path}: --write: write deepspeed_config as a block, a key on each line")
    inside = {key.value: (key, value) for key, value in section.value}
    file = json.dumps(str(beside)) if re.search(r"[\s:#]", str(beside)) else str(beside)
    if "deepspeed_config_file" in inside:
        value = inside["deepspeed_config_file"][1]
        return str(config.text[: value.start_mark.index] + file + config.text[value.end_mark.index :])
    lines: list[str | None] = list(config.text.splitlines())
    for key, value in [inside[k] for k in IN_YAML.values() if k in inside] + [
        top[k] for k in ("mixed_precision",) if k in top
    ]:
        for number in range(key.start_mark.line, value.end_mark.line + 1):
            lines[number] = None
    line = section.start_mark.line
    new = f"{' ' * section.start_mark.column}deepspeed_config_file: {file}"
    kept = [*lines[:line], new, *lines[line:]]
    return "\n".join(text for text in kept if text is not None) + "\n"
