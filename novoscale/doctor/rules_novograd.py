"""Rules about NovoGrad under a config: what it refuses there, and options that it does not have."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from novoscale.doctor.case import Case
from novoscale.doctor.findings import Finding, Rule, note, warning, wrong
from novoscale.optimizer.novograd import NovoGrad
from novoscale.tools.configs import section_of

ADAM_ONLY = "DeepSpeed implements it for its own Adam only; take it out of the config"


def _refuses(case: Case, key: str, why: str) -> Finding:
    """Wrong where NovoGrad is asked for; of another optimizer's config it is worth a warning."""
    where = case.config.named(key)
    if case.novograd:
        return wrong(where, f"NovoGrad is refused with it: {why}")
    return warning(where, f"NovoGrad would be refused with it: {why}")


def options_exist(case: Case) -> Iterator[Finding]:
    """Options that NovoGrad does not have, or that are out of range.

    Source: novoscale/optimizer/options.py, which is run, key by key.
    """
    if not case.names_novograd:
        return
    params = {k: v for k, v in case.params.items() if v != "auto" and k != "max_grad_norm"}
    fit = {}
    for key, value in params.items():
        message = _complaint({key: value, **_companions(key, params)})
        if message is None:
            fit[key] = value
        else:
            yield wrong(f"optimizer.params.{key}", message)
    if len(fit) == len(params) and (message := _complaint(params)) is not None:
        yield wrong("optimizer.params", message)


def _companions(key: str, params: dict[str, object]) -> dict[str, object]:
    """What an option is checked with: the preset, which others contradict or complete."""
    together = ("preset", "normalize", "granularity", "norm_type", "reg_inside_moment")
    return {k: params[k] for k in together if k in params and k != key and _complaint({k: params[k]}) is None}


def _complaint(params: dict[str, object]) -> str | None:
    """What NovoGrad says to options; None if it takes them."""
    try:
        NovoGrad([torch.zeros(1, device="cpu")], **params)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error).removeprefix("NovoGrad: ")
    return None


def zenflow(case: Case) -> Iterator[Finding]:
    """Source: integrations/deepspeed/refusals.py; deepspeed/runtime/zenflow."""
    if case.get("zero_optimization.zenflow") is not None:
        yield _refuses(case, "zero_optimization.zenflow", ADAM_ONLY)


def super_offload(case: Case) -> Iterator[Finding]:
    """Source: integrations/deepspeed/refusals.py; deepspeed/runtime/superoffload."""
    if case.get("zero_optimization.offload_optimizer.super_offload") is True:
        yield _refuses(case, "zero_optimization.offload_optimizer.super_offload", ADAM_ONLY)


def twin_flow(case: Case) -> Iterator[Finding]:
    """Source: integrations/deepspeed/refusals.py; deepspeed/runtime/zero/offload_config.py."""
    if case.offload != "none" and case.get("zero_optimization.offload_optimizer.ratio", 1.0) != 1.0:
        yield _refuses(
            case, "zero_optimization.offload_optimizer.ratio", f"below 1 is Twin-Flow, and {ADAM_ONLY}"
        )


def nvme(case: Case) -> Iterator[Finding]:
    """Source: integrations/deepspeed/refusals.py; deepspeed/runtime/swap_tensor."""
    for part in ("offload_optimizer", "offload_param"):
        if case.get(f"zero_optimization.{part}.device") == "nvme":
            why = "the swapper takes every state for a flat partition; use the device cpu"
            yield _refuses(case, f"zero_optimization.{part}.device", why)


def master_weights(case: Case) -> Iterator[Finding]:
    """Source: integrations/deepspeed/refusals.py; deepspeed/runtime/precision_config.py."""
    if case.get("fp16.fp16_master_weights_and_grads") is True:
        yield _refuses(case, "fp16.fp16_master_weights_and_grads", ADAM_ONLY)
    if case.get("bf16.bf16_master_weights_and_grads") is True:
        key = "bf16.bf16_master_weights_and_grads"
        if case.offload != "none":
            yield _refuses(case, key, f"with offload {ADAM_ONLY}")
        elif case.get("bf16.bf16_optimizer_states") is not True:
            yield _refuses(case, key, "set bf16.bf16_optimizer_states to true beside it")


