"""What a step launches on a GPU: counted where there is none, by a driver that launches nothing."""

import os
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from novoscale import NovoGrad

pytest.importorskip("triton", reason="Triton is not installed")

from novoscale.kernels import dispatch, triton
from novoscale.kernels.triton import update as triton_update

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Operations of torch that start nothing on a device: views, and memory.
FREE = {
    *("alias", "as_strided", "detach", "empty", "empty_strided", "expand", "select", "slice", "split"),
    *("split_with_sizes", "unbind", "view", "empty_like", "is_pinned", "unsqueeze", "t", "new_empty"),
}
MOST = 12


class Counted(TorchDispatchMode):
    """Counts the operations that torch starts on a device."""

    def __init__(self):
        super().__init__()
        self.launches = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        if op.namespace == "aten" and name not in FREE:
            self.launches[name] += 1
        return op(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """Counts the kernels and collectives by name, where Triton is taken for a CPU's tensors."""
    found = Counter()
    monkeypatch.setattr(dispatch, "fused", lambda device_type: triton)
    reduce = dist.all_reduce

    def collective(*args, **kwargs):
        found["all_reduce"] += 1
        with torch.utils._python_dispatch._disable_current_modes():
            return reduce(*args, **kwargs)

    monkeypatch.setattr(
        type(triton_update.update), "run", lambda self, *_, **__: found.update([self.fn.__name__])
    )
    monkeypatch.setattr(dist, "all_reduce", collective)
    return found


@pytest.fixture(scope="module")
def one_rank():
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


RECOMMENDED = {"preset": "adamw", "momentum_dtype": "int8", "weight_decay": 0.1, "max_grad_norm": 1.0}


def launched(launches, model, groups, **options):
    """What one step launches, once the tables are made."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    named = [*model.named_parameters()]
    split = [{"params": named[i::groups], "lr": 1e-3 * (i + 1)} for i in range(groups)]
    optimizer = NovoGrad(split, **{"preset": "paper", **options})
    for _ in range(2):
        optimizer.step()
    launches.clear()
    with Counted() as found:
        optimizer.step()
    return launches + found.launches


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("options", [{}, {"momentum_dtype": "int8"}, RECOMMENDED], ids=str)
def test_a_step_launches_as_little_for_many_groups(launches, groups, options):
    model = nn.Sequential(*[nn.Linear(128, 128) for _ in range(4)]).to(torch.bfloat16)
    found = launched(launches, model, groups, **options)
    assert found.total() <= MOST, found


@pytest.mark.parametrize("options", [{}, RECOMMENDED], ids=str)
def test_and_with_one_collective(launches, one_rank, options):
    model = nn.Sequential(*[nn.Linear(128, 128) for _ in range(4)]).to(torch.bfloat16)
    fully_shard(model)
    found = launched(launches, model, 3, **options)
    assert found["all_reduce"] == 1
    assert found.total() <= MOST + 1, found
