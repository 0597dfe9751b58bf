"""A case: the config, the script, and which optimizer will really run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from novoscale.doctor.script import Call, Script
from novoscale.tools.configs import Config, section_of

# What DeepSpeed makes of a name that it knows: its class, and the one with offload
# (deepspeed/runtime/engine.py, _configure_basic_optimizer). Of any other: torch.optim's, by getattr.
BY_NAME = {
    "adam": ("FusedAdam", "DeepSpeedCPUAdam"),
    "adamw": ("FusedAdam", "DeepSpeedCPUAdam"),
    "adagrad": ("torch.optim.Adagrad", "DeepSpeedCPUAdagrad"),
    "lamb": ("FusedLamb", "FusedLamb"),
    "lion": ("FusedLion", "DeepSpeedCPULion"),
    "muon": ("MuonWithAuxAdam", "MuonWithAuxAdam"),
    "muadam": ("mup.MuAdam", "mup.MuAdam"),
    "muadamw": ("mup.MuAdamW", "mup.MuAdamW"),
    "musgd": ("mup.MuSGD", "mup.MuSGD"),
}


@dataclass(frozen=True)
class Running:
    """The optimizer that will run.

    Attributes:
        optimizer: its class; None if neither the config nor a script says.
        because: why, as the end of a sentence.
        instead: the one that was asked for and does not run, if so.
    """

    optimizer: str | None
    because: str
    instead: str | None = None


@dataclass(frozen=True)
class Case:
    """What the rules look at."""

    config: Config
    script: Script | None = None
    ranks: int | None = None

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the DeepSpeed config by its path; the default where something on the way is none."""
        value: Any = self.config.deepspeed
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    def yaml(self, key: str, default: Any = None) -> Any:
        """A value of the Accelerate YAML."""
        return (self.config.accelerate or {}).get(key, default)

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed trains."""
        return self.config.deepspeed is not None

    @property
    def runner(self) -> str | None:
        """Who trains: "trainer", "accelerate", "deepspeed"; None if that is not known."""
        by_script = self.script.runner if self.script else None
        if by_script is None and self.config.accelerate is not None:
            return "accelerate"
        return by_script

    @property
    def type(self) -> str | None:
        """The name of the optimizer in the DeepSpeed config."""
        named = self.get("optimizer.type")
        return named if isinstance(named, str) else None

    @property
    def params(self) -> dict[str, Any]:
        """Its options."""
        return section_of(section_of(self.config.deepspeed or {}, "optimizer"), "params")

    @property
    def names_novograd(self) -> bool:
        """Whether the config asks for NovoGrad."""
        return (self.type or "").lower() == "novograd"

    @property
    def novograd(self) -> bool:
        """Whether the config or the script asks for NovoGrad."""
        return self.names_novograd or (self.script is not None and self.script.has_novograd)

    @property
    def stage(self) -> int:
        """Of ZeRO; 0 without."""
        stage = self.get("zero_optimization.stage", 0)
        return stage if isinstance(stage, int) and not isinstance(stage, bool) else 0

    @property
    def offload(self) -> str:
        """The device to which the optimizer is offloaded, or "none"."""
        if self.get("zero_optimization.cpu_offload") is True:  # the old spelling
            return "cpu"
        return str(self.get("zero_optimization.offload_optimizer.device", "none"))

    @property
    def replaces_clients(self) -> bool:
        """Whether an optimizer of the script has to give way to DeepSpeed's CPU Adam."""
        return self.offload != "none" and self.get("zero_force_ds_cpu_optimizer", True) is not False

    @property
    def client(self) -> Call | None:
        """The optimizer that the script makes and hands over; of a Trainer none."""
        if self.script is None or self.runner == "trainer":
            return None
        start = self.script.initialize
        handed = start is None or "optimizer" in start.keywords
        return self.script.optimizer if handed else None


def running(case: Case) -> Running:
    """Which optimizer will run.

    Where a registered NovoGrad would be replaced, integrations/accelerate.py and transformers.py stop.
    """
    now = _chosen(case)
    script = case.script
    if script is None or script.registered is None or case.runner not in ("accelerate", "trainer"):
        return now
    dropped = script.trainer is not None and "optimizers" in script.trainer.keywords
    if now.optimizer and now.instead == "novoscale.NovoGrad" and (dropped or now.optimizer != now.instead):
        return Running(None, f"novoscale stops it, as {now.optimizer} would run: {now.because}", now.instead)
    return now


