"""Gradients are released in the backward pass, and the training is the one without it, to the bit."""

import copy
import gc
import io
import weakref

import pytest
import torch
from released import Model, assert_same_training, batch, counting_steps, end_step, loss_of, one, plain_step

from novoscale import NovoGrad, param_groups, release_gradients

# ---- the same training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum_dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preset": "adamw", "weight_decay": 0.1},
        {"granularity": "row", "grad_averaging": True},
        {"granularity": "factored", "normalize": "rms", "clip_threshold": 0.5, "scale_parameter": True},
        {"bias_correction": True, "norm_type": 0, "reg_inside_moment": False},
        {"betas": (0.0, 0.9), "init_zero": True},
        {"maximize": True, "nesterov": True, "fused": False},
    ],
    ids=lambda options: "-".join(options) or "paper",
)
def test_it_is_the_same_training_in_every_format_and_granularity(options, momentum_dtype, dtype):
    make = one(momentum_dtype=momentum_dtype, **options)
    assert_same_training(Model, make, dtype=dtype)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("times", [1, 3], ids=["each block once", "each block three times"])
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoints", "reentrant"])
@pytest.mark.filterwarnings("ignore:reentrant")
def test_it_is_the_same_training_however_often_a_parameter_is_used(reentrant, times, tied):
    make = one(preset="adamw", momentum_dtype="int8")
    assert_same_training(lambda: Model(tied, times=times, reentrant=reentrant), make)


def test_it_is_the_same_training_with_param_groups_and_layers_that_are_left_out():
    def step(model, optimizers, step, handles):
        skipped = [(), (1,), (0, 2), (1, 2, 3)][step % 4]
        loss_of(model, step, skip=skipped).backward()
        end_step(optimizers)

    def groups(model):
        made = param_groups(model, weight_decay=0.1)
        for index, group in enumerate(made):
            group["lr"] = 0.01 * (1 + index)
        return [NovoGrad(made, momentum_dtype="int4", preset="paper")]

    assert_same_training(Model, groups, step, steps=9)


def test_it_is_the_same_training_with_two_optimizers():
    def two(model):
        blocks = list(model.blocks.parameters())
        others = [p for p in model.parameters() if not any(p is q for q in blocks)]
        return [
            NovoGrad(blocks, lr=0.02, preset="adamw"),
            NovoGrad(others, lr=0.01, momentum_dtype="int8", preset="paper"),
        ]

    assert_same_training(Model, two)


def test_it_is_the_same_training_when_a_frozen_parameter_is_thawed():
    def step(model, optimizers, step, handles):
        model.frozen.requires_grad_(step >= 2)
        plain_step(model, optimizers, step, handles)
        if handles and step >= 2:
            assert model.frozen.weight.grad is None

    assert_same_training(Model, one(), step)


def test_the_last_micro_batch_releases_what_was_accumulated():
    def step(model, optimizers, step, handles):
        for micro in range(3):
            loss = loss_of(model, 3 * step + micro, skip=(micro,)) / 3
            if handles and micro < 2:
                with handles[0].accumulate():
                    loss.backward()
                assert model.blocks[3].weight.grad is not None
            else:
                loss.backward()
        if handles:  # that block had no gradient in the last micro-batch
            kept = [name for name, p in model.named_parameters() if p.grad is not None]
            assert kept == ["blocks.2.weight", "blocks.2.bias"]
        end_step(optimizers)

    assert_same_training(Model, one(preset="adamw", momentum_dtype="int4"), step)


def test_two_losses_of_one_graph_are_the_same_training():
    def step(model, optimizers, step, handles):
        first = model(batch(step)).square().mean()
        second = loss_of(model, step)
        if handles:
            with handles[0].accumulate():
                first.backward(retain_graph=True)
        else:
            first.backward(retain_graph=True)
        second.backward()
        end_step(optimizers)

    assert_same_training(Model, one(), step)


