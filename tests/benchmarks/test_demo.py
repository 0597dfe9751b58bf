"""The demonstration runs as the README says, and says what is wrong with bad input."""

import json
import os
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from benchmarks import demo
from novoscale import NovoGrad

ROOT = Path(__file__).parent.parent.parent
# Bytes of state per parameter, between these. NovoGrad in int8: on rows of 128 the factored moments show.
UNSHARDED = {"adamw": (7.99, 8.01), "adafactor": (0, 0.1), "novograd": (1 + 2 / 128, 1.13)}


def invoke(*arguments):
    command = typer.Typer()
    command.command()(demo.main)
    return CliRunner().invoke(command, [*map(str, arguments)])


@pytest.mark.usefixtures("deepspeed_operation")
def test_launches_an_optimizer_and_writes_what_it_measured(tmp_path, monkeypatch):
    # A launch starts three Pythons with DeepSpeed, half a minute of a core. All three are launched alike;
    # test_every_optimizer_has_a_config_that_names_it looks at what differs.
    monkeypatch.setattr(demo, "OPTIMIZERS", {"novograd": NovoGrad})
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"{i} squared is {i * i}.\n" for i in range(4000)))
    done = invoke("--steps", 12, "--text", corpus, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert {"date", "command", "commit", "versions", "machine"} <= report["provenance"].keys()
    (run,) = report["runs"].values()
    assert run["optimizer"] == "NovoGrad"
    assert len(run["ranks"]) == 2
    assert len(run["train_loss"]) == 12
    assert run["validation_loss"][-1][1] < run["train_loss"][0]
    assert all(rank["peak_rss_bytes"] > 2**27 for rank in run["ranks"])
    unsharded = run["state_bytes_unsharded"] / run["parameters"]
    # Both ranks keep the columns of a matrix that is sharded.
    held = sum(rank["state_bytes"] for rank in run["ranks"]) / run["parameters"]
    assert held == pytest.approx(unsharded, rel=0.01)
    for name in ("demo.png", "demo.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 5000
    assert "NovoGrad" in done.output


@pytest.mark.parametrize("name", demo.OPTIMIZERS)
def test_every_optimizer_has_a_config_that_names_it(name):
    launcher = yaml.safe_load((ROOT / "configs" / f"accelerate_zero2_{name}.yaml").read_text())
    config = json.loads((ROOT / launcher["deepspeed_config"]["deepspeed_config_file"]).read_text())
    assert config["optimizer"]["type"].lower() == name
    assert config["zero_optimization"]["stage"] == 2
    parameters = sum(p.numel() for p in demo.gpt2().parameters())
    least, most = UNSHARDED[name]
    assert least < demo.unsharded_state_bytes(name, config["optimizer"]["params"]) / parameters < most


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "absent", "there is no such file or folder"),
        (lambda folder: folder, "only 0 bytes of UTF-8 text"),
    ],
)
def test_bad_text_is_named_before_anything_runs(make, says, tmp_path):
    done = invoke("--text", make(tmp_path))
    assert done.exit_code == 2
    assert says in " ".join(done.stdout.split())
    assert "Traceback" not in done.output
