"""Lightning trains with NovoGrad as a loop written by hand does: precisions, clipping, checkpoints, DDP."""

import lightning_ranks as trained
import pytest
import torch
from kept_ranks import run_ranks
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def by_hand(precision, clip, **options):
    model = trained.Model(**options)
    optimizer = model.configure_optimizers()
    for x, y in trained.loader():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = model.training_step((x, y), 0)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return list(model.parameters())


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_trains_as_a_loop_does_to_the_bit(precision, clip, tmp_path):
    model = trained.Model(momentum_dtype="int8")
    trained.trainer(tmp_path, precision=precision, gradient_clip_val=clip).fit(model, trained.loader())
    for p, expected in zip(model.parameters(), by_hand(precision, clip, momentum_dtype="int8"), strict=True):
        assert torch.equal(p, expected)


def test_max_grad_norm_clips_as_gradient_clip_val_does(tmp_path):
    model = trained.Model(max_grad_norm=0.05)
    trained.trainer(tmp_path).fit(model, trained.loader())
    for p, expected in zip(model.parameters(), by_hand("32-true", 0.05), strict=True):
        torch.testing.assert_close(p, expected, **CLOSE)


@pytest.mark.parametrize("make", [trained.Model, trained.Unfreezing])
@pytest.mark.parametrize("momentum_dtype", ["float32", "int8", "int4"])
def test_a_checkpoint_resumes_to_the_same_bits_also_where_layers_were_unfrozen(
    make, momentum_dtype, tmp_path
):
    def fit(epochs, **resume):
        model = make(momentum_dtype=momentum_dtype)
        trainer = trained.trainer(tmp_path, max_epochs=epochs, max_steps=-1, callbacks=model.callbacks())
        trainer.fit(model, trained.loader(), **resume)
        return list(model.parameters()), trainer

    straight, _ = fit(3)
    for p, before in zip(straight, make().parameters(), strict=True):
        assert not torch.equal(p, before)
    _, half = fit(2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(3, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for p, expected in zip(resumed, straight, strict=True):
        assert torch.equal(p, expected)


def test_ranks_of_ddp_train_as_one_process_does(tmp_path):
    expected = by_hand("32-true", 0.05)
    for weights in run_ranks(trained.under_ddp, 2, str(tmp_path)):
        for found, p in zip(weights, expected, strict=True):
            torch.testing.assert_close(found, p, **CLOSE)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_grad_scaler_leaves_the_scale_to_the_step_and_may_unscale_before_it(clip):
    model = trained.Model()
    optimizer, scaler = model.configure_optimizers(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    asked = []
    optimizer.register_step_pre_hook(lambda o, *_: asked.append((o.grad_scale, o.found_inf)))
    for batch in trained.loader():
        optimizer.zero_grad()
        scaler.scale(model.training_step(batch, 0)).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
    assert [scale is None for scale, _ in asked] == [clip is not None] * trained.STEPS
    assert all(found_inf is not None for _, found_inf in asked)
    for p, expected in zip(model.parameters(), by_hand("32-true", clip), strict=True):
        torch.testing.assert_close(p, expected, **CLOSE)
    assert not optimizer._step_supports_amp_scaling  # to whoever else asks