def test_a_learning_rate_that_is_a_tensor_is_the_one_of_the_step():
    def tensor(model):
        return [NovoGrad(model.parameters(), lr=torch.tensor(0.02), preset="paper")]

    assert_same_training(Model, tensor)


def test_loaded_state_is_gone_on_with():
    def run(released):
        torch.manual_seed(0)
        model = Model()
        optimizer = NovoGrad(model.parameters(), lr=0.02, momentum_dtype="int8", preset="paper")
        handle = release_gradients(model, optimizer) if released else None
        for step in range(6):
            if step == 3:  # between backward and step: what was stepped is as it was
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                if handle:
                    loss_of(model, 17).backward()
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                optimizer.zero_grad()
            plain_step(model, [optimizer], step, [])
        return model.state_dict(), optimizer.state_dict()["state"]

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)


# ---- gradients are freed --------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoints", "reentrant"])
@pytest.mark.filterwarnings("ignore:reentrant")
def test_no_gradient_is_left_after_the_backward_pass(reentrant):
    model = Model(reentrant=reentrant)
    optimizer = NovoGrad(model.parameters(), lr=0.02, preset="paper")
    release_gradients(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    for step in range(3):
        loss_of(model, step).backward()
        assert all(p.grad is None for p in model.parameters())
        after = copy.deepcopy(model.state_dict())
        assert not torch.equal(before["blocks.0.weight"], after["blocks.0.weight"])
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(model.state_dict(), after, rtol=0, atol=0)
        before = after


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoints", "reentrant"])
@pytest.mark.filterwarnings("ignore:reentrant")
def test_less_than_half_of_the_gradients_is_there_at_once(reentrant):
    model = Model(tied=False, blocks=32, reentrant=reentrant)
    alive, most = {}, 0

    def count(p):
        nonlocal most
        alive[id(p)] = weakref.ref(p.grad.untyped_storage())
        most = max(most, sum(s().nbytes() for s in alive.values() if s() is not None))

    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(count)  # before that which releases
    optimizer = NovoGrad(model.parameters(), lr=0.02, preset="paper")
    release_gradients(model, optimizer)
    for step in range(3):
        most = 0
        plain_step(model, [optimizer], step, [])
        if step or not reentrant:
            assert 0 < most < sum(4 * p.numel() for p in model.parameters()) / 2
    gc.collect()
    assert all(storage() is None for storage in alive.values())


def test_a_step_has_few_calls_and_keeps_its_tables(monkeypatch):
    model = Model(tied=False, blocks=300)
    optimizer = NovoGrad(model.parameters(), lr=0.02, preset="paper")
    release_gradients(model, optimizer)
    calls = []
    counting_steps(monkeypatch, calls.append)
    for step in range(4):
        calls.clear()
        plain_step(model, [optimizer], step, [])
        tables = {id(ready.kernels) for ready in optimizer._step_tables.values()}
        if step == 1:
            assert len([c for c in calls if c]) <= 20
            expected = tables
        if step > 1:
            assert tables == expected


def test_thousands_of_tables_are_kept(monkeypatch):
    monkeypatch.setattr("novoscale.optimizer.release.ENOUGH", 1)  # each parameter alone
    model = Model(tied=False, blocks=300)
    optimizer = NovoGrad(model.parameters(), lr=0.02, preset="paper")
    release_gradients(model, optimizer)
    plain_step(model, [optimizer], 0, [])
    tables = {id(ready) for ready in optimizer._step_tables.values()}
    plain_step(model, [optimizer], 1, [])
    assert tables == {id(ready) for ready in optimizer._step_tables.values()}
    assert len(tables) > 600


def converted(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def swapped(model):
    for p in model.parameters():
        torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad))


