"""Rules about a script under a config: which optimizer runs, whether NovoGrad is registered in time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from novoscale.doctor.case import Case, running
from novoscale.doctor.findings import Finding, Rule, note, warning, wrong
from novoscale.doctor.script import Call, Script, Unknown

IMPORT = "import novoscale.integrations.deepspeed"
# What the Trainer wants to be the same in both places: the key, the argument, its default
# (transformers/integrations/deepspeed.py, trainer_config_process; training_args.py).
MATCHED: dict[str, tuple[str, Any]] = {
    "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", 8),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", 1),
    "gradient_clipping": ("max_grad_norm", 1.0),
    "optimizer.params.lr": ("learning_rate", 5e-5),
    "optimizer.params.eps": ("adam_epsilon", 1e-8),
    "optimizer.params.weight_decay": ("weight_decay", 0.0),
    "fp16.enabled": ("fp16", False),
    "bf16.enabled": ("bf16", False),
}


def _at(script: Script, call: Call) -> str:
    return f"{script.path}:{call.line}"


def registered_in_time(case: Case) -> Iterator[Finding]:
    """DeepSpeed looks the name up when it is started; NovoGrad must be registered by then.

    Source: deepspeed/runtime/engine.py, ``_do_sanity_check``; integrations/deepspeed, ``register``.
    """
    if not case.deepspeed or not case.novograd:
        return
    if case.script is None:
        yield note("optimizer.type", f"the script needs `{IMPORT}`, or `-m novoscale.run` before its name")
        return
    starts, registered = case.script.starts, case.script.registered
    if registered is None:
        text = f"NovoGrad is not registered; add `{IMPORT}`, or put `-m novoscale.run` before the script"
        yield wrong(str(case.script.path), text)
    elif starts is not None and starts.line < registered:
        text = f"too late: {starts.name} on line {starts.line} has started DeepSpeed; import it at the top"
        yield wrong(f"{case.script.path}:{registered}", text)


def replaced(case: Case) -> Iterator[Finding]:
    """Another optimizer runs than the script asks for.

    Source: accelerate/accelerator.py, ``_prepare_deepspeed``; transformers ``deepspeed_init``; engine.py.
    """
    now = running(case)
    if case.script is None or now.instead is None:
        return
    made = case.script.trainer if case.runner == "trainer" else case.script.optimizer
    where = _at(case.script, made) if made else str(case.script.path)
    if now.optimizer is None:
        yield wrong(where, f"{now.because}, and {now.instead} is not used; {_remedy(case)}")
        return
    dropped = made is not None and "optimizers" in made.keywords
    say = wrong if dropped or now.instead.startswith("novoscale") else warning
    if dropped or now.optimizer != now.instead:
        text = f"{now.optimizer} runs, and not {now.instead}: {now.because}; {_remedy(case)}"
        if now.optimizer == now.instead:
            text = f"optimizers= is dropped by the Trainer: {now.because}; leave it out"
        yield say(where, text)


def _remedy(case: Case) -> str:
    """What to do so that the script's optimizer runs, or the config's."""
    if case.runner == "trainer":
        if case.type is None and case.script and "optimizers" not in case.script.trainer.keywords:  # type: ignore[union-attr]
            return 'name the optimizer in the config, or set "zero_force_ds_cpu_optimizer": false'
        return "name it in the config, or leave the config without one and pass optimizer_cls_and_kwargs"
    if case.runner == "deepspeed" and case.type is not None:
        return "give deepspeed.initialize model_parameters in place of an optimizer"
    if case.type is not None:
        return "use accelerate.utils.DummyOptim in the script, or take optimizer out of the config"
    return 'set "zero_force_ds_cpu_optimizer": false, or name the optimizer in the config'


def dummy_without_a_name(case: Case) -> Iterator[Finding]:
    """A DummyOptim stands for the config's optimizer, and there is none.

    Source: accelerate/accelerator.py, ``_prepare_deepspeed``.
    """
    dummy = case.script.call("DummyOptim") if case.script else None
    if case.script and dummy and case.deepspeed and case.type is None:
        yield wrong(
            _at(case.script, dummy), "DummyOptim stands for the config's optimizer, and the config names none"
        )


def trainer_matches(case: Case) -> Iterator[Finding]:
    """The Trainer refuses values that differ from its arguments.

    Source: transformers/integrations/deepspeed.py, ``fill_match`` and ``trainer_config_finalize``.
    """
    if case.runner != "trainer" or not case.deepspeed or case.script is None:
        return
    arguments = case.script.arguments
    for key, (argument, default) in MATCHED.items():
        yield from _matches(arguments, key, argument, case.get(key), default)
    yield from _betas_match(case, arguments)


def _betas_match(case: Case, arguments: Call | None) -> Iterator[Finding]:
    where, betas = "optimizer.params.betas", case.get("optimizer.params.betas")
    if not isinstance(betas, list):
        return
    pair = [_said(arguments, name, default) for name, default in (("adam_beta1", 0.9), ("adam_beta2", 0.999))]
    if any(isinstance(beta, Unknown) for beta in pair):
        if betas != [0.9, 0.999]:
            yield note(where, "the Trainer stops unless --adam_beta1 and --adam_beta2 say the same")
    elif betas != pair:
        text = f"is {betas}, and the Trainer, whose adam_beta1 and 2 are {pair}, stops; {_leave_out(case)}"
        yield wrong(where, text)


def _said(arguments: Call | None, name: str, default: Any) -> Any:
    """What the Trainer's arguments say: of a script that makes none, or from a dict, it is not known."""
    if arguments is None:
        return Unknown("the command line")
    return arguments.keywords.get(name, arguments.keywords.get("**", default))


