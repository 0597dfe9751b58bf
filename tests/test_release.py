"""Gradients are released in the backward pass, and the training is the one without it, to the bit."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from novoscale import NovoGrad, param_groups, release_gradients

WORDS, WIDTH = 31, 48


class Model(nn.Module):
    """A language model with all that may have a gradient in several ways, or none."""

    def __init__(self, tied=True, blocks=4, times=1, reentrant=None):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.times, self.reentrant = times, reentrant

    def forward(self, tokens, skip=()):
        x = self.embedding(tokens)
        for _ in range(self.times):
            for index, block in enumerate(self.blocks):
                if index not in skip:
                    x = x + self.checkpointed(lambda x, block=block: torch.tanh(self.frozen(block(x))), x)
        return self.checkpointed(lambda x: self.head(self.norm(x)), x)

    def checkpointed(self, function, x):
        if self.reentrant is None:
            return function(x)
        return checkpoint(function, x, use_reentrant=self.reentrant)


def batch(step):
    return torch.randint(WORDS, (3, 7), generator=torch.Generator().manual_seed(step))


def loss_of(model, step, **options):
    tokens = batch(step)
    return nn.functional.cross_entropy(model(tokens, **options).flatten(0, 1), tokens.flatten())


def plain_step(model, optimizers, step, handles):
    loss_of(model, step).backward()
    end_step(optimizers)


def end_step(optimizers):
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def train(make_model, make_optimizers, released, train_step=plain_step, steps=5, dtype=torch.float32):
    """The weights and the state after some steps."""
    torch.manual_seed(0)
    model = make_model().to(dtype)
    optimizers = make_optimizers(model)
    handles = [release_gradients(model_of(model, o), o) for o in optimizers] if released else []
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)) for o in optimizers]
    for step in range(steps):
        train_step(model, optimizers, step, handles)
        for schedule in schedules:
            schedule.step()
    return model.state_dict(), [o.state_dict()["state"] for o in optimizers]


def model_of(model, optimizer):
    """The part of a model that has the optimizer's parameters."""
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return model if mine <= set(map(id, model.parameters())) else model.blocks


def assert_same_training(make_model, make_optimizers, train_step=plain_step, **options):
    """... with gradients released as without."""
    expected = train(make_model, make_optimizers, False, train_step, **options)
    found = train(make_model, make_optimizers, True, train_step, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def one(**options):
    return lambda model: [NovoGrad(model.parameters(), **{"lr": 0.02, **options})]


def counting_steps(monkeypatch, check):
    """Call ``check`` with the tensors of each call of ``step_some``."""
    original = NovoGrad.step_some

    def step_some(self, tensors):
        tensors = [(index, list(members)) for index, members in tensors]
        check([p for _, members in tensors for p in members if p.grad is not None])
        original(self, tensors)

    monkeypatch.setattr(NovoGrad, "step_some", step_some)


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
        return [NovoGrad(made, momentum_dtype="int4")]

    assert_same_training(Model, groups, step, steps=9)


def test_it_is_the_same_training_with_two_optimizers():
    def two(model):
        blocks = list(model.blocks.parameters())
        others = [p for p in model.parameters() if not any(p is q for q in blocks)]
        return [NovoGrad(blocks, lr=0.02, preset="adamw"), NovoGrad(others, lr=0.01, momentum_dtype="int8")]

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
        return [NovoGrad(model.parameters(), lr=torch.tensor(0.02))]

    assert_same_training(Model, tensor)


def test_loaded_state_is_gone_on_with():
    def run(released):
        torch.manual_seed(0)
        model = Model()
        optimizer = NovoGrad(model.parameters(), lr=0.02, momentum_dtype="int8")
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


# ---- gradients are let go --------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoints", "reentrant"])
@pytest.mark.filterwarnings("ignore:reentrant")
def test_no_gradient_is_left_after_the_backward_pass(reentrant):
    model = Model(reentrant=reentrant)
    optimizer = NovoGrad(model.parameters(), lr=0.02)
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
    optimizer = NovoGrad(model.parameters(), lr=0.02)
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
    optimizer = NovoGrad(model.parameters(), lr=0.02)
    release_gradients(model, optimizer)
    calls = []
    counting_steps(monkeypatch, calls.append)
    for step in range(4):
        calls.clear()
        plain_step(model, [optimizer], step, [])
        tables = {id(ready.kernels) for ready in optimizer._prepared.values()}
        if step == 1:
            assert len([c for c in calls if c]) <= 20
            expected = tables
        if step > 1:
            assert tables == expected


def test_thousands_of_tables_are_kept(monkeypatch):
    monkeypatch.setattr("novoscale.release.ENOUGH", 1)  # each parameter alone
    model = Model(tied=False, blocks=300)
    optimizer = NovoGrad(model.parameters(), lr=0.02)
    release_gradients(model, optimizer)
    plain_step(model, [optimizer], 0, [])
    tables = {id(ready) for ready in optimizer._prepared.values()}
    plain_step(model, [optimizer], 1, [])
    assert tables == {id(ready) for ready in optimizer._prepared.values()}
    assert len(tables) > 600


def test_removed_it_is_a_step_as_usual():
    model = Model()
    optimizer = NovoGrad(model.parameters(), lr=0.02)
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
    optimizer = NovoGrad(model.named_parameters(), lr=0.02, granularity=granularity, normalize=normalize)
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
    optimizer = NovoGrad(model.parameters(), lr=0.02)
    release_gradients(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    (loss_of(model, 0) * float("nan")).backward()
    end_step([optimizer])
    assert optimizer.skipped_steps == 1
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# ---- what is refused -------------------------------------------------------------------------------------


def released(**options):
    model = Model()
    optimizer = NovoGrad(model.named_parameters(), lr=0.02, **options)
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
    optimizer = NovoGrad(model.parameters(), lr=0.02, max_grad_norm=1.0)
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
        release_gradients(model, NovoGrad(model.parameters(), lr=0.1))
    plain = nn.Linear(2, 2)
    optimizer = NovoGrad(plain.named_parameters(), lr=0.1)
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
    optimizer = NovoGrad(model.parameters(), lr=0.02)

    def fail():
        with release_gradients(model, optimizer):
            loss_of(model, 0).backward()
            raise KeyError

    with pytest.warns(UserWarning, match="parameters were stepped"), pytest.raises(KeyError):
        fail()
