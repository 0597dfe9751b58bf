"""How far training under every sharding ends from training in one process, with NovoGrad and with others.

    make sharding

Each configuration is trained for ten steps on 2, 3 and 4 CPU ranks: by ``novoscale verify``, or, if verify
does not have the configuration, by the tests' ranks. The same for NovoGrad's formats and presets on 3 ranks,
and for ten other optimizers under ZeRO-2. Writes the data, three plots and the tables of docs/sharding.md.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parent.parent))

os.environ["DS_ACCELERATOR"] = "cpu"  # also where there is a GPU

from benchmarks import forms, parallel_models, plots, reports, tables
from benchmarks.configurations import CONFIGURATIONS, zero
from novoscale.memory.optimizers import CANDIDATES, Candidate
from novoscale.tools.local_ranks import RankError
from novoscale.tools.provenance import provenance
from novoscale.verify import verify

# Under which every form of NovoGrad is measured.
WRAPPERS = (
    "DDP",
    "FSDP2",
    "stage 1",
    "stage 2",
    "stage 3",
    "stage 2, offload_optimizer",
    "stage 3, offload_optimizer",
    "stage 2, bf16",
    "stage 1, bf16, grad_accum_dtype fp32 (BF16_Optimizer)",
)

# Named in the catalogue, with the learning rate of this model.
OTHERS: dict[str, Candidate] = {
    name: replace(CANDIDATES[name], options={**CANDIDATES[name].options, "lr": lr})
    for name, lr in {
        "NovoGrad": 0.003,
        "torch AdamW": 0.003,
        "torch Adafactor": 0.03,
        "transformers Adafactor": 0.003,
        "CAME": 0.003,
        "LAMB (pytorch_optimizer)": 0.003,
        "NovoGrad (pytorch_optimizer)": 0.003,
        "bitsandbytes AdamW8bit": 0.003,
        "torchao AdamW8bit": 0.003,
        "gefen-x": 0.003,
    }.items()
}
PLAIN = "NovoGrad (as timm, NeMo, MONAI)"
OTHERS[PLAIN] = Candidate("benchmarks.sharding:PlainNovoGrad", {"lr": 0.003}, "novoscale")


class PlainNovoGrad(torch.optim.Optimizer):
    """NovoGrad as timm, NeMo and MONAI have it: each tensor that it is given is taken for one layer."""

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float] = (0.95, 0.98), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                norm = p.grad.double().square().sum()
                v = state.get("exp_avg_sq")
                state["exp_avg_sq"] = norm if v is None or v == 0 else beta2 * v + (1 - beta2) * norm
                m = state.setdefault("exp_avg", torch.zeros_like(p))
                m.mul_(beta1).add_(p.grad / (state["exp_avg_sq"].sqrt() + group["eps"]).to(p.dtype))
                p.add_(m, alpha=-group["lr"])


def main(
    out: Annotated[Path, typer.Option(help="Folder for sharding.json, plots and tables.")] = Path("runs"),
) -> None:
    """Measure everything, write data, tables and plots."""
    shown = sys.stderr.isatty()
    cases = [(name, ranks) for name in CONFIGURATIONS for ranks in (2, 3, 4)]
    rows = [
        {"configuration": name, "ranks": ranks, **measure(CONFIGURATIONS[name], ranks, OTHERS["NovoGrad"])}
        for name, ranks in track(cases, "NovoGrad, every sharding", disable=not shown)
    ]
    parallel = [
        {"configuration": name, "ranks": ranks, **measure_parallel(name, ranks)}
        for name in track(parallel_models.CONFIGURATIONS, "NovoGrad, parallel models", disable=not shown)
        for ranks in (2, 3, 4)
    ]
    formed = [
        {"form": form, "configuration": name, **forms.measured(form, CONFIGURATIONS[name])}
        for form in track(forms.FORMS, "NovoGrad, every format", disable=not shown)
        for name in WRAPPERS
    ]
    meshed = [
        {"form": form, "configuration": mesh, **forms.measured_on_a_mesh(form, mesh)}
        for form in track(forms.FORMS, "NovoGrad, every format, meshes", disable=not shown)
        for mesh in forms.MESHES
    ]
    others = [
        {"optimizer": name, **measure(zero(2), 3, OTHERS[name])}
        for name in track(OTHERS, "other optimizers, ZeRO-2", disable=not shown)
    ]
    plain = [
        {"configuration": f"stage {stage}", "ranks": ranks, **measure(zero(stage), ranks, OTHERS[PLAIN])}
        for stage in (1, 2, 3)
        for ranks in (2, 3, 4)
    ]
    report = {
        "provenance": provenance("make sharding"),
        "steps": 10,
        "rows": rows,
        "parallel": parallel,
        "forms": formed + meshed,
        "plain": plain,
        "others": others,
    }
    reports.write(out / "sharding.json", report)
    plots.sharding(report, out / "sharding")
    plots.others(report, out / "others")
    plots.forms(report, out / "forms")
    files = "sharding.json; sharding, others and forms as png and svg"
    tables.publish(markdown(report), out / "sharding.md", files)


def measure(config: str | dict[str, Any], ranks: int, optimizer: Candidate) -> dict[str, Any]:
    """What ``verify`` finds: the worst deviation and where, or why there is none."""
    if not optimizer.installed():
        return {"worst": None, "why": f"not installed: pip install {optimizer.package}"}
    try:
        verdict = verify(config, ranks=ranks, optimizer=optimizer.path, options=optimizer.options)
    except RankError as error:
        return {"worst": None, "why": error.brief().splitlines()[-1][:200]}
    parameter, worst = verdict.training.worst
    return {"worst": worst, "where": parameter, "bound": verdict.training.bound, "passed": verdict.passed}


def measure_parallel(name: str, ranks: int) -> dict[str, Any]:
    """As ``measure``, for a sharding of :mod:`benchmarks.parallel_models`."""
    possible, bound, worst_on = parallel_models.CONFIGURATIONS[name]
    if ranks not in possible:
        return {"worst": None, "bound": bound, "why": f"needs {' or '.join(map(str, possible))} ranks"}
    worst = worst_on(ranks)
    return {"worst": worst, "bound": bound, "passed": worst <= bound}


def markdown(report: dict[str, Any]) -> str:
    """The tables of docs/sharding.md."""
    every = report["rows"] + report["parallel"]
    rows = []
    for name in dict.fromkeys(row["configuration"] for row in every):
        found = [row for row in every if row["configuration"] == name]
        rows.append([name, *map(_cell, found), f"{found[0].get('bound', 0):.1e}"])
    others = [[row["optimizer"], _cell(row), row.get("where", "")] for row in report["others"]]
    parts = (
        tables.markdown(("configuration", "2 ranks", "3 ranks", "4 ranks", "bound"), rows),
        forms.markdown(report["forms"]),
        tables.markdown(("optimizer", "ZeRO-2, 3 ranks", "parameter"), others, "lrl"),
    )
    return "\n".join(parts)


def _cell(row: dict[str, Any]) -> str:
    return row["why"] if row["worst"] is None else f"{row['worst']:.1e}"


if __name__ == "__main__":
    typer.run(main)
