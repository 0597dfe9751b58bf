"""Which trainings release their gradients, and how many are then alive at once."""

import pytest
import torch
from torch import nn

from novoscale.memory import models
from novoscale.memory.optimizers import CANDIDATES
from novoscale.memory.planning import plan
from novoscale.memory.releasing import alive_at_once, why_not


def linear(rows, columns):
    return nn.Linear(columns, rows, bias=False)


class Blocks(nn.Module):
    """Blocks of 30 elements on 2 ranks (16 on the first), and 45 outside of them (24)."""

    def __init__(self, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.inner = nn.Module()
        self.inner.blocks = nn.ModuleList(nn.ModuleList([linear(3, 4), linear(3, 6)]) for _ in range(3))
        self.gain = nn.Parameter(torch.ones(()))
        self.head = linear(2, 7)
        if tied:
            self.head.weight = self.embedding.weight


@pytest.mark.parametrize(
    ("model", "cut", "world", "elements"),
    [
        (nn.ModuleList([linear(30, 30), linear(5, 5)]), "none", 1, 900),  # the largest
        (nn.ModuleList(linear(1, 10) for _ in range(100)), "none", 1, 1000 // 16),  # those that wait
        (nn.ModuleList(linear(1000, 3000) for _ in range(100)), "none", 1, 8_000_000),
        (nn.ModuleList([linear(7, 1)]), "none", 1, 7),
        (Blocks(), "none", 1, 30),
        (Blocks(tied=True), "none", 1, 30 + 18),  # the tied one waits for the embedding
        (Blocks(), "fsdp2", 2, 3 * 6 + 1 + 1 * 7),
        (Blocks(), "fsdp2", 1, 45),
        (nn.ModuleList([linear(30, 30), linear(5, 5)]), "fsdp2", 2, 15 * 30 + 3 * 5),  # no blocks
    ],
)
def test_elements_alive_at_once(model, cut, world, elements):
    assert alive_at_once(model, cut, world) == elements


@pytest.mark.parametrize(
    ("optimizer", "cut", "why"),
    [
        ("NovoGrad, int4", "none", None),
        ("NovoGrad, adamw, int8", "fsdp2", None),
        ("NovoGrad", "ddp", "not under DDP"),
        ("NovoGrad", "zero2", "not under ZeRO-2"),
        ("torch AdamW, fused", "none", "not NovoGrad"),
        ("NovoGrad (pytorch_optimizer)", "none", "not NovoGrad"),
    ],
)
def test_what_can_release_and_why_not(optimizer, cut, why):
    assert why_not(optimizer, cut) == why


def test_a_plan_of_llama_8b_in_one_process():
    model, rule = models.build("llama-8b", "meta"), CANDIDATES["NovoGrad, int4"].state
    whole, released = (plan(model, rule, "none", 1, "bfloat16", release) for release in (False, True))
    assert (released.parameters, released.state) == (whole.parameters, whole.state)
    assert whole.gradients == whole.parameters
    assert released.gradients == 2 * 128256 * 4096  # the embedding's
    assert 19 < released.on_device / 2**30 < 20
