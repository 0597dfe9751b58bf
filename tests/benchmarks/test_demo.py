"""The demonstration runs as the README says, and says what is wrong with bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from patience import patient
from typer.testing import CliRunner

from benchmarks import demo

ROOT = Path(__file__).parent.parent.parent


def run(*arguments):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, "benchmarks/demo.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=patient(280),
    )


@pytest.mark.usefixtures("deepspeed_operation")
def test_trains_three_optimizers_and_writes_what_it_measured(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"{i} squared is {i * i}.\n" for i in range(4000)))
    done = run("--steps", 12, "--text", corpus, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert {"date", "command", "commit", "versions", "machine"} <= report["provenance"].keys()
    runs = report["runs"]
    assert [r["optimizer"] for r in runs.values()] == ["AdamW", "Adafactor", "NovoGrad"]
    for r in runs.values():
        assert len(r["ranks"]) == 2
        assert len(r["train_loss"]) == 12
        assert r["validation_loss"][-1][1] < r["train_loss"][0]
        assert all(rank["peak_rss_bytes"] > 2**27 for rank in r["ranks"])
    held = {name: sum(k["state_bytes"] for k in r["ranks"]) / r["parameters"] for name, r in runs.items()}
    novograd = runs["novograd"]  # int8, factored: on rows of 128 the second moments show
    unsharded = novograd["state_bytes_unsharded"] / novograd["parameters"]
    assert 1 + 2 / 128 < unsharded < 1.13
    assert held == {
        "adamw": pytest.approx(8, rel=1e-3),
        "adafactor": pytest.approx(4, rel=1e-3),
        # Both ranks keep the columns of a matrix that is sharded.
        "novograd": pytest.approx(unsharded, rel=0.01),
    }
    assert runs["adafactor"]["state_bytes_unsharded"] < 0.1 * runs["adafactor"]["parameters"]
    for name in ("demo.png", "demo.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 5000
    assert "AdamW" in done.stdout
    assert "NovoGrad" in done.stdout


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "absent", "there is no such file or folder"),
        (lambda folder: folder, "only 0 bytes of UTF-8 text"),
    ],
)
def test_bad_text_is_named_before_anything_runs(make, says, tmp_path):
    command = typer.Typer()
    command.command()(demo.main)
    done = CliRunner().invoke(command, ["--text", str(make(tmp_path))])
    assert done.exit_code == 2
    assert says in " ".join(done.stdout.split())
    assert "Traceback" not in done.output
