"""Train a small byte-level language model under DeepSpeed; one optimizer, named in the DeepSpeed JSON.

    accelerate launch --config_file configs/accelerate_zero2_novograd.yaml benchmarks/train.py

Runs on CPU ranks with gloo, and on GPUs with NCCL where there are some.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from accelerate.utils import DummyOptim, DummyScheduler, InitProcessGroupKwargs, set_seed
from rich.progress import track
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import novoscale.integrations.deepspeed  # noqa: F401  registers "NovoGrad"

from benchmarks import reports, text
from benchmarks.language_models import CONTEXT, VALIDATION_WINDOWS, gpt2, schedule
from novoscale.memory import optimizer_state_bytes


def main(
    out: Annotated[Path, typer.Option(help="Where to write the result (JSON).")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 400,
    text_path: Annotated[Path | None, typer.Option("--text", help="File or folder of text.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate instead of the DeepSpeed JSON's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and the batches.")] = 0,
) -> None:
    """Train, and write what was measured."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    train_text, validation_text = text.load(text_path)
    # Accelerate does not start a process group for CPU ranks under DeepSpeed unless told the backend.
    handlers = [] if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")]
    accelerator = Accelerator(kwargs_handlers=handlers)
    set_seed(seed)
    model = gpt2()
    optimizer = DummyOptim(model.parameters())
    scheduler = DummyScheduler(
        optimizer, lr_scheduler_callable=lambda o: torch.optim.lr_scheduler.LambdaLR(o, schedule(steps))
    )
    if lr is not None:
        accelerator.deepspeed_plugin.deepspeed_config["optimizer"]["params"]["lr"] = lr
    engine, _, scheduler = accelerator.prepare(model, optimizer, scheduler)

    batch = accelerator.num_processes * engine.train_micro_batch_size_per_gpu()
    own = slice(accelerator.process_index, None, accelerator.num_processes)
    losses: list[Tensor] = []
    times: list[float] = []
    validation: list[tuple[int, float]] = []
    shown = accelerator.is_main_process and sys.stderr.isatty()
    for step in track(range(steps), f"{engine.basic_optimizer.__class__.__name__:>10}", disable=not shown):
        start = time.perf_counter()
        tokens = text.batch(train_text, batch, CONTEXT, seed, step)[own].to(accelerator.device)
        loss = engine(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)  # DeepSpeed steps in it
        scheduler.step()
        losses.append(loss.detach())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        if step % max(steps // 8, 1) == max(steps // 8, 1) - 1 or step == steps - 1:
            validation.append((step + 1, evaluate(accelerator, engine, validation_text)))
            if accelerator.is_main_process and not shown:
                print(f"step {step + 1}/{steps}: validation loss {validation[-1][1]:.3f}", flush=True)

    curve = accelerator.reduce(torch.stack(losses).float(), reduction="mean").tolist()
    state = optimizer_state_bytes(engine.basic_optimizer)
    rank = {
        "state_bytes": state.total,
        "state_bytes_by_key": state.by_key,
        # ru_maxrss is in KiB on Linux.
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }
    ranks: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(ranks, rank)
    if accelerator.is_main_process:
        times = sorted(times[min(5, len(times) - 1) :])
        result = {
            "optimizer": engine.basic_optimizer.__class__.__name__,
            "config": json.loads(json.dumps(accelerator.deepspeed_plugin.deepspeed_config, default=str)),
            "parameters": sum(p.numel() for p in engine.module.parameters()),
            "layers": sum(1 for _ in engine.module.parameters()),
            "bytes_of_text": {"train": len(train_text), "validation": len(validation_text)},
            "device": str(accelerator.device.type),
            "steps": steps,
            "seed": seed,
            "ranks": ranks,
            "train_loss": curve,
            "validation_loss": validation,
            "median_step_s": times[len(times) // 2],
        }
        reports.write(out, result)
    accelerator.end_training()


@torch.no_grad()
def evaluate(accelerator: Accelerator, engine: Any, validation_text: Tensor) -> float:
    """Mean loss over fixed windows of the validation text, in nats per byte."""
    engine.eval()
    tokens = text.windows(validation_text, VALIDATION_WINDOWS, CONTEXT, seed=1)
    own = tokens[accelerator.process_index :: accelerator.num_processes].to(accelerator.device)
    losses = [engine(input_ids=part, labels=part).loss * len(part) for part in own.split(16)]
    total = torch.stack([torch.stack(losses).sum(), torch.tensor(float(len(own)), device=accelerator.device)])
    total = accelerator.reduce(total, reduction="sum")
    engine.train()
    return float(total[0] / total[1])


if __name__ == "__main__":
    typer.run(main)
