"""``novoscale verify`` passes what is exact, fails what is not, and says what it cannot test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import patient
from torch import nn
from typer.testing import CliRunner

from benchmarks.sharding import PlainNovoGrad
from novoscale import NovoGrad
from novoscale.cli import app
from novoscale.tools.local_ranks import RankError, run_ranks
from novoscale.verify import Bits, Training, VerifyError, findings, torch_training, verify
from novoscale.verify.config import prepare, read
from novoscale.verify.recording import replay
from novoscale.verify.runs import builtin_model, one_process

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "configs").iterdir())
PLAIN = "benchmarks.sharding:PlainNovoGrad"
BUILTIN = "novoscale.verify.runs:builtin_model"
BF16 = {"bf16": {"enabled": True}}
# The optimizer's own weights are bfloat16: no float32 masters.
BF16_WEIGHTS = {
    "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
}


def ds(stage, more=None, **section):
    return {"zero_optimization": {"stage": stage, **section}, **(more or {})}


def command(*arguments):
    """``novoscale verify`` in this process: its exit code and what it prints."""
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


# ---- what is the same training -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        ds(1, {"optimizer": {"type": "NovoGrad", "params": {"lr": "auto", "weight_decay": 0.1}}}),
        ds(2, {"gradient_accumulation_steps": 3, "gradient_clipping": 0.1, "bf16": {"enabled": "auto"}}),
        ds(3, {"train_batch_size": "auto", "scheduler": {"type": "WarmupLR", "params": {}}}),
        "ddp",
        "fsdp2",
    ],
    ids=str,
)
def test_novograd_passes(config):
    verdict = verify(config, ranks=3, steps=5)
    parameters = list(builtin_model()[0].parameters())
    assert verdict.passed
    assert verdict.bits == Bits(True, sum(p.numel() for p in parameters), {})
    assert verdict.training.worst[1] < 2e-6
    assert len(verdict.training.deviations) == len(parameters)


@pytest.mark.parametrize(
    ("config", "optimizer", "options"),
    [
        (ds(2, round_robin_gradients=True), "novoscale:NovoGrad", {"momentum_dtype": "int8"}),
        (ds(2, offload_optimizer={"device": "cpu"}), "novoscale:NovoGrad", {"momentum_dtype": "bfloat16"}),
        (ds(3, sub_group_size=3000), "novoscale:NovoGrad", {"momentum_dtype": "int4", "preset": "adamw"}),
        ("fsdp2", "novoscale:NovoGrad", {"momentum_dtype": "int8", "max_grad_norm": 0.1}),
        # BF16_Optimizer
        (ds(1, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}), "torch.optim:AdamW", {}),
        # FP16_UnfusedOptimizer: makes a step on zero gradients when it is made, which decays.
        (ds(0, BF16), "torch.optim:AdamW", {"weight_decay": 0.1}),
    ],
    ids=str,
)
def test_the_same_gradients_give_the_same_bits(config, optimizer, options):
    verdict = verify(config, ranks=3, steps=3, optimizer=optimizer, options={"lr": 0.003, **options})
    assert verdict.bits.identical, verdict.bits.different
    assert verdict.bits.elements == sum(p.numel() for p in builtin_model()[0].parameters())


def test_a_parameter_without_a_gradient_is_given_none():
    """A gradient of zeros would decay it."""
    options = {"lr": 0.003, "weight_decay": 0.1}
    model = "test_verify:model_with_an_unused_layer"
    verdict = verify("fsdp2", steps=3, model=model, optimizer="torch.optim:AdamW", options=options)
    assert verdict.passed
    assert verdict.bits.identical


class UnusedLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        return self.used(x).square().mean()


def model_with_an_unused_layer():
    torch.manual_seed(0)

    def batch(step, samples):
        return {"x": torch.randn(samples, 5, generator=torch.Generator().manual_seed(step))}

    return UnusedLayer(), batch


# ---- what is not -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [ds(2), ds(2, BF16)], ids=str)
def test_an_optimizer_that_takes_a_partition_for_a_layer_fails(config):
    verdict = verify(config, ranks=3, steps=5, optimizer=PLAIN, options={"lr": 0.003})
    assert not verdict.passed
    assert not verdict.bits.identical
    assert sum(verdict.bits.different.values()) > 0.9 * verdict.bits.elements
    assert not verdict.training.passed
    assert verdict.training.worst[1] > 0.05


@pytest.mark.parametrize(
    ("optimizer", "passed"), [("NearlySGD", True), ("NearlyNovoGrad", False)], ids=["other", "NovoGrad"]
)
def test_bits_decide_for_those_that_promise_them(optimizer, passed):
    """The last digits depend on the sharding, which is no other training."""
    verdict = verify(ds(2), ranks=3, steps=3, optimizer=f"test_verify:{optimizer}", options={"lr": 0.003})
    assert not verdict.bits.identical
    assert verdict.training.passed
    assert verdict.passed is passed


class Nearly:
    """Adds to the weights what depends on how many elements there are, in their last digits."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for p in (p for group in self.param_groups for p in group["params"]):
                p.mul_(1 + 1e-7 * (p.numel() % 7))