@pytest.mark.parametrize("swap", [converted, swapped, lambda model: model.to(torch.bfloat16)])
@pytest.mark.parametrize("before", [0, 1])
def test_parameters_whose_contents_are_swapped_release_their_gradients(before, swap):
    torch.manual_seed(0)
    model = Model()
    optimizer = NovoGrad(model.parameters(), lr=0.1, preset="paper")
    handle = release_gradients(model, optimizer)
    for step in range(before):
        plain_step(model, [optimizer], step, [])
    swap(model)
    other = copy.deepcopy(model)
    expected = NovoGrad(other.parameters(), lr=0.1, preset="paper")
    expected.load_state_dict(optimizer.state_dict())
    for step in range(before, before + 2):
        loss_of(model, step).backward()
        assert not [p for p in model.parameters() if p.grad is not None]
        end_step([optimizer])
        plain_step(other, [expected], step, [])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    handle.remove()
    loss_of(model, 9).backward()
    assert model.head.weight.grad is not None


def test_the_former_contents_of_a_parameter_are_stepped_by_nobody():
    model = Model()
    optimizer = NovoGrad(model.parameters(), lr=0.1, preset="paper")
    release_gradients(model, optimizer)
    former = torch.nn.Parameter(torch.zeros_like(model.norm.weight))
    torch.utils.swap_tensors(model.norm.weight, former)
    former.sum().backward()
    assert former.grad is not None


@pytest.mark.parametrize("steps", [0, 1])
def test_a_model_can_be_saved_and_copied(steps):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    optimizer = NovoGrad(model.parameters(), lr=0.1, preset="paper")
    release_gradients(model, optimizer)
    for _ in range(steps):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (torch.load(buffer, weights_only=False), copy.deepcopy(model)):
        twin(torch.ones(2, 3)).sum().backward()
        assert twin[0].weight.grad is not None
        assert torch.equal(twin[0].weight, model[0].weight)
    model(torch.ones(2, 3)).sum().backward()
    assert model[0].weight.grad is None


def test_removed_it_is_a_step_as_usual():
    model = Model()
    optimizer = NovoGrad(model.parameters(), lr=0.02, preset="paper")
    with release_gradients(model, optimizer):
        plain_step(model, [optimizer], 0, [])
    loss_of(model, 1).backward()
    assert model.blocks[0].weight.grad is not None
    optimizer.step()
    with pytest.raises(RuntimeError, match="closure"), release_gradients(model, optimizer):
        optimizer.step(lambda: 1.0)
    assert optimizer.step(lambda: 1.0) == 1.0


# ---- a gradient that is not finite -----------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "row", "factored"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_its_parameter_and_is_counted_and_named(bad, granularity):
    normalize = "rms" if granularity == "factored" else "norm"
    model = Model(tied=False)
    optimizer = NovoGrad(
        model.named_parameters(), lr=0.02, granularity=granularity, normalize=normalize, preset="paper"
    )
    release_gradients(model, optimizer)
    plain_step(model, [optimizer], 0, [])
    before = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state[model.blocks[1].weight])
    poison = model.blocks[1].weight.register_hook(
        lambda grad: grad.clone().index_fill_(0, torch.tensor([2]), bad)
    )
    plain_step(model, [optimizer], 1, [])
    poison.remove()
    changed = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "unused" not in n}
    assert trained - changed == {"blocks.1.weight"}
    torch.testing.assert_close(optimizer.state[model.blocks[1].weight], state, rtol=0, atol=0)
    named = {"tensor": "blocks.1.weight"}.get(granularity, "blocks.1.weight[2]")
    assert (optimizer.skipped_steps, optimizer.skipped_layers()) == (1, [named])
    poison = model.norm.bias.register_hook(lambda grad: grad * bad)
    plain_step(model, [optimizer], 2, [])
    poison.remove()
    assert optimizer.skipped_steps == 2
    assert all(name.startswith("norm.bias") for name in optimizer.skipped_layers())
    plain_step(model, [optimizer], 3, [])
    assert optimizer.skipped_steps == 2


def test_a_loss_that_is_not_finite_is_one_skipped_step():
    model = Model()
    optimizer = NovoGrad(model.parameters(), lr=0.02, preset="paper")
    release_gradients(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    (loss_of(model, 0) * float("nan")).backward()
    end_step([optimizer])
    assert optimizer.skipped_steps == 1
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
