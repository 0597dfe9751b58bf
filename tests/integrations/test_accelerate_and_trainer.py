"""The one line to change for Accelerate and for the Trainer, as the README gives it."""

import json
from pathlib import Path

import pytest
import trainer_ranks

from novoscale import NovoGrad
from novoscale.tools.local_ranks import preload, run_ranks

preload("transformers.trainer", "transformers.models.gpt2.modeling_gpt2")

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def test_accelerate_with_the_shipped_config():
    config = CONFIGS / "zero2_novograd.json"
    lr = json.loads(config.read_text())["optimizer"]["params"]["lr"]
    for result in run_ranks(trainer_ranks.accelerate, 2, str(config), 0.5):
        assert result["optimizer"] == "NovoGrad"
        assert result["lr"] == [lr]
        assert len(result["losses"]) == 16


def test_accelerate_fills_in_auto(tmp_path):
    config = json.loads((CONFIGS / "zero2_novograd.json").read_text())
    config["optimizer"]["params"]["lr"] = "auto"
    (tmp_path / "ds.json").write_text(json.dumps(config))
    for result in run_ranks(trainer_ranks.accelerate, 2, str(tmp_path / "ds.json"), 0.5):
        assert result["lr"] == [0.5]


@pytest.mark.parametrize("betas", [None, "auto"])
def test_trainer_with_a_deepspeed_json(betas, tmp_path):
    params = {"lr": "auto", "weight_decay": "auto", **({"betas": betas} if betas else {})}
    ds = {
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "NovoGrad", "params": params},
    }
    results = run_ranks(trainer_ranks.trainer, 2, str(tmp_path), ds, {})
    for result in results:
        assert result["optimizer"] == "novoscale.optimizer.novograd.NovoGrad"
        assert result["betas"] == [(0.95, 0.98) if betas else (0.9, 0.98)]
        assert result["ranks"] == 2
    assert results[0]["losses"][-1] < results[0]["losses"][0]


def test_ranks_that_accelerate_does_not_count_are_refused():
    told = run_ranks(trainer_ranks.accelerate_before_local_rank, 2, str(CONFIGS / "zero2_novograd.json"))
    for text in told:
        assert text.startswith(
            "Accelerate counts 1 process, DeepSpeed has 2 ranks: every rank would train on"
        )
        assert "LOCAL_RANK" in text


def offloaded(**more):
    return {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        **more,
    }


def test_accelerate_does_not_replace_a_client_novograd_silently(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(offloaded()))
    for told in run_ranks(trainer_ranks.accelerate_client, 2, str(path)):
        assert "would replace NovoGrad by DeepSpeedCPUAdam" in told
        assert '"zero_force_ds_cpu_optimizer": false' in told
    path.write_text(json.dumps(offloaded(zero_force_ds_cpu_optimizer=False)))
    assert run_ranks(trainer_ranks.accelerate_client, 2, str(path)) == ["NovoGrad"] * 2


@pytest.mark.parametrize(
    ("route", "optimizer", "says"),
    [
        (
            "optimizers",
            None,
            "drops optimizers= under DeepSpeed: it would train with the Trainer's own (adamw",
        ),
        ("optimizers", "AdamW", "it would train with AdamW, not NovoGrad"),
        ("class", "AdamW", "it would train with AdamW, not NovoGrad"),
        ("class", None, "would replace NovoGrad by DeepSpeedCPUAdam"),  # and offload
    ],
)
def test_trainer_does_not_replace_novograd_silently(route, optimizer, says, tmp_path):
    more = {"optimizer": {"type": optimizer, "params": {"lr": "auto"}}} if optimizer else {}
    for told in run_ranks(trainer_ranks.trainer_error, 2, str(tmp_path), offloaded(**more), route):
        assert says in told


def test_trainer_without_deepspeed(tmp_path):
    route = {"optimizer_cls_and_kwargs": (NovoGrad, {"lr": 0.02, "weight_decay": 0.01})}
    result = trainer_ranks.trainer(str(tmp_path), None, route)
    assert result["optimizer"] == "novoscale.optimizer.novograd.NovoGrad"
    assert len(result["betas"]) == 2  # decay and no decay
    assert result["losses"][-1] < result["losses"][0]
