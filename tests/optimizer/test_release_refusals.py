"""What cannot be the same training with released gradients is refused, and says what was stepped."""

import copy

import pytest
import torch
from released import Model, batch, counting_steps, loss_of
from torch import nn

from novoscale import NovoGrad, release_gradients


def released(**options):
    model = Model()
    optimizer = NovoGrad(model.named_parameters(), lr=0.02, **{"preset": "paper", **options})
    return model, optimizer, release_gradients(model, optimizer)


def unchanged(model, act, error, match):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        act()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_second_backward_pass_is_refused_by_name():
    model, optimizer, handle = released()
    loss_of(model, 0).backward()
    unchanged(model, lambda: loss_of(model, 1).backward(), RuntimeError, r"norm.*accumulate\(\)")
    with handle.accumulate():
        unchanged(model, lambda: loss_of(model, 1).backward(), RuntimeError, "another backward pass")
    optimizer.step()
    loss_of(model, 1).backward()


def test_a_second_backward_pass_of_one_graph_is_refused():
    model, _, _ = released()
    loss = loss_of(model, 0)
    loss.backward(retain_graph=True)
    unchanged(model, loss.backward, RuntimeError, "retain_graph")


def test_max_grad_norm_is_refused_with_what_to_use_instead():
    model = Model()
    optimizer = NovoGrad(model.parameters(), lr=0.02, max_grad_norm=1.0, preset="paper")
    with pytest.raises(ValueError, match=r"max_grad_norm=1.0 .*clip_threshold"):
        release_gradients(model, optimizer)
    loss_of(model, 0).backward()
    optimizer.step()
    model, optimizer, _ = released()
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    unchanged(
        model, lambda: loss_of(model, 0).backward(), RuntimeError, r"max_grad_norm=1.0 .*clip_threshold"
    )


@pytest.mark.parametrize("clip", ["clip_grad_norm_", "clip_grad_value_"])
def test_torchs_clipping_is_refused_rather_than_without_effect(clip):
    model, optimizer, handle = released()
    loss_of(model, 0).backward()
    clip = getattr(torch.nn.utils, clip)
    with pytest.raises(RuntimeError, match="clip_threshold"):
        clip(model.parameters(), 1.0)
    other = nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    clip([other], 1.0)
    handle.remove()
    optimizer.step()
    loss_of(model, 0).backward()
    clip(model.parameters(), 1.0)


def test_the_norm_that_does_not_clip_is_that_of_all_gradients():
    torch.manual_seed(0)
    model, _, _ = released()
    twin = copy.deepcopy(model)
    loss_of(model, 0).backward()
    loss_of(twin, 0).backward()
    found = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    torch.testing.assert_close(found, torch.nn.utils.clip_grad_norm_(twin.parameters(), float("inf")))


def test_a_gradient_scaler_is_refused_before_anything_is_changed():
    model, optimizer, handle = released()
    scaler = torch.amp.GradScaler("cpu")
    loss = loss_of(model, 0)
    unchanged(model, lambda: scaler.scale(loss).backward(), RuntimeError, "bfloat16")
    torch.amp.GradScaler("cpu", enabled=False).scale(loss_of(model, 0)).backward()
    optimizer.step()
    handle.remove()
    scaler.scale(loss_of(model, 0)).backward()


def test_an_option_that_is_changed_between_backward_and_step_is_refused():
    model, optimizer, _ = released()
    loss_of(model, 0).backward()
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(RuntimeError, match=r"param group 0: lr was 0.02 .* and is 0.5 at step"):
        optimizer.step()


def test_a_tensor_lr_that_is_written_to_between_backward_and_step_is_refused():
    model, optimizer, _ = released()
    optimizer.param_groups[0]["lr"] = lr = torch.tensor(0.02)
    loss_of(model, 0).backward()
    lr.fill_(0.5)
    with pytest.raises(RuntimeError, match="param group 0: lr was"):
        optimizer.step()


def test_it_is_refused_twice_and_for_other_optimizers_and_models():
    model, optimizer, handle = released()
    with pytest.raises(RuntimeError, match=r"remove\(\)"):
        release_gradients(model, optimizer)
    handle.remove()
    with pytest.raises(ValueError, match=r"^embedding.weight \(shape .* optimizer's and not the model's"):
        release_gradients(copy.deepcopy(model), optimizer)
    release_gradients(model, optimizer).remove()
    with pytest.raises(TypeError, match="needs a NovoGrad, got SGD"):
        release_gradients(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_model_that_is_wrapped_later_is_refused():
    model, optimizer, _ = released()
    optimizer.param_groups[0]["params"] = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"embedding.weight is not the optimizer's any more"):
        optimizer.step()


def test_sparse_gradients_are_refused_by_name():
    model = nn.ModuleDict({"words": nn.Embedding(5, 3, sparse=True)})
    with pytest.raises(ValueError, match="words: sparse=True"):
        release_gradients(model, NovoGrad(model.parameters(), lr=0.1, preset="paper"))
    plain = nn.Linear(2, 2)
    optimizer = NovoGrad(plain.named_parameters(), lr=0.1, preset="paper")
    release_gradients(plain, optimizer)
    weight = torch.sparse.mm(torch.eye(2).to_sparse(), plain.weight)
    del weight
    embedding = nn.functional.embedding(torch.tensor([1]), plain.weight, sparse=True)
    with pytest.raises(RuntimeError, match="weight: NovoGrad does not support sparse"):
        embedding.sum().backward()


def test_zeroed_gradients_are_refused():
    _, optimizer, _ = released()
    with pytest.raises(ValueError, match="set_to_none"):
        optimizer.zero_grad(set_to_none=False)


class Exhausted(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, grad):
        raise torch.OutOfMemoryError("no memory")


def test_out_of_memory_in_the_middle_says_what_has_been_stepped():
    model, optimizer, _ = released()
    hidden = Exhausted.apply(model.embedding(batch(0)))
    for block in model.blocks:
        hidden = block(hidden)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        hidden.sum().backward()
    with pytest.raises(RuntimeError, match=r"\d+ of \d+ parameters were stepped .* load a checkpoint"):
        loss_of(model, 0).backward()
    optimizer.step()
    loss_of(model, 0).backward()


def test_out_of_memory_in_a_step_says_what_has_been_stepped(monkeypatch):
    model, *_ = released()
    calls = []

    def exhausted(tensors):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")

    counting_steps(monkeypatch, exhausted)
    with pytest.raises(torch.OutOfMemoryError, match=r"no memory\n\d+ of \d+ parameters were stepped"):
        loss_of(model, 0).backward()


def test_a_failure_inside_of_the_context_says_what_has_been_stepped():
    model = Model()
    optimizer = NovoGrad(model.parameters(), lr=0.02, preset="paper")

    def fail():
        with release_gradients(model, optimizer):
            loss_of(model, 0).backward()
            raise KeyError

    with pytest.warns(UserWarning, match="parameters were stepped"), pytest.raises(KeyError):
        fail()
