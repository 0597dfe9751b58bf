"""torch.amp.GradScaler: the step divides by the scale itself, and a step with an overflow changes nothing."""

import copy

import pytest
import torch
import torch._lazy.ts_backend
from torch import nn

from novoscale import NovoGrad

OPTIONS = [{}, {"max_grad_norm": 0.05}, {"norm_type": 0}, {"reg_inside_moment": False, "weight_decay": 0.1}]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def loss_of(m, step):
    return m(torch.randn(4, 7, generator=torch.Generator().manual_seed(step))).square().mean()


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_scaled_gradients_give_the_same_bits(options):
    plain, scaled, amp = model(), model(), scaler()
    expected, optimizer = (
        NovoGrad(m.parameters(), lr=0.1, **{"preset": "paper", **options}) for m in (plain, scaled)
    )
    for step in range(6):  # the scale grows on the way; it is a power of two
        for o in (expected, optimizer):
            o.zero_grad()
        loss_of(plain, step).backward()
        expected.step()
        amp.scale(loss_of(scaled, step)).backward()
        before = scaled[0].weight.grad.clone()
        amp.step(optimizer)
        amp.update()
        assert torch.equal(scaled[0].weight.grad, before)
    assert amp.get_scale() > 1024
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), scaled.parameters(), strict=True))
    norms = zip(expected.layer_norms().items(), optimizer.layer_norms().items(), strict=True)
    assert all(a == b for a, b in norms)


def test_unscaling_before_the_step_works_too():
    plain, scaled, amp = model(), model(), scaler()
    expected, optimizer = (NovoGrad(m.parameters(), lr=0.1, preset="paper") for m in (plain, scaled))
    loss_of(plain, 0).backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
    expected.step()
    amp.scale(loss_of(scaled, 0)).backward()
    amp.unscale_(optimizer)
    nn.utils.clip_grad_norm_(scaled.parameters(), 0.01)
    amp.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), scaled.parameters(), strict=True))


def test_a_step_with_an_overflow_changes_nothing_and_is_counted():
    m, amp = model(), scaler()
    optimizer = NovoGrad(m.named_parameters(), lr=0.1, preset="paper")
    for step in range(3):
        optimizer.zero_grad()
        amp.scale(loss_of(m, step)).backward()
        if step == 1:
            m[2].bias.grad[0] = torch.inf
            before = copy.deepcopy((m.state_dict(), optimizer.state_dict()["state"]))
        amp.step(optimizer)
        amp.update()
        if step == 1:
            after = (m.state_dict(), optimizer.state_dict()["state"])
            assert str(after) == str(before)
            assert optimizer.skipped_layers() == ["2.bias"]
    assert optimizer.skipped_steps == 1
    assert amp.get_scale() == 512


@pytest.fixture(scope="module")
def another_device():
    """A second device that computes: torch's lazy tensors, which other tensors may not be mixed with."""
    torch._lazy.ts_backend.init()
    return torch.device("lazy")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_scale_may_be_on_another_device(options, another_device):
    weights = []
    for device in (torch.device("cpu"), another_device):
        m = model()
        optimizer = NovoGrad(m.parameters(), lr=0.1, **{"preset": "paper", **options})
        for step, overflow in enumerate((0.0, 1.0, 0.0)):
            optimizer.zero_grad()
            (8 * loss_of(m, step)).backward()
            # As GradScaler does.
            optimizer.grad_scale = torch.tensor([8.0], device=device)
            optimizer.found_inf = torch.tensor(overflow, device=device)
            optimizer.step()
        assert optimizer.skipped_steps == 1
        weights.append(list(m.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_loss_scale_that_float32_could_not_square_is_no_overflow():
    p = nn.Parameter(torch.ones(4))
    optimizer = NovoGrad([p], lr=0.1, preset="paper")
    p.grad = torch.full((4,), 1e25)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1e25), torch.tensor(0.0)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert torch.allclose(p, torch.full((4,), 0.95))