class NearlySGD(Nearly, torch.optim.SGD):
    pass


class NearlyNovoGrad(Nearly, NovoGrad):
    pass


def test_one_element_that_differs_in_one_bit_on_one_rank_is_found(tmp_path):
    setup, _ = prepare("ddp", 2, 2, BUILTIN, None, None)
    run_ranks(torch_training.train, 2, setup, tmp_path)
    assert replay(setup, tmp_path).identical
    end = torch.load(tmp_path / "end_rank1")
    number, offset, values = end[3]
    name = [name for name, _ in builtin_model()[0].named_parameters()][number]
    values.view(torch.int32)[5] ^= 1
    torch.save(end, tmp_path / "end_rank1")
    found = replay(setup, tmp_path)
    assert (offset, found.identical, found.different) == (0, False, {name: 1})


@pytest.mark.parametrize("recorded", [[], [(0, 0, torch.zeros(1))]], ids=["nothing", "a part"])
def test_what_could_not_be_recorded_is_not_compared(recorded, tmp_path):
    """Then only an optimizer that does not promise bits can pass."""
    setup, _ = prepare("ddp", 1, 2, BUILTIN, None, None)
    torch.save(recorded, tmp_path / "end_rank0")
    assert replay(setup, tmp_path) is None
    same = Training(True, 1.0, "", {"w": 0.5})
    assert not findings.passes(setup, None, same)
    assert findings.passes(prepare("ddp", 1, 2, BUILTIN, "torch.optim:SGD", {})[0], None, same)


# ---- by what training is judged ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "options", "rule"),
    [
        ({}, {"momentum_dtype": "float32"}, "the bound for float32"),
        ({}, {"momentum_dtype": "int8"}, "another seed"),
        (BF16, {"momentum_dtype": "float32"}, "the bound for bfloat16"),
        (BF16_WEIGHTS, {}, "another seed"),
        (BF16_WEIGHTS, {"stochastic_rounding": False}, "as no seed decides"),
    ],
    ids=str,
)
def test_rounding_by_chance_is_judged_by_another_seed(more, options, rule):
    setup, _ = prepare(ds(2, more), 2, 3, BUILTIN, "novoscale:NovoGrad", options)
    bound, found = findings.judged_by(setup, one_process(setup), 1e-4)
    assert rule in found
    if "seed" in rule and "no seed" not in rule:
        assert bound != findings.BOUNDS[setup.precision]
    else:
        assert bound == findings.BOUNDS[setup.precision]


def test_an_optimizer_without_a_seed_is_judged_by_the_bound():
    setup, _ = prepare(ds(2, BF16_WEIGHTS), 2, 3, BUILTIN, "torch.optim:AdamW", {"lr": 0.003})
    bound, rule = findings.judged_by(setup, {}, 1.0)
    assert (bound, rule) == (2**-6, "the bound for bfloat16, as no seed decides how the weights are rounded")


def test_what_rounding_of_gradients_is_enlarged_to_is_the_same_training():
    """By Adam, in one process too; not by an optimizer that enlarges nothing."""
    for optimizer, bound in (("AdamW", (1e-4, 1e-2)), ("SGD", (2e-5, 2e-5))):
        setup, _ = prepare(ds(2), 3, 10, BUILTIN, f"torch.optim:{optimizer}", {"lr": 0.003})
        assert bound[0] <= findings.judged_by(setup, one_process(setup), 1.0)[0] <= bound[1]


@pytest.mark.parametrize(
    ("more", "rule"),
    [(BF16, "the bound for bfloat16"), (BF16_WEIGHTS, "another seed in one process")],
    ids=["masters", "weights"],
)
def test_bfloat16_passes(more, rule):
    verdict = verify(ds(2, more), ranks=3)
    assert verdict.passed
    assert verdict.training.rule == rule


def test_bfloat16_gradients_that_an_optimizer_enlarges_are_judged_by_other_rounding():
    """Gradients close to zero, which the preset divides by their own size; a wrong optimizer still fails."""
    more = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
    verdict = verify(ds(1, more), ranks=3, options={"lr": 0.003, "preset": "adamw"})
    assert verdict.passed
    assert verdict.training.rule == "1 times other rounding of gradients in one process"
    assert not verify(ds(2, BF16), ranks=3, optimizer=PLAIN, options={"lr": 0.003}).passed


def test_a_wrong_optimizer_that_takes_a_seed_fails():
    """Rounded by chance, and the norm of each flat partition taken for that of a layer."""
    options = {"lr": 0.003}
    verdict = verify(ds(2), ranks=3, steps=5, optimizer="test_verify:RoundedPlainNovoGrad", options=options)
    assert not verdict.passed
    assert verdict.training.rule == "another seed in one process"
    assert 2e-5 < verdict.training.bound < 0.5 * verdict.training.worst[1]


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


