"""The optimizer's step for a model of 1,000 small layers under ZeRO-2, beside torch's fused AdamW.

    python benchmarks/many_layers.py

Two CPU ranks, one thread each; the median of 20 steps, of the slower rank. Writes many_layers.json.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import reports
from novoscale import NovoGrad
from novoscale.tools.local_ranks import run_ranks
from novoscale.tools.provenance import provenance

LAYERS, WIDTH, STEPS, RANKS = 1000, 16, 20, 2


def main(out: Annotated[Path, typer.Option(help="Folder for many_layers.json.")] = Path("runs")) -> None:
    """Measure and write."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    times = run_ranks(steps_of_both, RANKS, timeout=300)
    medians = {name: max(t[name] for t in times) for name in times[0]}
    report = {
        "provenance": provenance("python benchmarks/many_layers.py"),
        "layers": LAYERS,
        "elements_per_layer": WIDTH * WIDTH,
        "ranks": RANKS,
        "median_step_ms": {name: round(value * 1e3, 3) for name, value in medians.items()},
    }
    reports.write(out / "many_layers.json", report)
    print(json.dumps(report["median_step_ms"]))


def steps_of_both() -> dict[str, float]:
    """Median seconds of ``step()`` of each optimizer on this rank."""
    torch.set_num_threads(1)
    return {
        "NovoGrad": _median_step(lambda params: NovoGrad(params, lr=1e-3, preset="paper")),
        "torch AdamW, fused": _median_step(lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True)),
    }


def _median_step(make: Any) -> float:
    import deepspeed
    import novoscale.integrations.deepspeed  # noqa: F401  binds NovoGrad under ZeRO

    deepspeed.logger.setLevel("ERROR")
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    kwargs = {"optimizer": make, "model_parameters": model.parameters()}
    engine = deepspeed.initialize(model=model, config=config, **kwargs)[0]
    started, taken = [], []
    engine.basic_optimizer.register_step_pre_hook(lambda *_: started.append(time.perf_counter()))
    engine.basic_optimizer.register_step_post_hook(lambda *_: taken.append(time.perf_counter() - started[-1]))
    for _ in range(STEPS + 3):
        engine.backward(engine(torch.randn(2, WIDTH)).square().mean())
        engine.step()
    return statistics.median(taken[3:])


if __name__ == "__main__":
    typer.run(main)
