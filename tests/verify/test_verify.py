"""``novoscale verify`` passes what is exact, fails what is not, and says what it cannot test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cuts import PlainNovoGrad
from novoscale.ranks import RankError
from novoscale.verify import VerifyError, verify
from novoscale.verify.config import prepare, read
from novoscale.verify.runs import builtin_model

ROOT = Path(__file__).parent.parent.parent
PLAIN = "benchmarks.cuts:PlainNovoGrad"


def ds(stage, **more):
    return {"zero_optimization": {"stage": stage}, **more}


@pytest.mark.parametrize(
    "config",
    [
        ds(1, optimizer={"type": "NovoGrad", "params": {"lr": "auto", "weight_decay": 0.1}}),
        ds(2, gradient_accumulation_steps=3, gradient_clipping=0.1, bf16={"enabled": "auto"}),
        ds(3, train_batch_size="auto", scheduler={"type": "WarmupLR", "params": {}}),
        "ddp",
        "fsdp2",
    ],
    ids=str,
)
def test_novograd_passes(config):
    verdict = verify(config, ranks=3, steps=5)
    assert verdict.passed
    assert verdict.worst[1] < 2e-6
    assert len(verdict.deviations) == sum(1 for _ in builtin_model()[0].parameters())


@pytest.mark.parametrize("config", [ds(2), ds(2, bf16={"enabled": True})], ids=str)
def test_optimizer_that_takes_a_partition_for_a_layer_fails(config):
    verdict = verify(config, ranks=3, steps=5, optimizer=PLAIN, options={"lr": 0.003})
    assert not verdict.passed
    assert verdict.worst[1] > 0.05


def test_bfloat16_passes_within_its_own_bound():
    verdict = verify(ds(2, bf16={"enabled": True}), ranks=2)
    assert verdict.bound == 2**-6
    assert verdict.passed


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*novograd*.json")), ids=lambda p: p.name)
def test_the_recommended_configuration_passes(config):
    """Its moments are rounded: a cut changes less than another seed would."""
    verdict = verify(config, ranks=3)
    assert verdict.passed
    assert verdict.worst[1] <= verdict.of_seeds == verdict.bound


def test_a_wrong_optimizer_that_takes_a_seed_fails():
    """Rounded by chance, and the norm of each flat partition taken for that of a layer."""
    options = {"lr": 0.003}
    verdict = verify(ds(2), ranks=3, steps=5, optimizer="test_verify:RoundedPlainNovoGrad", options=options)
    assert not verdict.passed
    assert 2e-5 < verdict.of_seeds < 0.5 * verdict.worst[1]


class RoundedPlainNovoGrad(PlainNovoGrad):
    """Moments rounded as bfloat16 by chance."""

    def __init__(self, params, lr, seed=0):
        super().__init__(params, lr=lr)
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, closure=None):
        super().step(closure)
        for state in self.state.values():
            moment = state["exp_avg"]
            noise = torch.rand(moment.shape, generator=self.generator) - 0.5
            moment.mul_((1 + 2**-8 * noise).to(moment.dtype))


def test_users_model(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.w = torch.nn.Linear(5, 3)\n"
        "    def forward(self, x, y):\n"
        "        return torch.nn.functional.mse_loss(self.w(x), y)\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    def batch(step, samples):\n"
        "        g = torch.Generator().manual_seed(step)\n"
        "        draw = lambda n: torch.randn(samples, n, generator=g)\n"
        "        return {'x': draw(5), 'y': draw(3)}\n"
        "    return Model(), batch\n"
    )
    command = [sys.executable, "-m", "novoscale.cli", "verify", "fsdp2", "--model", "mine:make", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["deviations"]) == {"w.weight", "w.bias"}


def test_command_shows_the_worst_and_its_exit_code_is_the_outcome(tmp_path):
    config = tmp_path / "ds.json"
    config.write_text(json.dumps(ds(2)))
    command = [sys.executable, "-m", "novoscale.cli", "verify", str(config), "--ranks", "3", "--steps", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "the same training: worst" in done.stdout
    command += ["--optimizer", PLAIN, "--option", "lr=0.003"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "not the same training: worst" in done.stdout


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        ("absent.json", {}, "absent.json: there is no such file"),
        (ds(2), {"optimizer": "nowhere:X"}, "nowhere:X: cannot be imported"),
        (ds(2), {"model": "novoscale:nothing"}, "novoscale:nothing: cannot be imported"),
        (ds(2, optimizer={"type": "Lion"}), {}, "no counterpart in torch.optim"),
    ],
    ids=str,
)
def test_what_cannot_be_tested_is_named(config, options, says):
    with pytest.raises(VerifyError, match=says):
        verify(config, **options)


def test_configuration_that_is_refused_fails_with_its_reason():
    with pytest.raises(RankError, match="elastic_checkpoint"):
        verify({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}})


def test_what_was_changed_to_run_here_is_said():
    given = ds(2, fp16={"enabled": True}, scheduler={"type": "WarmupLR"})
    setup, notes = prepare(given, 2, 5, "novoscale.verify.runs:builtin_model", None, None)
    assert "fp16" not in setup.deepspeed
    assert setup.dtype == torch.float32
    assert len(notes) == 2
    assert "fp16" in given  # the user's own is left alone


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_accelerate_files_are_read(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    cut, content = read(path)
    assert cut == "deepspeed"
    assert content["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\n", "fsdp2"),
        ("distributed_type: MULTI_GPU\n", "ddp"),
    ],
)
def test_other_accelerate_files(content, expected, tmp_path):
    path = tmp_path / "accelerate.yaml"
    path.write_text(content)
    assert read(path) == (expected, None)
    path.write_text("distributed_type: FSDP\nfsdp_config: {}\n")
    with pytest.raises(VerifyError, match="set fsdp_version: 2"):
        read(path)
