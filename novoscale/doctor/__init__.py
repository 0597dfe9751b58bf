"""What a config will really do, before anyone pays for a node: nothing is trained, no rank is started.

Reads a DeepSpeed JSON or an Accelerate YAML, and the text of a script; says which optimizer will run, what is
refused and ignored, and what would make it a config for NovoGrad. Each rule is a function of ``rules_*.py``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from novoscale.doctor import rules_config, rules_novograd, rules_script
from novoscale.doctor.case import Case, Running, running
from novoscale.doctor.findings import Finding, find
from novoscale.doctor.memory import Memory, NotPlannedError, memory
from novoscale.doctor.rewriting import novograd_section
from novoscale.doctor.script import read_script
from novoscale.tools.configs import Config, ConfigError, read

__all__ = ["ConfigError", "Diagnosis", "Finding", "Running", "diagnose"]

RULES = (*rules_config.RULES, *rules_novograd.RULES, *rules_script.RULES)


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        config: what was read.
        case: what the rules looked at.
        runs: the optimizer that will run.
        findings: the worst first.
        section: the "optimizer" of a NovoGrad config; None where DeepSpeed does not train.
        memory: of each rank, if a model was named.
        no_memory: why there is none of it.
    """

    config: Config
    case: Case = field(repr=False)
    runs: Running
    findings: list[Finding]
    section: dict[str, Any] | None
    memory: Memory | None = None
    no_memory: str | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not any(finding.severity == "wrong" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        path = self.config.deepspeed_path
        return {
            "config": str(self.config.path),
            "deepspeed_config": None if path is None else str(path),
            "runner": self.case.runner,
            "runs": asdict(self.runs),
            "passed": self.passed,
            "findings": [finding.to_dict() for finding in self.findings],
            "novograd": self.section,
            "memory": None if self.memory is None else self.memory.to_dict(),
            "no_memory": self.no_memory,
        }

    def to_json(self) -> str:
        """For machines."""
        return json.dumps(self.to_dict(), indent=1)


def diagnose(
    config: str | Path,
    script: str | Path | None = None,
    *,
    ranks: int | None = None,
    model: str | None = None,
) -> Diagnosis:
    """Look at a config, and at the script that it is for.

    Args:
        config: path of a DeepSpeed JSON or an Accelerate YAML.
        script: path of the training script; its text is read, it is not run.
        ranks: of the training; default: the YAML's.
        model: whose memory is planned, as of ``novoscale plan``.

    Raises:
        ConfigError: CONFIG or SCRIPT cannot be read.
        MemoryToolError: there is no such model.
    """
    given = read(Path(config))
    case = Case(given, None if script is None else read_script(Path(script)), ranks)
    now = running(case)
    section = None if given.deepspeed is None else novograd_section(given.deepspeed)
    found = Diagnosis(given, case, now, find(case, RULES), section)
    if model is None:
        return found
    try:
        return replace(found, memory=memory(case, now, section or novograd_section({}), model))
    except NotPlannedError as error:
        return replace(found, no_memory=str(error))
