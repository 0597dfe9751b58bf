"""Bytes of weights, gradients and state, from the storages that are held."""

import accounting_ranks
import pytest
import torch
from kept_ranks import run_ranks
from torch import nn

from novoscale import NovoGrad
from novoscale.memory import account, optimizer_state_bytes
from novoscale.tools.local_ranks import run_ranks as run_new_ranks

ELEMENTS = 4 * accounting_ranks.WIDTH**2


@pytest.mark.parametrize(
    ("make", "per_parameter", "rest"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.1), 8, 2 * 4),  # and a 4-byte step for each parameter
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 4, 0),
        (lambda p: NovoGrad(p, lr=0.1, preset="paper"), 4, 2 * 4),
        (lambda p: NovoGrad(p, lr=0.1, betas=(0, 0.98), preset="paper"), 0, 2 * 4),
    ],
)
def test_counts_what_each_optimizer_holds(make, per_parameter, rest):
    model = nn.Linear(1000, 37)
    optimizer = make(model.parameters())
    assert optimizer_state_bytes(optimizer).total == 0
    model(torch.ones(2, 1000)).sum().backward()
    optimizer.step()
    assert optimizer_state_bytes(optimizer).total == per_parameter * (37 * 1000 + 37) + rest


def test_shared_storages_count_once_and_in_full():
    p = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([p], lr=0.1)
    buffer = torch.zeros(100)
    optimizer.state[p] = {
        "a": buffer[:10],
        "b": [buffer[50:], {"c": torch.zeros(3, dtype=torch.int8)}],
        "n": 3,
    }
    counted = optimizer_state_bytes(optimizer)
    assert counted.total == 400 + 3
    assert counted.by_key == {"a": 400, "b": 3}


def test_quantised_tensors_are_seen_through():
    torchao = pytest.importorskip("torchao.optim.subclass_8bit")
    p = nn.Parameter(torch.ones(4096))
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.state[p] = {"exp_avg": torchao.OptimState8bit.zeros((4096,), block_size=256)}
    assert optimizer_state_bytes(optimizer).total == 4096 + 4 * 4096 // 256 + 4 * 256  # codes, scales, map


def test_a_model_in_one_process_by_layer():
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4, affine=False))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    model(torch.ones(3, 8)).sum().backward()
    optimizer.step()
    counted = account(model, optimizer, by_layer=True)
    assert (counted.parameters, counted.gradients, counted.state.total) == (144, 128, 128)
    assert counted.model_buffers == 4 * 4 + 4 * 4 + 8
    assert counted.master_weights == counted.other == 0
    assert {n: (b.parameters, b.gradients, b.state) for n, b in counted.layers.items()} == {
        "0.weight": (128, 128, 128)
    }
    assert counted.total == 144 + 128 + 128 + 40


def test_tied_weights_count_once_and_the_meta_device_holds_nothing():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert account(model).parameters == 4 * 64
    assert account(model.to("meta")).total == 0


@pytest.mark.usefixtures("deepspeed_operation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stage", [0, 1, 2, 3, "offload"])
def test_deepspeed(stage, dtype):
    zero = {"stage": stage, "reduce_bucket_size": ELEMENTS // 4, "stage3_param_persistence_threshold": 0}
    if stage == "offload":
        zero.update(stage=2, offload_optimizer={"device": "cpu"})
    ds = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    size, partitions = dtype.itemsize, 1 if stage == 0 else 2
    master = 0 if stage == 0 and size == 4 else 4
    for found in run_ranks(accounting_ranks.under_deepspeed, 2, ds, dtype):
        assert found.parameters == size * ELEMENTS // (2 if stage == 3 else 1)
        assert found.master_weights == master * ELEMENTS // partitions
        assert found.state.by_key["exp_avg"] == found.state.by_key["exp_avg_sq"] == 4 * ELEMENTS // partitions
        if stage == "offload":  # float32 on the host, and two buffers as large as the largest parameter
            assert found.gradients == pytest.approx((4 / 2 + 2 * size / 4) * ELEMENTS, rel=1e-3)
        else:
            assert found.gradients == pytest.approx(size * ELEMENTS // partitions, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "sharded", "state"),
    [("ddp", 1, 1), ("fsdp2", 2, 2), ("zero redundancy", 1, 2), ("accelerate", 1, 1)],
)
def test_torch_and_accelerate(kind, sharded, state):
    run = run_new_ranks if kind == "accelerate" else run_ranks  # its state stays in a process
    for found in run(accounting_ranks.under_torch, 2, kind):
        assert found.parameters == found.gradients == 4 * ELEMENTS // sharded
        assert found.state.by_key["exp_avg"] == 4 * ELEMENTS // state
        assert found.master_weights == 0
