"""Recommended param groups: rows for matrices, decay for matrices, and a printable account of it."""

import pytest
import torch
from torch import nn

from novoscale import NovoGrad, param_groups


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.qkv = nn.Linear(8, 24)
        self.norm = nn.LayerNorm([2, 4])  # two dimensions, and yet no matrix
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def of(groups, name):
    (found,) = [g for g in groups if name in g["param_names"]]
    return found["weight_decay"], found["granularity"]


def test_matrices_have_rows_and_decay_and_nothing_else_has():
    groups = param_groups(Model(), weight_decay=0.1)
    assert of(groups, "embedding.weight") == of(groups, "qkv.weight") == (0.1, "row")
    assert of(groups, "qkv.bias") == of(groups, "norm.weight") == of(groups, "norm.bias") == (0.0, "tensor")
    names = [name for g in groups for name in g["param_names"]]
    assert sorted(names) == sorted(n for n, p in Model().named_parameters() if p.requires_grad)


def test_fused_weights_are_as_many_layers_as_said():
    model = Model()
    groups = param_groups(model, weight_decay=0.1, fused={"qkv": 3})
    assert of(groups, "qkv.weight") == (0.1, 3)
    assert of(groups, "qkv.bias") == (0.0, 3)
    optimizer = NovoGrad(groups, lr=0.1, preset="paper")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [len(optimizer.state[p]["exp_avg_sq"]) for p in (model.qkv.weight, model.embedding.weight)] == [
        3,
        11,
    ]
    assert "qkv.weight[2]" in optimizer.layer_norms()
    with pytest.raises(ValueError, match="no parameter of the model has qvk in its name"):
        param_groups(model, fused={"qvk": 3})


def test_what_it_did_can_be_printed():
    text = str(param_groups(Model(), weight_decay=0.1))
    assert "weight_decay=0.1, granularity='row': 2 parameters, 280 elements" in text
    assert "qkv.weight (24, 8)" in text
