"""What NovoGrad's all-reduce of a step carries, for models of any size: counted, nothing is run.

    python benchmarks/collective_bytes.py llama-8b --world 64

Builds the layouts of one rank on the meta device, under a process group that stands for as many ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).parent.parent))

from novoscale import NovoGrad
from novoscale.dtensors import sharded
from novoscale.layout import Layout, Parameter, describe, one_after_another, partition
from novoscale.memory.models import build
from novoscale.prepared import plan

GRANULARITIES = ("tensor", "row", "factored")


def main(
    model: Annotated[str, typer.Argument(help="As for `novoscale plan`.")] = "llama-8b",
    world: Annotated[int, typer.Option(min=2, help="Ranks.")] = 64,
) -> None:
    """Print the bytes that each rank gives to the all-reduce of a step, beside those of its gradients."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    shapes = {name: tuple(p.shape) for name, p in build(model, "meta").named_parameters()}
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    table = Table("granularity", title=f"{model}, {world} ranks: the all-reduce of a step, bytes (MiB)")
    cuts = {"ZeRO-2": zero_2, "FSDP2": fsdp2}
    for cut in cuts:
        table.add_column(cut, justify="right")
    for granularity in GRANULARITIES:
        parameters = [describe(n, s, granularity, i) for i, (n, s) in enumerate(shapes.items())]
        counts = [
            counted(make(parameters, list(shapes.values()), world), granularity) for make in cuts.values()
        ]
        table.add_row(granularity, *(f"{n:,} ({n / 2**20:.2f})" for n in counts))
    console = Console(width=100)
    console.print(table)
    console.print(f"The gradients that the ranks reduce, in bfloat16: {2 * elements:,} bytes.")


def counted(layouts: Sequence[Layout], granularity: str) -> int:
    """Bytes of the all-reduce of a step over these tensors."""
    group = NovoGrad([torch.zeros(1)], preset="adamw", granularity=granularity).param_groups[0]
    return plan([(group, [])], [layouts], torch.device("cpu")).bytes_reduced


def zero_2(parameters: Sequence[Parameter], shapes: Sequence[tuple[int, ...]], world: int) -> list[Layout]:
    """One flat tensor, cut into equal partitions."""
    sizes = [p.numel for p in parameters]
    size = 2 * -(-sum(sizes) // (2 * world))
    pieces = one_after_another(sizes, size, world)
    return [partition(parameters, pieces, rank=0, numel=size, process_group=torch.distributed.group.WORLD)]


def fsdp2(parameters: Sequence[Parameter], shapes: Sequence[tuple[int, ...]], world: int) -> list[Layout]:
    """Every parameter cut along its first dimension."""
    mesh = init_device_mesh("cpu", (world,))
    layouts = []
    for parameter, shape in zip(parameters, shapes, strict=True):
        local = torch.empty((-(-shape[0] // world), *shape[1:]), device="meta")
        stride = torch.empty(shape, device="meta").stride()
        whole = DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
        )
        layouts.append(sharded(parameter, whole))
    return layouts


if __name__ == "__main__":
    typer.run(main)
