"""``novoscale doctor``, as a user has it."""

import json

import pytest
from typer.testing import CliRunner

from novoscale.cli import app
from novoscale.memory.planning import plan
from novoscale.memory.rules import elementwise
from novoscale.verify.runs import builtin_model

ADAMW = {
    "train_batch_size": 8,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001}},
}


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


@pytest.fixture
def config(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(ADAMW))
    return tmp_path / "ds.json"


def test_says_what_runs_what_is_wrong_and_the_one_line(config):
    done = run(config)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("FusedAdam will run: optimizer.type is 'AdamW'.")
    assert '"optimizer": {"type": "NovoGrad", "params": {"lr": 0.001, "preset": "adamw"' in done.stdout
    config.write_text(json.dumps({**ADAMW, "optimizer": {"type": "Adamm"}}))
    done = run(config)
    assert done.exit_code == 1
    assert "wrong: optimizer.type: DeepSpeed knows no optimizer 'Adamm'" in done.stdout


def test_writes_the_config_and_says_what_was_left_out(config, tmp_path):
    done = run(config, "--write", tmp_path / "new.json")
    assert done.exit_code == 0, done.stderr
    assert f"Written: {tmp_path / 'new.json'}" in done.stderr
    assert run(tmp_path / "new.json").stdout.startswith("novoscale.NovoGrad will run")
    assert run(config, "--write", config).exit_code == 2


@pytest.mark.parametrize(
    ("section", "sharding"),
    [
        ({"stage": 0}, "ddp"),
        ({"stage": 1}, "zero1"),
        ({"stage": 2}, "zero2"),
        ({"stage": 3}, "zero3"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "offload"),
    ],
)
def test_memory_is_that_of_the_plan(config, section, sharding):
    config.write_text(json.dumps({**ADAMW, "zero_optimization": section}))
    done = run(config, "--model", "builtin", "--ranks", 4, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["memory"]
    expected = plan(builtin_model()[0], elementwise(2), sharding, 4, "bf16-mixed")
    assert (found["sharding"], found["precision"], found["ranks"]) == (sharding, "bf16-mixed", 4)
    assert found["before_plan"]["on_device"] == expected.on_device
    assert found["before_plan"]["state"] == expected.state
    assert found["novograd_plan"]["state"] < 0.3 * expected.state
    assert "GiB with NovoGrad" in run(config, "--model", "builtin", "--ranks", 4).stdout


def test_memory_says_why_it_is_not_planned(config):
    assert "add --ranks" in run(config, "--model", "builtin").stdout
    offload = {"stage": 3, "offload_param": {"device": "cpu"}}
    config.write_text(json.dumps({**ADAMW, "zero_optimization": offload}))
    assert "no plan for stage 3 with offload" in run(config, "--model", "builtin", "--ranks", 2).stdout
    config.write_text(json.dumps(ADAMW))
    done = run(config, "--model", "gpt9", "--ranks", 2)
    assert done.exit_code == 2
    assert "no model 'gpt9'" in done.stderr


def test_json_is_for_machines_and_what_cannot_be_read_is_2(config, tmp_path):
    found = json.loads(run(config, "--json").stdout)
    assert found["passed"] is True
    assert found["runs"]["optimizer"] == "FusedAdam"
    assert found["novograd"]["type"] == "NovoGrad"
    done = run(tmp_path)
    assert done.exit_code == 2
    assert done.stderr.strip() == f"{tmp_path}: a folder; name a file"
