"""What NovoGrad's all-reduces of a step carry, for models of any size: counted, nothing is run.

    python benchmarks/collective_bytes.py llama-8b --world 64

Builds the layouts of one rank on the meta device, under a process group that stands for as many ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).parent.parent))

from novoscale import NovoGrad
from novoscale.memory.models import build
from novoscale.optimizer.step_plan import Mode, plan
from novoscale.sharding.dtensors import sharded
from novoscale.sharding.layers import Parameter, describe
from novoscale.sharding.layout import Layout
from novoscale.sharding.partition import one_after_another, partition
from novoscale.sharding.plan import Plan

GRANULARITIES = ("tensor", "row", "factored")


def main(
    model: Annotated[str, typer.Argument(help="As for `novoscale plan`.")] = "llama-8b",
    world: Annotated[int, typer.Option(min=2, help="Ranks.")] = 64,
    tensor_parallel: Annotated[int, typer.Option(min=2, help="Ranks along the last dimension.")] = 8,
) -> None:
    """Print the bytes that each rank gives to the all-reduce of a step, beside those of its gradients."""
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=0, world_size=max(world, tensor_parallel)
    )
    shapes = {name: tuple(p.shape) for name, p in build(model, "meta").named_parameters()}
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    table = Table("granularity", title=f"{model}, {world} ranks: the all-reduce of a step, bytes (MiB)")
    shardings = {
        "ZeRO-2": (zero_2, world),
        "FSDP2": (fsdp2, world),
        f"TP {tensor_parallel}": (last_dimension, tensor_parallel),
    }
    for sharding in shardings:
        table.add_column(sharding, justify="right")
    for granularity in GRANULARITIES:
        parameters = [describe(n, s, granularity, i) for i, (n, s) in enumerate(shapes.items())]
        made = [make(parameters, list(shapes.values()), ranks) for make, ranks in shardings.values()]
        counts = [planned(layouts, granularity).bytes_reduced for layouts in made]
        table.add_row(granularity, *(f"{n:,} ({n / 2**20:.2f})" for n in counts))
    blocks = [planned(layouts, granularity).bytes_of_blocks for layouts in made]
    table.add_row("sharded blocks (int8, int4)", *(f"{n:,} ({n / 2**20:.2f})" for n in blocks))
    console = Console(width=100)
    console.print(table)
    console.print(f"The gradients that the ranks reduce, in bfloat16: {2 * elements:,} bytes.")


def planned(layouts: Sequence[Layout], granularity: str) -> Plan:
    """The plan of a step over these tensors."""
    optimizer = NovoGrad([torch.zeros(1)], preset="adamw", granularity=granularity, momentum_dtype="int8")
    mode = Mode(per_parameter=False, clips=False, agreed=set())
    return plan([(optimizer.param_groups[0], [])], [layouts], [], torch.device("cpu"), mode)


def zero_2(parameters: Sequence[Parameter], shapes: Sequence[tuple[int, ...]], world: int) -> list[Layout]:
    """One flat tensor in equal partitions, one on each rank."""
    sizes = [p.numel for p in parameters]
    size = 2 * -(-sum(sizes) // (2 * world))
    pieces = one_after_another(sizes, size, world)
    return [partition(parameters, pieces, rank=0, numel=size, process_group=torch.distributed.group.WORLD)]


def fsdp2(parameters: Sequence[Parameter], shapes: Sequence[tuple[int, ...]], world: int) -> list[Layout]:
    """Every parameter sharded along its first dimension."""
    return [sharded_along(0, p, shape, world) for p, shape in zip(parameters, shapes, strict=True)]


def last_dimension(
    parameters: Sequence[Parameter], shapes: Sequence[tuple[int, ...]], world: int
) -> list[Layout]:
    """Every parameter sharded along its last dimension, as tensor parallelism shards some."""
    return [
        sharded_along(len(shape) - 1, p, shape, world) for p, shape in zip(parameters, shapes, strict=True)
    ]


@cache
def mesh_of(world: int) -> DeviceMesh:
    """One for all parameters, as in training: they share its process group."""
    return DeviceMesh("cpu", list(range(world)))


def sharded_along(dim: int, parameter: Parameter, shape: Sequence[int], world: int) -> Layout:
    """The layout on rank 0 of a parameter that is sharded along one dimension."""
    mesh = mesh_of(world)
    full = torch.empty(shape, device="meta")
    local = full.narrow(dim, 0, -(-shape[dim] // world))
    made = DTensor.from_local(
        local, mesh, [Shard(dim)], run_check=False, shape=full.shape, stride=full.stride()
    )
    return sharded(parameter, made)


if __name__ == "__main__":
    typer.run(main)
