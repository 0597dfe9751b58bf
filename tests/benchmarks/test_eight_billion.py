"""benchmarks/eight_billion.py on tiny models: it trains, measures, and refuses what cannot fit."""

import json

import pytest
import torch
import typer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from benchmarks import eight_billion, resident
from novoscale.memory import models

CONFIG = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture(params=[False, True], ids=["own head", "tied head"])
def config(request, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, "tie_word_embeddings": request.param}))
    return path


def run(*arguments):
    command = typer.Typer()
    command.command()(eight_billion.main)
    return CliRunner().invoke(command, [*map(str, arguments)])


def made(config, seed=0):
    model = models.build(str(config), "meta", torch.bfloat16)
    eight_billion.materialise(model, seed)
    return model


def test_trains_and_writes_each_step_and_a_picture(config, tmp_path):
    out = tmp_path / "out"
    done = run("--model", config, "--lr", 1e-3, "--tokens", 16, "--out", out)
    assert done.exit_code == 0, done.output
    report = json.loads((out / "eight_billion.json").read_text())
    assert {"date", "command", "commit", "versions", "machine"} <= report["provenance"].keys()
    losses = [step["loss"] for step in report["steps"]] + [report["after"]["loss"]]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    assert report["state"] == report["planned"]["state"]
    assert report["planned"]["weights"] == 2 * report["parameters"]
    spans = [report["weights"], *(step[name] for step in report["steps"] for name in ("forward", "backward"))]
    for span in spans:
        assert span["rss"] <= span["peak_rss"] <= report["peak_rss"]
        assert span["start_s"] <= span["stop_s"] <= report["after"]["forward"]["start_s"]
    assert report["samples"]
    for name in ("eight_billion.png", "eight_billion.svg"):
        assert (out / name).stat().st_size > 5000


def test_every_parameter_is_trained_and_no_gradient_is_left(config):
    model = models.build(str(config), "meta", torch.bfloat16)
    with resident.Recording() as recording:
        options = {"preset": "adamw", "momentum_dtype": "int4", "lr": 1e-2}
        for _ in eight_billion.train(model, recording, options, 3, 16, 0, lambda what: None):
            pass
    before = made(config)
    for name, p in model.named_parameters():
        assert p.grad is None
        assert not torch.equal(p, before.get_parameter(name))


def test_a_loss_that_does_not_fall_is_a_failure(config, tmp_path):
    done = run("--model", config, "--lr", 0, "--tokens", 16, "--out", tmp_path)
    assert done.exit_code == 1
    assert "did not fall" in done.output


def test_an_interrupted_run_keeps_what_it_has_measured(config, tmp_path, monkeypatch):
    calls = []

    def step(self):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(eight_billion.NovoGrad, "zero_grad", step)
    done = run("--model", config, "--tokens", 16, "--out", tmp_path)
    assert done.exit_code != 0
    report = json.loads((tmp_path / "eight_billion.json").read_text())
    assert report["weights"]["rss"] > 0
    assert len(report["steps"]) == 1


class Made(TorchDispatchMode):
    """The largest tensor in floating point that is not bfloat16, on any device."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.bfloat16:
                self.largest = max(self.largest, t.numel())
        return result


def test_no_parameter_is_ever_made_in_another_dtype_than_bfloat16(config):
    with Made() as other:
        model = made(config)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert all(p.requires_grad for p in model.parameters())
    assert other.largest < 64  # frequencies of rotary positions, of 8 elements; the smallest parameter has 64


def test_weights_are_random_norms_are_one_and_buffers_are_right(config):
    model, again, another = made(config), made(config), made(config, seed=1)
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all()
            continue
        assert p.float().std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
        assert torch.equal(p, again.get_parameter(name))
        assert not torch.equal(p, another.get_parameter(name))
    expected = models.build(str(config))
    assert dict(model.named_buffers()).keys() == dict(expected.named_buffers()).keys()
    for name, buffer in expected.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)
        assert model.get_buffer(name).dtype == buffer.dtype == torch.float32
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("limited_by", ["the machine", "its control group"])
def test_too_little_memory_is_refused_with_what_is_missing(tmp_path, monkeypatch, limited_by):
    monkeypatch.setattr(eight_billion, "available", lambda: (2**30, limited_by))
    done = run("--model", "llama-1b", "--out", tmp_path / "out")
    said = " ".join(done.output.split())
    assert done.exit_code == 2
    planned = eight_billion.planned(
        models.build("llama-1b", "meta"), eight_billion.NOVOGRAD, "bfloat16", True
    )
    # Bytes: of the logits of 128 tokens 16 for each word; of the tied matrix another two gradients.
    besides = {"logits": 16 * 128 * 128_256, "sum of tied gradients": 4 * 128_256 * 2048, "libraries": 2**29}
    for part, value in {**planned, **besides}.items():
        assert f"{part} {value / 2**30:.2f}" in said
    needed = (sum(planned.values()) + sum(besides.values())) / 2**30
    assert f"llama-1b needs {needed:.1f} GiB of memory" in said
    assert f"{limited_by} has 1.0 GiB left: {needed - 1:.1f} GiB are missing" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "says"), [("builtin", "not a model of transformers"), ("llama-9b", "did you mean: llama-8b")]
)
def test_a_model_that_cannot_be_run_is_named(model, says):
    done = run("--model", model)
    assert done.exit_code == 2
    assert says in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("limit", "used", "file"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_what_a_control_group_has_left(tmp_path, limit, used, file):
    assert resident._left(tmp_path) is None
    (tmp_path / used).write_text("700\n")
    (tmp_path / "memory.stat").write_text(f"anon 500\n{file} 150\n")
    (tmp_path / limit).write_text("max\n")
    assert resident._left(tmp_path) is None
    (tmp_path / limit).write_text("1000\n")
    assert resident._left(tmp_path) == 450


def test_the_lowest_limit_counts(monkeypatch):
    machine = resident.psutil.virtual_memory().available
    monkeypatch.setattr(resident, "_groups", lambda: ["none", "wide", "tight"])
    monkeypatch.setattr(resident, "_left", {"none": None, "wide": 2**60, "tight": 1000}.get)
    assert resident.available() == (1000, "its control group")
    monkeypatch.setattr(resident, "_groups", lambda: ["none", "wide"])
    assert resident.available()[0] == pytest.approx(machine, rel=0.5)
    assert resident.available()[1] == "the machine"
