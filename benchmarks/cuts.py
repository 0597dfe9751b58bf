"""How far training under every cut ends from training in one process: NovoGrad's, and other optimizers'.

    make cuts

For each configuration, on 2, 3 and 4 CPU ranks, what ``novoscale verify`` finds after ten steps (or, where it
has no words for one, what the tests' ranks find); the same for NovoGrad's formats and presets on 3 ranks, and
for ten other optimizers under ZeRO-2. Writes the data, three plots and the tables of docs/cuts.md.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parent.parent))

os.environ["DS_ACCELERATOR"] = "cpu"  # also where there is a GPU

from benchmarks import forms, parallel_models, plots
from benchmarks.configurations import CONFIGURATIONS, zero
from novoscale.memory.optimizers import CANDIDATES, Candidate
from novoscale.provenance import provenance
from novoscale.ranks import RankError
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
OTHERS[PLAIN] = Candidate("benchmarks.cuts:PlainNovoGrad", {"lr": 0.003}, "novoscale")


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
    out: Annotated[Path, typer.Option(help="Folder for cuts.json, the plots and the tables.")] = Path("runs"),
) -> None:
    """Measure everything, write data, tables and plots."""
    shown = sys.stderr.isatty()
    cases = [(name, ranks) for name in CONFIGURATIONS for ranks in (2, 3, 4)]
    rows = [
        {"configuration": name, "ranks": ranks, **measure(CONFIGURATIONS[name], ranks, OTHERS["NovoGrad"])}
        for name, ranks in track(cases, "NovoGrad, every cut", disable=not shown)
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
        "provenance": provenance("make cuts"),
        "steps": 10,
        "rows": rows,
        "parallel": parallel,
        "forms": formed + meshed,
        "plain": plain,
        "others": others,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "cuts.json").write_text(json.dumps(report, indent=1) + "\n")
    plots.cuts(report, out / "cuts")
    plots.others(report, out / "others")
    plots.forms(report, out / "forms")
    tables = markdown(report)
    (out / "cuts.md").write_text(tables)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(tables, markup=False, highlight=False)
    console.print(f"Written: cuts.json, cuts.md, cuts, others and forms (png, svg) in {out}")


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
    """As ``measure``, for a cut of :mod:`benchmarks.parallel_models`."""
    possible, bound, worst_on = parallel_models.CONFIGURATIONS[name]
    if ranks not in possible:
        return {"worst": None, "bound": bound, "why": f"needs {' or '.join(map(str, possible))} ranks"}
    worst = worst_on(ranks)
    return {"worst": worst, "bound": bound, "passed": worst <= bound}


def markdown(report: dict[str, Any]) -> str:
    """The tables of docs/cuts.md."""
    lines = ["| configuration | 2 ranks | 3 ranks | 4 ranks | bound |", "|---|---:|---:|---:|---:|"]
    every = report["rows"] + report["parallel"]
    for name in dict.fromkeys(row["configuration"] for row in every):
        found = [row for row in every if row["configuration"] == name]
        lines.append(
            f"| {name} | {' | '.join(_cell(row) for row in found)} | {found[0].get('bound', 0):.1e} |"
        )
    lines += ["", forms.markdown(report["forms"])]
    lines += ["| optimizer | ZeRO-2, 3 ranks | parameter |", "|---|---:|---|"]
    for row in report["others"]:
        lines.append(f"| {row['optimizer']} | {_cell(row)} | {row.get('where', '')} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    return row["why"] if row["worst"] is None else f"{row['worst']:.1e}"


if __name__ == "__main__":
    typer.run(main)
