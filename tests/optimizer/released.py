"""A model of which the gradients are released, and its training with and without that."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from novoscale import NovoGrad, release_gradients

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
    return lambda model: [NovoGrad(model.parameters(), **{"preset": "paper", "lr": 0.02, **options})]


def counting_steps(monkeypatch, check):
    """Call ``check`` with the tensors of each call of ``step_some``."""
    original = NovoGrad.step_some

    def step_some(self, tensors):
        tensors = [(index, list(members)) for index, members in tensors]
        check([p for _, members in tensors for p in members if p.grad is not None])
        original(self, tensors)

    monkeypatch.setattr(NovoGrad, "step_some", step_some)