# ---- the command -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_in_configs(config, monkeypatch):
    """Ends with 0. Adafactor's with 1: it takes a flat partition for a vector, which is its own fault."""
    monkeypatch.chdir(ROOT)
    wrong = "adafactor" in config.name
    if config.suffix == ".json":
        done = command(config, "--ranks", 3, "--json")
        found = json.loads(done.stdout)
        assert found["passed"] is found["training"]["passed"] is found["bits"]["identical"] is not wrong
        assert found["bits"]["elements"] == 48724
        assert (found["training"]["worst"]["deviation"] > 0.1) is wrong
    else:
        done = command(config, "--ranks", 2, "--steps", 3)
        assert f"bits: {'not ' * wrong}identical, given the same gradients: " in done.stdout
        assert f"training: {'not ' * wrong}the same: worst " in done.stdout
    assert done.exit_code == int(wrong), done.output


def test_users_model(tmp_path):
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
    started = [sys.executable, "-m", "novoscale.cli", "verify", "fsdp2", "--model", "mine:make", "--json"]
    done = subprocess.run(started, cwd=tmp_path, capture_output=True, text=True, timeout=patient(120))
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["training"]["deviations"]) == {"w.weight", "w.bias"}


def test_a_given_bound_decides():
    done = command("ddp", "--steps", 2, "--bound", 1e-12, "--json")
    assert done.exit_code == 1
    training = json.loads(done.stdout)["training"]
    assert (training["bound"], training["rule"]) == (1e-12, "the bound given")


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        ("absent.json", {}, "absent.json: there is no such file"),
        (ds(2), {"optimizer": "nowhere:X"}, "nowhere:X: cannot be imported"),
        (ds(2), {"model": "novoscale:nothing"}, "novoscale:nothing: cannot be imported"),
        (ds(2, {"optimizer": {"type": "Lion"}}), {}, "no counterpart in torch.optim"),
        ("ddp", {"model": "bad_models:other_weights"}, "has another weight at the next call"),
        ("ddp", {"model": "bad_models:frozen"}, "has no parameter that requires a gradient"),
        ("ddp", {"model": "bad_models:too_few_rows", "ranks": 3}, "'x' as shape .2, 5.*tensor of 12 rows"),
        ("ddp", {"model": "bad_models:no_tensor"}, "'x' as list"),
        ("ddp", {"model": "bad_models:fails"}, "ZeroDivisionError: .*by zero .*bad_models.py, line"),
        ("ddp", {"model": "bad_models:other_data"}, "gave other 'x' at the next call"),
    ],
    ids=str,
)
def test_what_cannot_be_tested_is_named(config, options, says):
    with pytest.raises(VerifyError, match=says):
        verify(config, **options)


@pytest.mark.parametrize(
    ("device", "says"),
    [("tpu", "device tpu: there are cpu and cuda"), ("cuda", "device cuda: .*finds no GPU")],
)
def test_a_device_that_is_not_there_is_named(device, says):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(VerifyError, match=says):
        verify("ddp", device=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config", ["ddp", "fsdp2", {"zero_optimization": {"stage": 2}}], ids=str)
def test_on_gpus_that_ranks_share_novograd_passes(config):
    verdict = verify(config, ranks=2 * torch.cuda.device_count(), device="cuda")
    assert verdict.passed, verdict


def test_configuration_that_is_refused_fails_with_its_reason():
    with pytest.raises(RankError, match="elastic_checkpoint"):
        verify(ds(1, elastic_checkpoint=True))


def test_what_was_changed_to_run_here_is_said():
    given = ds(2, {"fp16": {"enabled": True}, "scheduler": {"type": "WarmupLR"}})
    setup, notes = prepare(given, 2, 5, BUILTIN, None, None)
    assert "fp16" not in setup.deepspeed
    assert setup.dtype == torch.float32
    assert len(notes) == 2
    assert "fp16" in given  # the user's own is left alone


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


def test_what_accelerate_config_writes_without_a_json_is_verified(tmp_path):
    path = tmp_path / "default_config.yaml"
    path.write_text(
        "distributed_type: DEEPSPEED\nmixed_precision: 'no'\ndeepspeed_config:\n  zero_stage: 2\n"
        "  gradient_accumulation_steps: 2\n  offload_optimizer_device: cpu\n"
    )
    verdict = verify(path, steps=3)
    assert (verdict.sharding, verdict.optimizer, verdict.passed) == ("deepspeed", "novoscale:NovoGrad", True)


def test_a_config_with_comments_is_read_as_deepspeed_reads_it(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{\n  # the stage\n  "zero_optimization": {"stage": 1}\n}\n')
    assert read(path) == ("deepspeed", {"zero_optimization": {"stage": 1}})
    path.write_text("{ 'zero_optimization'")
    with pytest.raises(VerifyError, match="not a DeepSpeed config in JSON"):
        read(path)
