"""What a CUDA graph has captured stays as it was; what cannot be captured is refused by name.

Without a GPU: ``capturing`` stands in for the stream, and the tables are looked at.
"""

import gc
import weakref

import pytest
import torch
from torch import nn

from novoscale import NovoGrad, kernels
from novoscale.optimizer import layerwise

pytestmark = pytest.mark.skipif(kernels.fused("cpu") is None, reason="no C++ compiler")


@pytest.fixture
def capture(monkeypatch):
    """Say whether a graph is being captured."""
    now = [False]
    monkeypatch.setattr(layerwise, "capturing", lambda: now[0])

    def say(capturing):
        now[0] = capturing

    return say


def trained(**options):
    """An optimizer after a step, and its parameters."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in ((8, 4), (3,))]
    optimizer = NovoGrad(params, lr=0.1, weight_decay=0.1, **{"preset": "paper", **options})
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer, params


def tables(optimizer):
    """What the step after this one would use."""
    return next(reversed(optimizer._step_tables.values()))


def test_a_step_that_was_never_made_cannot_be_captured(capture):
    p = nn.Parameter(torch.ones(3))
    optimizer = NovoGrad([p], lr=0.1, preset="paper")
    p.grad = torch.ones(3)
    capture(True)
    with pytest.raises(RuntimeError, match=r"never stepped these tensors.*before the capture"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state[p]
    capture(False)
    optimizer.step()


def test_gradients_may_be_allocated_in_the_capture(capture):
    """As in torch's recipe: zero_grad(set_to_none=True), then backward and step in the graph."""
    optimizer, params = trained()
    before = tables(optimizer)
    for p in params:
        p.grad = torch.randn_like(p)
    capture(True)
    optimizer.step()
    assert tables(optimizer) is before
    assert before.captured


@pytest.mark.parametrize("what", ["gradients", "option", "parameter"])
def test_an_eager_step_does_not_write_into_what_a_graph_reads(capture, what):
    optimizer, params = trained()
    capture(True)
    optimizer.step()
    captured = tables(optimizer)
    addresses, options = captured.addresses, captured.options.table.clone()
    capture(False)
    if what == "gradients":
        for p in params:
            p.grad = p.grad.clone()
    elif what == "option":
        optimizer.param_groups[0]["weight_decay"] = 0.2
    else:
        params[0].data = params[0].data.clone()
    optimizer.step()
    assert tables(optimizer) is not captured
    assert captured.addresses == addresses
    assert torch.equal(captured.options.table, options)


def test_what_a_graph_reads_lives_as_long_as_the_optimizer(capture, monkeypatch):
    optimizer, params = trained()
    capture(True)
    optimizer.step()
    captured = weakref.ref(tables(optimizer))
    capture(False)
    monkeypatch.setattr(layerwise, "MAX_CACHED_TABLES", -2)
    for keep in params:
        for p in params:
            p.grad = torch.randn_like(p) if p is keep else None
        optimizer.step()
    gc.collect()
    assert captured() is not None
    assert captured() not in optimizer._step_tables.values()
    del optimizer
    gc.collect()
    assert captured() is None


def test_an_unchanged_step_goes_on_with_what_a_graph_reads(capture):
    optimizer, _ = trained()
    capture(True)
    optimizer.step()
    capture(False)
    captured = tables(optimizer)
    optimizer.step()
    assert tables(optimizer) is captured


@pytest.mark.parametrize("what", ["gradients", "option"])
def test_a_second_capture_with_something_else_is_refused(capture, what):
    """One graph would read what the other wrote."""
    optimizer, params = trained()
    capture(True)
    optimizer.step()
    if what == "gradients":
        params[0].grad = params[0].grad.clone()
    else:
        optimizer.param_groups[0]["betas"] = (0.5, 0.9)
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match=r"an earlier CUDA graph has its tables.*Make one step"):
        optimizer.step()
    assert torch.equal(params[0], before)
    capture(False)
    optimizer.step()
    capture(True)
    optimizer.step()
    assert len(optimizer._captured) == 2