def _chosen(case: Case) -> Running:
    """What the framework chooses."""
    if case.runner == "trainer":
        return _of_trainer(case)
    if not case.deepspeed:
        made = case.client
        if made is None:
            return Running(None, "the script makes it")
        return Running(made.name, f"the script makes it on line {made.line}")
    if case.client is not None:
        return _of_client(case, case.client)
    if case.type is None:
        return Running(None, "the config names none, so the script has to make it")
    return Running(built(case), _named(case))


def built(case: Case) -> str | None:
    """The class that DeepSpeed makes of the config's optimizer; None if there is none of that name.

    Source: deepspeed/runtime/engine.py, ``_configure_basic_optimizer`` and ``get_optimizer_configuration``.
    """
    named = case.type or ""
    if case.names_novograd:
        return "novoscale.NovoGrad"
    if named.lower() in ("adam", "adamw") and case.params.get("torch_adam") is True:
        plain = named.lower() == "adam" and case.params.get("adam_w_mode", True) is False
        return f"torch.optim.{'Adam' if plain else 'AdamW'}"
    if named.lower() in BY_NAME:
        return BY_NAME[named.lower()][case.offload != "none"]
    import torch

    return f"torch.optim.{named}" if isinstance(getattr(torch.optim, named, None), type) else None


def _named(case: Case) -> str:
    why = f"optimizer.type is {case.type!r}"
    if (case.type or "").lower() in ("adam", "adamw"):
        if case.params.get("torch_adam") is True:
            return f"{why} and optimizer.params.torch_adam is true"
        if case.offload != "none":
            return f"{why} and the optimizer is offloaded"
    return why


def _of_client(case: Case, made: Call) -> Running:
    """An optimizer of the script: accelerate/accelerator.py ``_prepare_deepspeed``, engine.py."""
    line = f"the script makes it on line {made.line}"
    if case.runner == "accelerate" and case.type is not None:
        why = "Accelerate refuses an optimizer in the config and in the script at the same time"
        return Running(None, why, made.name)
    if not case.replaces_clients or made.name.startswith("deepspeed.ops."):
        return Running(made.name, line, built(case) if case.type else None)
    if case.runner == "accelerate":
        cpu = "DeepSpeedCPUAdagrad" if made.name == "torch.optim.Adagrad" else "DeepSpeedCPUAdam"
        return Running(
            cpu, "Accelerate puts it in the place of the script's, as the optimizer is offloaded", made.name
        )
    return Running(None, "DeepSpeed refuses an optimizer of the script with offload", made.name)


def _of_trainer(case: Case) -> Running:
    """The Trainer's choice: transformers/integrations/deepspeed.py ``deepspeed_init``, trainer.py."""
    assert case.script is not None
    assert case.script.trainer is not None
    given = case.script.trainer.keywords
    asked = case.script.optimizer.name if case.script.optimizer else None
    if case.deepspeed and case.type is not None:
        handed = "optimizers" in given or "optimizer_cls_and_kwargs" in given
        return Running(
            built(case), f"{_named(case)}, which the Trainer takes first", _asked(case) if handed else None
        )
    if "optimizer_cls_and_kwargs" in given:
        found, why, instead = _asked(case), "the Trainer was given optimizer_cls_and_kwargs", None
    elif "optimizers" in given and not case.deepspeed:
        found, why, instead = _asked(case), "the Trainer was given optimizers", None
    else:
        optim = case.script.arguments.keywords.get("optim") if case.script.arguments else None
        found = "torch.optim.AdamW" if optim is None or "adamw_torch" in str(optim) else str(optim)
        why = "it is the Trainer's own" if optim is None else "TrainingArguments(optim=...) says so"
        instead = (asked or "the script's optimizer") if "optimizers" in given else None
    if case.deepspeed and case.replaces_clients and found:
        why = "Accelerate puts it in the place of the Trainer's, as the optimizer is offloaded"
        return Running("DeepSpeedCPUAdam", why, instead or found)
    return Running(found, why, instead)


def _asked(case: Case) -> str | None:
    """The optimizer that the Trainer was given."""
    assert case.script is not None
    if case.script.has_novograd:
        return "novoscale.NovoGrad"
    return case.script.optimizer.name if case.script.optimizer else None