def _leave_out(case: Case) -> str:
    return "leave it out, and the preset's are used" if case.names_novograd else 'write "auto"'


def _matches(arguments: Call | None, key: str, argument: str, value: Any, default: Any) -> Iterator[Finding]:
    if value is None or value == "auto":
        return
    said = _said(arguments, argument, default)
    if isinstance(said, Unknown):
        if value != default:
            yield note(key, f'the Trainer stops unless --{argument} is {value} too; "auto" takes it over')
    elif said != value:
        yield wrong(key, f'is {value}, and the Trainer, whose {argument} is {said}, stops; write "auto"')


def clipping_in_the_script(case: Case) -> Iterator[Finding]:
    """DeepSpeed clips by itself: other clipping is refused or does nothing.

    Source: optimizer/layerwise.py, ``refuse_clipping``; accelerate/accelerator.py, ``clip_grad_norm_``.
    """
    if case.script is None or not case.deepspeed:
        return
    made = case.script.optimizer
    if made and made.is_novograd and made.keywords.get("max_grad_norm"):
        text = "max_grad_norm of NovoGrad is refused under DeepSpeed; set gradient_clipping in the config"
        yield wrong(_at(case.script, made), text)
    clips = case.script.call("clip_grad_norm_")
    if clips:
        limit = case.get("gradient_clipping", 1.0)
        text = f"{clips.short} does nothing under DeepSpeed; gradient_clipping of the config ({limit}) counts"
        yield warning(_at(case.script, clips), text)


def released_under_deepspeed(case: Case) -> Iterator[Finding]:
    """release_gradients is refused under DeepSpeed. Source: ``wrapped_and_released``."""
    if case.script is None or not case.deepspeed:
        return
    call = case.script.call("release_gradients", "ReleaseGradients")
    if call:
        text = "is refused under DeepSpeed, whose stages 2 and 3 free gradients by themselves"
        yield wrong(_at(case.script, call), f"{call.short} {text}")


def options_of_the_script(case: Case) -> Iterator[Finding]:
    """Options that NovoGrad does not have, given in the script. Source: novoscale/optimizer/options.py."""
    from novoscale.doctor.rules_novograd import _complaint

    made = case.script.optimizer if case.script else None
    if case.script and made and made.is_novograd:
        for key, value in made.keywords.items():
            message = None if isinstance(value, Unknown) or key == "params" else _complaint({key: value})
            if message is not None and key not in ("granularity", "normalize"):
                yield wrong(_at(case.script, made), message)


def optimizers_under_fsdp(case: Case) -> Iterator[Finding]:
    """The Trainer refuses ``optimizers=`` under FSDP. Source: transformers/trainer.py."""
    trainer = case.script.trainer if case.script else None
    if (
        case.script
        and trainer
        and case.yaml("distributed_type") == "FSDP"
        and "optimizers" in trainer.keywords
    ):
        text = "the Trainer refuses optimizers= under FSDP; pass optimizer_cls_and_kwargs"
        yield wrong(_at(case.script, trainer), text)


RULES: tuple[Rule, ...] = (
    registered_in_time,
    replaced,
    dummy_without_a_name,
    trainer_matches,
    clipping_in_the_script,
    released_under_deepspeed,
    options_of_the_script,
    optimizers_under_fsdp,
)
