"""What each rank runs for the tests of accounting."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from novoscale.memory import Account, account

WIDTH = 64


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)]).to(dtype)


def under_deepspeed(ds: dict[str, Any], dtype: torch.dtype) -> Account:
    import deepspeed

    net = model(dtype)
    engine = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(net.parameters()), config=ds)[0]
    for _ in range(2):
        engine.backward(engine(torch.ones(2, WIDTH, dtype=dtype)).float().sum())
        found = account(engine)
        engine.step()
    return found


def under_torch(kind: str) -> Account:
    from accelerate import Accelerator
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net: Any = model()
    if kind == "fsdp2":
        fully_shard(net)
    optimizer: Any = torch.optim.AdamW(net.parameters())
    if kind == "ddp":
        net = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    if kind == "zero redundancy":
        optimizer = ZeroRedundancyOptimizer(net.parameters(), optimizer_class=torch.optim.AdamW)
    if kind == "accelerate":
        optimizer = Accelerator(cpu=True).prepare_optimizer(optimizer)
    for _ in range(2):
        net(torch.ones(2, WIDTH)).sum().backward()
        optimizer.step()
    return account(net, optimizer)
