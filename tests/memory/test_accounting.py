"""Bytes of state, from storages."""

import pytest
import torch
from torch import nn

from novoscale import NovoGrad
from novoscale.memory import optimizer_state_bytes


@pytest.mark.parametrize(
    ("make", "per_parameter", "rest"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.1), 8, 2 * 4),  # and a 4-byte step for each parameter
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 4, 0),
        (lambda p: NovoGrad(p, lr=0.1), 4, 2 * 4),
        (lambda p: NovoGrad(p, lr=0.1, betas=(0, 0.98)), 0, 2 * 4),
    ],
)
def test_counts_what_each_optimizer_holds(make, per_parameter, rest):
    model = nn.Linear(1000, 37)
    optimizer = make(model.parameters())
    assert optimizer_state_bytes(optimizer).total == 0
    model(torch.ones(2, 1000)).sum().backward()
    optimizer.step()
    assert optimizer_state_bytes(optimizer).total == per_parameter * (37 * 1000 + 37) + rest


def test_shared_storages_count_once_and_whole():
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
