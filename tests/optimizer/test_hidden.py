"""Which matrices preset="muon" orthogonalises: found by the modules, or by names, or refused."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from novoscale import NovoGrad, param_groups

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TOKENS = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
# A model of transformers, and how many of its parameters are matrices of hidden layers.
MODELS = {
    "GPT-2, tied": (GPT2LMHeadModel, GPT2Config(n_layer=1, n_embd=16, n_head=2, **TOKENS), 4),
    "Llama": (LlamaForCausalLM, LlamaConfig(num_key_value_heads=2, **SMALL, **TOKENS), 7),
    "T5": (T5ForConditionalGeneration, T5Config(d_model=16, d_ff=24, num_layers=1, d_kv=8, num_heads=2), 16),
    "BERT": (BertForMaskedLM, BertConfig(**SMALL, **TOKENS), 7),
    "ViT": (ViTForImageClassification, ViTConfig(image_size=32, **SMALL), 6),
}
NOT_HIDDEN = (
    "wte",
    "wpe",
    "embed",
    "shared",
    "lm_head",
    "classifier",
    "token",
    "position",
    "bias",
    "norm",
    "ln_",
)


def orthogonalised(groups):
    return {name for g in groups if g["orthogonalize"] for name in g["param_names"]}


@pytest.mark.parametrize("name", MODELS)
def test_modules_and_names_find_the_same_matrices(name):
    kind, config, count = MODELS[name]
    with torch.device("meta"):
        model = kind(config)
    found = orthogonalised(param_groups(model, preset="muon"))
    assert len(found) == count
    assert not [n for n in found if any(part in n.lower() for part in NOT_HIDDEN)]
    assert orthogonalised(NovoGrad(model.named_parameters(), preset="muon").param_groups) == found


class Model(nn.Module):
    """Names that say nothing: only the modules do."""

    def __init__(self, tied=False):
        super().__init__()
        self.a = nn.Embedding(50, 8)
        self.b = nn.Linear(8, 50)  # as wide as the vocabulary, and not the last
        self.c = nn.Conv1d(8, 4, 3)
        self.d = nn.LayerNorm([2, 4])
        self.experts = nn.Parameter(torch.ones(3, 8, 6))
        self.tokens = nn.Parameter(torch.ones(1, 5, 8))
        self.e = nn.Linear(8, 50, bias=False)
        if tied:
            self.e.weight = self.a.weight


@pytest.mark.parametrize("tied", [False, True])
def test_modules_say_what_names_do_not(tied):
    model = Model(tied)
    groups = param_groups(model, preset="muon", weight_decay=0.1)
    assert orthogonalised(groups) == {"b.weight", "c.weight", "experts"}
    (stacked,) = [g for g in groups if "experts" in g["param_names"]]
    assert stacked["granularity"] == 3
    assert stacked["weight_decay"] == 0.1
    said = str(groups)
    for line in ("a.weight (50, 8): embedding", "experts (3, 8, 6): 3 matrices", "d.weight (2, 4): vector"):
        assert line in said
    assert ("e.weight (50, 8): head" in said) != tied
    optimizer = NovoGrad(groups, lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[model.experts]["exp_avg_sq"].shape == (3,)


def test_a_model_says_itself_which_is_its_head():
    class WithHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.x, self.y = nn.Linear(4, 4), nn.Linear(4, 4)

        def get_output_embeddings(self):
            return self.x

    assert orthogonalised(param_groups(WithHead(), preset="muon")) == {"y.weight"}


def test_patterns_exclude_and_what_is_excluded_may_have_another_preset():
    groups = param_groups(Model(), preset="muon", exclude=["c.*"], others="adamw")
    assert orthogonalised(groups) == {"b.weight", "experts"}
    assert "c.weight (4, 8, 3): excluded by 'c.*'" in str(groups)
    assert {g["preset"] for g in groups if not g["orthogonalize"]} == {"adamw"}
    optimizer = NovoGrad(groups, lr=0.1)
    assert {g["granularity"] for g in optimizer.param_groups if not g["orthogonalize"]} == {"factored"}
    with pytest.raises(ValueError, match="no parameter of the model has a name like 'z"):
        param_groups(Model(), preset="muon", exclude=["z*"])
    with pytest.raises(ValueError, match=r'exclude and others are for preset="muon"'):
        param_groups(Model(), preset="adamw", exclude=["c.*"])


def test_a_model_without_embedding_and_head_is_refused_until_it_is_said_so():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))
    with pytest.raises(ValueError, match=r"neither an embedding nor a head was found.*exclude=\[\]"):
        param_groups(model, preset="muon")
    assert orthogonalised(param_groups(model, preset="muon", exclude=[])) == {"0.weight", "1.weight"}
    assert orthogonalised(param_groups(model, preset="muon", exclude=["1.*"])) == {"0.weight"}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            lambda: nn.Linear(4, 6).parameters(),
            r"parameters without names do not say .* model.named_parameters",
        ),
        (
            lambda: nn.Linear(4, 6).named_parameters(),
            "no parameter has the name of an embedding or of a head",
        ),
        (
            lambda: Model().named_parameters(),
            r"cannot know whether experts, of shape \(3, 8, 6\), is a stack",
        ),
    ],
)
def test_what_names_do_not_say_is_refused_with_the_line_to_write(params, message):
    with pytest.raises(ValueError, match=message) as error:
        NovoGrad(params(), lr=0.1, preset="muon")
    assert 'novoscale.param_groups(model, preset="muon")' in str(error.value)


def test_param_groups_of_ones_own_are_split_and_keep_their_options():
    named = dict(MODELS["GPT-2, tied"][0](MODELS["GPT-2, tied"][1]).named_parameters())
    decayed = [(n, p) for n, p in named.items() if p.ndim > 1]
    others = [(n, p) for n, p in named.items() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 0.5}]
    found = NovoGrad(groups, lr=0.1, preset="muon").param_groups
    assert [(g["orthogonalize"], g["weight_decay"], len(g["params"])) for g in found] == [
        (True, 0.1, 4),
        (False, 0.1, 2),
        (False, 0.0, len(others)),
    ]
    assert found[2]["lr"] == 0.5


def test_a_group_that_is_added_later_is_of_one_kind():
    model = MODELS["Llama"][0](MODELS["Llama"][1])
    named = dict(model.named_parameters())
    head = named.pop("lm_head.weight")
    optimizer = NovoGrad(named.items(), lr=0.1, preset="muon")
    optimizer.add_param_group({"params": [("lm_head.weight", head)]})
    assert optimizer.param_groups[-1]["orthogonalize"] is False
    both = [("lm_head.weight", nn.Parameter(torch.ones(4, 4))), ("up.weight", nn.Parameter(torch.ones(4, 4)))]
    with pytest.raises(ValueError, match="add them as two, one with orthogonalize=True"):
        optimizer.add_param_group({"params": both})
    assert len(optimizer.param_groups) == 3