def elastic_checkpoint(case: Case) -> Iterator[Finding]:
    """Source: integrations/deepspeed/refusals.py; stage_1_and_2.py."""
    if case.get("zero_optimization.elastic_checkpoint") is True:
        why = "it would merge second moments of layers as if they were elements; take it out of the config"
        yield _refuses(case, "zero_optimization.elastic_checkpoint", why)


def autocast_to_float16(case: Case) -> Iterator[Finding]:
    """Source: integrations/deepspeed/refusals.py; deepspeed/runtime/torch_autocast.py."""
    autocast = section_of(case.config.deepspeed or {}, "torch_autocast")
    if autocast.get("enabled") is True and str(autocast.get("dtype")) in (
        "float16",
        "fp16",
        "half",
        "torch.float16",
    ):
        why = "its gradient scaler decides on each rank alone whether to step; use bfloat16"
        yield _refuses(case, "torch_autocast.dtype", why)


def fsdp1(case: Case) -> Iterator[Finding]:
    """FSDP1 flattens parameters without saying how. Accelerate's default is version 1.

    Source: accelerate/utils/dataclasses.py, ``FullyShardedDataParallelPlugin``; optimizer/tensor_checks.py,
    ``unknown_layers``.
    """
    if case.yaml("distributed_type") == "FSDP":
        version = section_of(case.config.accelerate or {}, "fsdp_config").get("fsdp_version", 1)
        if str(version) != "2":
            why = "FSDP1 does not say where layers lie; set it to 2 (`accelerate to-fsdp2` converts the file)"
            yield _refuses(case, "fsdp_config.fsdp_version", why)


def megatron(case: Case) -> Iterator[Finding]:
    """Megatron-LM makes its own optimizer. Source: accelerate/utils/megatron_lm.py."""
    if case.yaml("distributed_type") == "MEGATRON_LM":
        yield _refuses(case, "distributed_type", "Megatron-LM makes its own optimizer; use DEEPSPEED or FSDP")


def muon_preset(case: Case) -> Iterator[Finding]:
    """DeepSpeed makes the optimizer from parameters without names. Source: optimizer/hidden.py."""
    if case.names_novograd and case.params.get("preset") == "muon":
        text = (
            'NovoGrad is refused with "muon" here: DeepSpeed gives it parameters without names, which do not '
            "say which are matrices of hidden layers, and ZeRO gives each rank a part of them; use "
            '"adamw", or make NovoGrad(novoscale.param_groups(model, preset="muon")) in the script, for one '
            "process or DistributedDataParallel"
        )
        yield wrong("optimizer.params.preset", text)


def adams_betas(case: Case) -> Iterator[Finding]:
    """The Trainer's "auto" gives NovoGrad Adam's betas. Source: transformers/training_args.py."""
    if case.names_novograd and case.params.get("betas") == "auto" and case.runner in ("trainer", None):
        text = "the Trainer's are Adam's, 0.9 and 0.999; leave betas out, and NovoGrad's preset has its own"
        yield warning("optimizer.params.betas", f'"auto": {text}')


def needless_keys(case: Case) -> Iterator[Finding]:
    """Keys about an optimizer of the script, where the config names NovoGrad.

    Source: deepspeed/runtime/engine.py, ``_configure_optimizer``; integrations/deepspeed, ``register``.
    """
    if case.names_novograd and case.get("zero_force_ds_cpu_optimizer") is not None and case.client is None:
        text = "is ignored: it is about an optimizer of the script, and this one is made of the config"
        yield note("zero_force_ds_cpu_optimizer", text)


def offload_of_a_client(case: Case) -> Iterator[Finding]:
    """With offload, an optimizer of the script gives way to DeepSpeed's CPU Adam.

    Source: accelerate/utils/deepspeed.py, ``map_pytorch_optim_to_deepspeed``; engine.py.
    """
    if case.type is None and case.replaces_clients and case.script is None:
        yield warning(
            case.config.named("zero_optimization.offload_optimizer.device"),
            "with offload Accelerate and the Trainer replace an optimizer of the script by "
            "DeepSpeedCPUAdam without a word; name it in the config, or set "
            '"zero_force_ds_cpu_optimizer": false',
        )


RULES: tuple[Rule, ...] = (
    options_exist,
    zenflow,
    super_offload,
    twin_flow,
    nvme,
    master_weights,
    elastic_checkpoint,
    autocast_to_float16,
    fsdp1,
    megatron,
    muon_preset,
    adams_betas,
    needless_keys,
    offload_of_a_client,
)
