"""How far training under ZeRO ends from training in one process: NovoGrad with and without its layout.

    make cuts

Trains a small transformer on real text for ten steps in one process in float64, and in float32 under
DeepSpeed's ZeRO stages 1 and 2 on 2, 3 and 4 CPU ranks; compares the weights. Writes cuts.json, cuts.png and
cuts.svg.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import plots, text
from benchmarks.provenance import provenance
from novoscale import NovoGrad
from novoscale.ranks import run_ranks

STEPS = 10
SEQUENCES = 24  # a step's; divided among the ranks
LENGTH = 32
LR = 0.01


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


OPTIMIZERS = {"novoscale": NovoGrad, "plain": PlainNovoGrad}


def main(
    out: Annotated[Path, typer.Option(help="Folder for cuts.json, cuts.png and cuts.svg.")] = Path("runs"),
) -> None:
    """Measure, print a table, write data and plot."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # also where there is a GPU
    console = Console()
    reference = {name: one_process(name) for name in OPTIMIZERS}
    rows = []
    for world in track((2, 3, 4), "cuts", disable=not sys.stderr.isatty()):
        for (name, stage), weights in under_zero(world).items():
            worst = deviations(weights, reference[name])
            where = max(worst, key=worst.__getitem__)
            rows.append(
                {"optimizer": name, "stage": stage, "ranks": world, "worst": worst[where], "where": where}
            )
    report = {"provenance": provenance("make cuts"), "steps": STEPS, "lr": LR, "rows": rows}
    out.mkdir(parents=True, exist_ok=True)
    (out / "cuts.json").write_text(json.dumps(report, indent=1) + "\n")
    plots.cuts(report, out / "cuts")
    table = Table(
        "optimizer",
        "ZeRO stage",
        "ranks",
        "worst deviation",
        "parameter",
        title="From one process in float64",
    )
    for row in rows:
        table.add_row(
            row["optimizer"], str(row["stage"]), str(row["ranks"]), f"{row['worst']:.1e}", row["where"]
        )
    console.print(table)
    console.print(f"Written: {out / 'cuts.json'}, {out / 'cuts.png'}, {out / 'cuts.svg'}")


def deviations(weights: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """For each parameter the largest difference relative to the largest magnitude of the reference."""
    return {
        name: float((weights[name].double() - expected).abs().max() / expected.abs().max())
        for name, expected in reference.items()
    }


def build_model() -> nn.Module:
    """A small GPT-2 over bytes, the same at each call."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=48, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    model.config._attn_implementation = "eager"
    return model.eval()  # no dropout


def one_process(name: str) -> dict[str, Tensor]:
    """Weights after training in one process, in float64."""
    model = build_model().double()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=LR)
    train_text, _ = text.load(None)
    for step in range(STEPS):
        tokens = text.windows(train_text, SEQUENCES, LENGTH, seed=step)
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}


def under_zero(world: int) -> dict[tuple[str, int], dict[str, Tensor]]:
    """Weights after training on ``world`` CPU ranks in float32, for each optimizer and stage."""
    return run_ranks(_rank, world, timeout=600)[0]  # type: ignore[no-any-return]


def _rank() -> dict[tuple[str, int], dict[str, Tensor]]:
    import deepspeed
    import novoscale.integrations.deepspeed  # noqa: F401

    deepspeed.logger.setLevel("ERROR")
    train_text, _ = text.load(None)
    results = {}
    for stage in (1, 2):
        for name in OPTIMIZERS:
            engine = _train(deepspeed, name, stage, train_text)
            results[name, stage] = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    return results


def _train(deepspeed: Any, name: str, stage: int, train_text: Tensor) -> Any:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = build_model()
    config = {
        "train_micro_batch_size_per_gpu": SEQUENCES // world,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": name != "novoscale",  # novoscale's is registered
    }
    optimizer = OPTIMIZERS[name](model.parameters(), lr=LR)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    for step in range(STEPS):
        tokens = text.windows(train_text, SEQUENCES, LENGTH, seed=step)[rank::world]
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    return engine


if __name__ == "__main__":
    typer.run(main)
