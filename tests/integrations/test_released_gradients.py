"""Gradients are released under Accelerate and the Trainer, and refused under DeepSpeed."""

import math

import pytest
import torch
import trainer_ranks
from accelerate import Accelerator
from torch import nn

from novoscale import NovoGrad, release_gradients
from novoscale.tools.local_ranks import preload, run_ranks

preload("transformers.trainer", "transformers.models.gpt2.modeling_gpt2", "deepspeed")


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_trainer_trains_the_same_and_logs_the_same_norms(accumulated, checkpoints, tmp_path):
    options = {"gradient_accumulation_steps": accumulated, "gradient_checkpointing": checkpoints}
    weights, norms = trainer_ranks.trained(str(tmp_path), False, **options)
    found, found_norms = trainer_ranks.trained(str(tmp_path), True, **options)
    torch.testing.assert_close(found, weights, rtol=0, atol=0)
    assert len(norms) == 4
    assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(found_norms, norms, strict=True))


def test_the_trainers_clipping_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"max_grad_norm=1.0 .*set max_grad_norm=0 .*clip_threshold"):
        trainer_ranks.trained(str(tmp_path), True, max_grad_norm=1.0)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_accelerate_trains_the_same(accumulated):
    def trained(released):
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
        model = nn.Sequential(nn.Linear(8, 80), nn.Tanh(), nn.Linear(80, 80), nn.Linear(80, 3))
        optimizer = NovoGrad(model.parameters(), lr=0.02, momentum_dtype="int8", preset="paper")
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        if released:
            release_gradients(model, optimizer)
        for step in range(8):
            x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
            with accelerator.accumulate(model):
                accelerator.backward(model(x).square().mean())
                if released and accelerator.sync_gradients:
                    assert all(p.grad is None for p in model.parameters())
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        return model.state_dict()

    torch.testing.assert_close(trained(True), trained(False), rtol=0, atol=0)


def deepspeed_refuses(stage: int, before: bool) -> str:
    import deepspeed
    import novoscale.integrations.deepspeed  # noqa: F401

    model = nn.Linear(8, 8)
    optimizer = NovoGrad(model.parameters(), lr=0.1, preset="paper")
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    weights = model.weight.detach().clone()
    try:
        if before:
            release_gradients(model, optimizer)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        if not before:
            release_gradients(model, optimizer)
        engine.backward(engine(torch.ones(1, 8)).sum())
    except ValueError as error:
        if stage < 3:
            assert torch.equal(model.weight.detach().view(-1), weights.view(-1))
        return str(error)
    return "not refused"


@pytest.mark.usefixtures("deepspeed_operation")
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_is_refused_before_anything_is_changed(stage, before):
    for message in run_ranks(deepspeed_refuses, 2, stage, before):
        assert "release_gradients cannot be used with" in message
        assert "ZeRO stage 2 or 3" in message
