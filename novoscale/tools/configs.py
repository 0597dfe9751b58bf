"""Reads a DeepSpeed JSON or an Accelerate YAML, as the frameworks read them."""

from __future__ import annotations

import importlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

YAML = (".yaml", ".yml")
# Keys of an Accelerate YAML, and where Accelerate puts them in a DeepSpeed config when it makes one
# (accelerate/utils/dataclasses.py, DeepSpeedPlugin.__post_init__).
IN_YAML = {
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer.device": "offload_optimizer_device",
    "zero_optimization.offload_optimizer.nvme_path": "offload_optimizer_nvme_path",
    "zero_optimization.offload_param.device": "offload_param_device",
    "zero_optimization.offload_param.nvme_path": "offload_param_nvme_path",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "zero3_save_16bit_model",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "gradient_clipping",
}


class ConfigError(ValueError):
    """A config or a script that cannot be read, or a file that cannot be written; says why."""


@dataclass(frozen=True)
class Config:
    """What was read.

    Attributes:
        path: the file that was named.
        text: its text.
        accelerate: its content, if it is an Accelerate YAML.
        deepspeed: the DeepSpeed config, if the training is DeepSpeed's; what Accelerate makes of a YAML that
            names no file.
        deepspeed_path: the DeepSpeed JSON, if there is one.
        deepspeed_text: its text.
        has_comments: the DeepSpeed JSON is none: DeepSpeed reads HJSON.
    """

    path: Path
    text: str
    accelerate: dict[str, Any] | None = None
    deepspeed: dict[str, Any] | None = None
    deepspeed_path: Path | None = None
    deepspeed_text: str = ""
    has_comments: bool = False

    @property
    def inline(self) -> bool:
        """Whether Accelerate makes the DeepSpeed config of the YAML's own keys."""
        return self.deepspeed is not None and self.deepspeed_path is None

    def named(self, key: str) -> str:
        """Where a key of the DeepSpeed config is written."""
        if not self.inline:
            return key
        if key in ("bf16.enabled", "fp16.enabled"):
            return "mixed_precision"
        return f"deepspeed_config.{IN_YAML.get(key, key)}"


def read(path: Path) -> Config:
    """Read a config file.

    Raises:
        ConfigError: it cannot be read, or is not what its name says.
    """
    text = text_of(path)
    if path.suffix not in YAML:
        content, has_comments = _json(path, text)
        return Config(path, text, None, content, path, text, has_comments)
    accelerate = _yaml(path, text)
    if accelerate.get("distributed_type") != "DEEPSPEED":
        return Config(path, text, accelerate)
    section = section_of(accelerate, "deepspeed_config")
    if "deepspeed_config_file" not in section:
        return Config(path, text, accelerate, _made_by_accelerate(accelerate))
    file = Path(str(section["deepspeed_config_file"]))
    found = next((f for f in (file, path.parent / file) if f.is_file()), None)
    if found is None:
        raise ConfigError(
            f"{path}: deepspeed_config.deepspeed_config_file: {file} does not exist; the path is relative to "
            "the folder that you launch from"
        )
    json_text = text_of(found)
    content, has_comments = _json(found, json_text)
    return Config(path, text, accelerate, content, found, json_text, has_comments)


def text_of(path: Path) -> str:
    """The text of a file.

    Raises:
        ConfigError: there is none, or it is no text.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: a folder; name a file")
    if not path.exists():
        raise ConfigError(f"{path}: there is no such file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def section_of(content: dict[str, Any], key: str) -> dict[str, Any]:
    """A section of a config; empty where there is none, or something else in its place."""
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _json(path: Path, text: str) -> tuple[dict[str, Any], bool]:
    """The content, and whether it is HJSON: DeepSpeed reads that (runtime/config.py), with its comments."""
    has_comments = False
    if not text.strip():
        raise ConfigError(f"{path}: is empty; a DeepSpeed config is a JSON object")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        content = _hjson(text) if text.lstrip()[0] in "{/#" else None
        has_comments = True
        if content is None:
            raise ConfigError(f"{path}: not a DeepSpeed config in JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a DeepSpeed config is a JSON object, not {_kind(content)}")
    return content, has_comments


def _hjson(text: str) -> Any:
    """What DeepSpeed reads; None where it cannot, or where its reader is not installed."""
    if importlib.util.find_spec("hjson") is None:
        return None
    hjson = importlib.import_module("hjson")  # comes with deepspeed
    try:
        return json.loads(hjson.dumpsJSON(hjson.loads(text)))
    except ValueError:
        return None


def _yaml(path: Path, text: str) -> dict[str, Any]:
    if importlib.util.find_spec("yaml") is None:
        raise ConfigError(f"{path}: reading YAML needs PyYAML: pip install 'novoscale[accelerate]'")
    yaml: Any = importlib.import_module("yaml")  # comes with accelerate
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path}: not an Accelerate config in YAML: {' '.join(str(error).split())}"
        ) from None
    if content is None:
        raise ConfigError(f"{path}: is empty; `accelerate config` makes one")
    if not isinstance(content, dict) or "distributed_type" not in content:
        raise ConfigError(f"{path}: not an Accelerate config: it has no distributed_type")
    return content


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a string", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number")


def _made_by_accelerate(accelerate: dict[str, Any]) -> dict[str, Any]:
    """The config that Accelerate makes of the YAML's keys (DeepSpeedPlugin.__post_init__)."""
    section = section_of(accelerate, "deepspeed_config")
    config: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": section.get("gradient_accumulation_steps", "auto"),
        "gradient_clipping": section.get("gradient_clipping", "auto"),
        "zero_optimization": {"stage": section.get("zero_stage", 2)},
    }
    zero = config["zero_optimization"]
    for part in ("offload_optimizer", "offload_param"):
        device = section.get(f"{part}_device", "none")
        if device != "none":
            path = section.get(f"{part}_nvme_path") if device == "nvme" else None
            zero[part] = {"device": device, **({"nvme_path": path} if path else {})}
    if "zero3_save_16bit_model" in section:
        zero["stage3_gather_16bit_weights_on_model_save"] = section["zero3_save_16bit_model"]
    precision = str(accelerate.get("mixed_precision", "no"))
    if precision in ("bf16", "fp16"):
        config[precision] = {"enabled": True}
    return config
