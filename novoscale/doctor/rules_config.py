"""Rules about a config by itself: what the frameworks refuse and ignore. Each names its source."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from novoscale.doctor.case import BY_NAME, Case, built
from novoscale.doctor.findings import Finding, Rule, note, warning, wrong
from novoscale.tools.configs import IN_YAML, section_of

SECTIONS = ("optimizer", "scheduler", "zero_optimization", "fp16", "bf16", "data_types", "torch_autocast")
# What Accelerate fills in for "auto" (accelerate/accelerator.py, _prepare_deepspeed, and DeepSpeedPlugin).
FILLED_BY_ACCELERATE = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer.params.lr",
    "optimizer.params.weight_decay",
    "scheduler.params.warmup_min_lr",
    "scheduler.params.warmup_max_lr",
    "scheduler.params.warmup_num_steps",
    "scheduler.params.total_num_steps",
    "zero_optimization.stage",
    "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_optimizer.nvme_path",
    "zero_optimization.offload_param.device",
    "zero_optimization.offload_param.nvme_path",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "fp16.enabled",
    "bf16.enabled",
)
# And the Trainer besides (transformers/integrations/deepspeed.py, HfTrainerDeepSpeedConfig).
FILLED_BY_TRAINER = (*FILLED_BY_ACCELERATE, "optimizer.params.betas", "optimizer.params.eps")


def sections_are_objects(case: Case) -> Iterator[Finding]:
    """A section that is a string or a list stops DeepSpeed with an AttributeError.

    Source: deepspeed/runtime/config.py, the ``get_*`` functions.
    """
    for key in SECTIONS:
        value = (case.config.deepspeed or {}).get(key)
        if (
            value is None
            or isinstance(value, dict)
            or (key == "zero_optimization" and isinstance(value, bool))
        ):
            continue
        yield wrong(key, f"must be an object, as {{...}}, and is {json.dumps(value)}")
    for key in ("type", "params"):
        value, kind = case.get(f"optimizer.{key}"), {"type": str, "params": dict}[key]
        if value is not None and not isinstance(value, kind):
            what = "a name" if kind is str else "an object, as {...},"
            yield wrong(f"optimizer.{key}", f"must be {what} and is {json.dumps(value)}")


def refused_by_deepspeed(case: Case) -> Iterator[Finding]:
    """What DeepSpeed's own check refuses: unknown keys of its sections, values, features that were removed.

    Source: deepspeed/runtime/config.py, ``DeepSpeedConfig``, which is run.
    """
    checker = _deepspeed(case)
    if checker is None:
        return
    config = case.config.deepspeed or {}
    for path, message in checker.refusals(config):
        yield wrong(case.config.named(path), f"DeepSpeed {_version('deepspeed')} refuses it: {message}")


def never_read_by_deepspeed(case: Case) -> Iterator[Finding]:
    """A key at the top that DeepSpeed never looks at has no effect.

    Source: deepspeed/runtime/config.py, ``DeepSpeedConfig``, which is run and watched.
    """
    checker = _deepspeed(case)
    if checker is None or checker.refusals(case.config.deepspeed or {}):
        return
    for key in checker.never_read(case.config.deepspeed or {}):
        yield warning(key, f"is ignored: DeepSpeed {_version('deepspeed')} never looks at it")


def not_checked(case: Case) -> Iterator[Finding]:
    """Without DeepSpeed installed, its own checks cannot be run."""
    if case.deepspeed and importlib.util.find_spec("deepspeed") is None:
        yield note(
            "config", "DeepSpeed is not installed here, so its own check of keys and values was not run"
        )


def refused_by_accelerate(case: Case) -> Iterator[Finding]:
    """What Accelerate refuses to read: unknown keys and types of training.

    Source: accelerate/commands/config/config_args.py, ``load_config_from_file``, which is run.
    """
    if case.config.accelerate is None or importlib.util.find_spec("accelerate") is None:
        return
    reader: Any = importlib.import_module("accelerate.commands.config.config_args")
    try:
        reader.load_config_from_file(str(case.config.path))
    except Exception as error:  # it raises what it likes
        text = " ".join(str(error).split())
        key = next((key for key in case.config.accelerate if f"'{key}'" in text), "distributed_type")
        yield wrong(key, f"Accelerate {_version('accelerate')} refuses it: {text}")


def beside_a_deepspeed_file(case: Case) -> Iterator[Finding]:
    """Accelerate refuses keys of DeepSpeed beside ``deepspeed_config_file``.

    Source: accelerate/utils/dataclasses.py, ``DeepSpeedPlugin._deepspeed_config_checks``.
    """
    if case.config.accelerate is None or not case.deepspeed or case.config.inline:
        return
    section = section_of(case.config.accelerate, "deepspeed_config")
    keys = [f"deepspeed_config.{key}" for key in IN_YAML.values() if key in section]
    if case.yaml("mixed_precision") is not None:
        keys.append("mixed_precision")
    for key in keys:
        yield wrong(
            key, "Accelerate refuses it beside deepspeed_config_file; set it in the DeepSpeed JSON instead"
        )


def relative_to_the_launch(case: Case) -> Iterator[Finding]:
    """The path of the DeepSpeed JSON is relative to the folder of the launch.

    Source: accelerate/utils/deepspeed.py, ``HfDeepSpeedConfig``: ``os.path.exists``.
    """
    if case.config.accelerate is None or case.config.deepspeed_path is None:
        return
    said = section_of(case.config.accelerate, "deepspeed_config")["deepspeed_config_file"]
    if not os.path.exists(said):
        text = f"{said} is not in this folder but beside the YAML; launch from where that path is right"
        yield warning("deepspeed_config.deepspeed_config_file", text)


def one_process_on_cpu(case: Case) -> Iterator[Finding]:
    """With ``use_cpu: true`` the launcher starts one process, or processes that do not know each other.

    Source: accelerate/commands/launch.py, ``launch_command``: every branch asks ``not args.cpu``.
    """
    by_mpi = section_of(case.config.accelerate or {}, "mpirun_config")
    if case.yaml("use_cpu") is True and case.yaml("num_processes", 1) != 1 and not by_mpi:
        kind = case.yaml("distributed_type")
        yield wrong("use_cpu", f"accelerate launch then starts one process, and not {kind}; set it to false")


def zero_section_is_compulsory(case: Case) -> Iterator[Finding]:
    """Accelerate and the Trainer refuse a DeepSpeed config without ``zero_optimization``.

    Source: accelerate/utils/dataclasses.py, ``DeepSpeedPlugin.__post_init__``.
    """
    if case.deepspeed and case.runner in ("accelerate", "trainer") and case.get("zero_optimization") is None:
        yield wrong(
            "zero_optimization", 'is missing, and Accelerate refuses that; write {"stage": 0} for none'
        )


def comments_in_json(case: Case) -> Iterator[Finding]:
    """DeepSpeed reads HJSON, Accelerate and the Trainer only JSON.

    Source: deepspeed/runtime/config.py (``hjson.load``), accelerate/utils/deepspeed.py (``json.load``).
    """
    if case.config.has_comments:
        where, text = str(case.config.deepspeed_path), "has comments or commas that JSON does not have"
        if case.runner in ("accelerate", "trainer"):
            yield wrong(where, f"{text}, and Accelerate reads JSON only; take them out")
        else:
            yield warning(where, f"{text}: deepspeed reads it, Accelerate and the Trainer do not")


def auto_values(case: Case) -> Iterator[Finding]:
    """An "auto" that no one fills in.

    Source: accelerate/utils/dataclasses.py, ``fill_match``; transformers/integrations/deepspeed.py; DeepSpeed
    itself knows no "auto" (deepspeed/runtime/config_utils.py drops it in the sections that it checks).
    """
    keys = [key for key in _auto(case.config.deepspeed or {}) if not case.config.inline]
    if case.runner == "accelerate":
        for key in (key for key in keys if key not in FILLED_BY_ACCELERATE):
            yield wrong(key, 'Accelerate has no value for this "auto" and stops; write the value')
        return
    if case.runner == "trainer":
        for key in (key for key in keys if key not in FILLED_BY_TRAINER):
            yield warning(key, 'the Trainer has no value for this "auto"; write the value')
        return
    for key in (key for key in keys if not key.startswith(("zero_optimization.", "fp16.", "bf16."))):
        if case.runner == "deepspeed":
            yield wrong(key, '"auto" is a word of Accelerate and the Trainer; DeepSpeed stops at it')
        elif key not in FILLED_BY_ACCELERATE:
            yield warning(key, '"auto" is filled in by the Trainer only, Accelerate and DeepSpeed stop at it')


def precisions_agree(case: Case) -> Iterator[Finding]:
    """The launcher's mixed precision against that of the DeepSpeed config.

    Source: accelerate/utils/dataclasses.py, ``set_mixed_precision``.
    """
    other = {"fp16": "bf16", "bf16": "fp16"}.get(str(case.yaml("mixed_precision", "no")))
    if other is not None and not case.config.inline and case.get(f"{other}.enabled") is True:
        yield wrong(
            f"{other}.enabled", f"is at odds with mixed_precision of {case.config.path}; keep one of them"
        )


def batch_sizes_agree(case: Case) -> Iterator[Finding]:
    """train_batch_size has to be micro batch times accumulation times ranks.

    Source: deepspeed/runtime/config.py, ``_batch_assertion``.
    """
    ranks = case.ranks or case.yaml("num_processes")
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, steps = (case.get(key) for key in keys)
    if all(isinstance(number, int) for number in (ranks, total, micro, steps)):
        product = micro * steps * ranks
        if total != product:
            yield wrong(
                keys[0], f"is {total}, and {micro} * {steps} * {ranks} ranks is {product}; DeepSpeed stops"
            )


def optimizer_is_known(case: Case) -> Iterator[Finding]:
    """DeepSpeed knows its own names in any case, and those of ``torch.optim`` as they are written.

    Source: deepspeed/runtime/engine.py, ``_is_supported_optimizer``.
    """
    if case.type is None or built(case) is not None:
        return
    import torch

    names = {n.lower(): n for n in dir(torch.optim) if isinstance(getattr(torch.optim, n), type)}
    near = names.get(case.type.lower())
    gone = ("onebitadam", "zerooneadam", "onebitlamb")
    if case.type.lower() in gone:
        advice = "the 1-bit optimizers were removed from DeepSpeed; they never went with ZeRO-2 and 3"
    else:
        advice = (
            f"write {near}"
            if near
            else f"it knows {', '.join(sorted(BY_NAME))} and the classes of torch.optim"
        )
    yield wrong("optimizer.type", f"DeepSpeed knows no optimizer {case.type!r}: {advice}")


def untested_optimizer(case: Case) -> Iterator[Finding]:
    """ZeRO refuses optimizers that are not on its list unless told otherwise.

    Source: deepspeed/runtime/engine.py, ``_do_optimizer_sanity_check``; runtime/zero/utils.py.
    """
    tested = (
        "torch.optim.Adam",
        "torch.optim.AdamW",
        "torch.optim.Adagrad",
        "FusedAdam",
        "FusedLion",
        "Muon",
    )
    made = built(case) if case.type else None
    if made is None or not case.stage or case.names_novograd or made.startswith((*tested, "DeepSpeed")):
        return
    if case.get("zero_allow_untested_optimizer") is not True:
        yield wrong(
            "zero_allow_untested_optimizer",
            f"must be true for {made}, or ZeRO refuses it (and under ZeRO it may be another optimizer: "
            "novoscale verify finds out)",
        )


def adam_is_adamw(case: Case) -> Iterator[Finding]:
    """``"type": "Adam"`` runs AdamW.

    Source: deepspeed/runtime/config.py, ``ADAM_W_MODE_DEFAULT``; engine.py, ``_configure_basic_optimizer``.
    """
    if (case.type or "").lower() == "adam" and case.params.get("adam_w_mode", True) is True:
        yield note(
            "optimizer.type", 'DeepSpeed runs "Adam" as AdamW unless optimizer.params.adam_w_mode is false'
        )


def learning_rate_is_given(case: Case) -> Iterator[Finding]:
    """Without ``lr`` an optimizer's own default runs, whatever the script says of a learning rate.

    The Trainer and Accelerate fill in what is "auto", and nothing that is missing. A scheduler of DeepSpeed
    that has a rate sets it.

    Source: transformers/integrations/deepspeed.py, ``fill_match``; accelerate/accelerator.py,
    ``_prepare_deepspeed``.
    """
    scheduled = section_of(section_of(case.config.deepspeed or {}, "scheduler"), "params")
    if case.type is not None and "lr" not in case.params and not any("lr" in key for key in scheduled):
        text = 'is not given: the default of the optimizer runs, mostly 0.001. Only "auto" is filled in'
        yield warning("optimizer.params.lr", text)


def warmup_type_is_known(case: Case) -> Iterator[Finding]:
    """DeepSpeed takes any other ``warmup_type`` for "log".

    Source: deepspeed/runtime/lr_schedules.py, ``WarmupLR``.
    """
    found = case.get("scheduler.params.warmup_type", "log")
    if found not in ("log", "linear", "auto"):
        text = f'{found!r} is not known to DeepSpeed, which takes "log" then; it has "log" and "linear"'
        yield warning("scheduler.params.warmup_type", text)


def max_grad_norm_in_params(case: Case) -> Iterator[Finding]:
    """DeepSpeed refuses ``max_grad_norm`` among the options of any optimizer.

    Source: deepspeed/runtime/engine.py, ``_configure_basic_optimizer``.
    """
    if "max_grad_norm" in case.params:
        yield wrong(
            "optimizer.params.max_grad_norm",
            "DeepSpeed refuses it for every optimizer; set gradient_clipping",
        )


def clipping_by_default(case: Case) -> Iterator[Finding]:
    """DeepSpeed clips to 1.0 unless told otherwise, since 0.19.3.

    Source: deepspeed/runtime/constants.py, ``GRADIENT_CLIPPING_DEFAULT``.
    """
    if case.deepspeed and case.get("gradient_clipping") is None and case.runner != "trainer":
        yield note(
            "gradient_clipping", "is not given, and DeepSpeed since 0.19.3 then clips to 1.0; 0 is off"
        )


def _auto(config: dict[str, Any], before: str = "") -> Iterator[str]:
    """Paths of the values that are "auto"."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _auto(value, f"{before}{key}.")
        elif value == "auto":
            yield before + key


def _deepspeed(case: Case) -> Any:
    """DeepSpeed's own check, if it is installed and the config is fit to be shown to it."""
    if not case.deepspeed or importlib.util.find_spec("deepspeed") is None or any(sections_are_objects(case)):
        return None
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing is trained
    with contextlib.redirect_stdout(sys.stderr):  # where its logger writes
        return importlib.import_module("novoscale.doctor.deepspeed_config")


def _version(package: str) -> str:
    return importlib.import_module("importlib.metadata").version(package)  # type: ignore[no-any-return]


RULES: tuple[Rule, ...] = (
    sections_are_objects,
    refused_by_deepspeed,
    never_read_by_deepspeed,
    not_checked,
    refused_by_accelerate,
    beside_a_deepspeed_file,
    relative_to_the_launch,
    one_process_on_cpu,
    zero_section_is_compulsory,
    comments_in_json,
    auto_values,
    precisions_agree,
    batch_sizes_agree,
    optimizer_is_known,
    untested_optimizer,
    adam_is_adamw,
    learning_rate_is_given,
    warmup_type_is_known,
    max_grad_norm_in_params,
    clipping_by_default,
)
