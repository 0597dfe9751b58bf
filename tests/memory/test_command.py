"""``novoscale memory`` and ``novoscale plan``, as a user has them."""

import json

import pytest
from typer.testing import CliRunner

from novoscale.cli import app


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_memory_measures_and_writes(tmp_path):
    arguments = [
        "--optimizer",
        "adamw-fused",
        "--optimizer",
        "novograd",
        "--sharding",
        "none",
        "--sharding",
        "ddp",
    ]
    done = run("memory", "builtin", *arguments, "--ranks", 2, "--out", tmp_path / "runs")
    assert done.exit_code == 0, done.stderr
    assert "there is no GPU" in done.stderr or "fewer GPUs" in done.stderr
    assert "DDP, 2 ranks" in done.stdout
    report = json.loads((tmp_path / "runs" / "memory.json").read_text())
    assert {"date", "command", "commit", "versions", "machine"} <= report["provenance"].keys()
    held = [row["state_bytes_per_parameter"] for row in report["rows"]]
    assert held == pytest.approx([8, 16, 4, 8], rel=0.01)  # under DDP every rank has all of it
    for name in ("memory.png", "memory.svg"):
        assert (tmp_path / "runs" / name).stat().st_size > 5000


def test_memory_of_a_config_file_as_json(tmp_path):
    config = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ["--optimizer", "novograd", "--sharding", "none", "--json", "--out", tmp_path / "runs"]
    done = run("memory", tmp_path / "config.json", *options)
    assert done.exit_code == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert row["parameters"] == 64 * 32 + 1024 * 32 + 12 * 32 * 32 + 13 * 32 + 2 * 32


def test_memory_with_released_gradients_says_so_in_table_picture_and_json(tmp_path):
    arguments = ["--release", "--optimizer", "novograd", "--sharding", "none", "--out", tmp_path]
    done = run("memory", "builtin", *arguments)
    assert done.exit_code == 0, done.stderr
    assert "gradients released in the backward pass" in done.stdout
    report = json.loads((tmp_path / "memory.json").read_text())
    (row,) = report["rows"]
    assert report["release"] is row["release"] is True
    assert f"{row['gradient_bytes_per_rank'] / 2**20:.2f}" in done.stdout
    assert "the most at once" in (tmp_path / "memory.svg").read_text()


def test_plan_answers_with_a_sentence_and_a_row_for_each_optimizer():
    done = run("plan", "llama-8b", "--world", 8, "--device-memory", 80)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[0] == (
        "llama-8b (8.03 billion parameters, bf16-mixed) fits on 1 device of 80 GiB "
        "with NovoGrad (adamw, int4) under FSDP2; with torch AdamW (fused) on 2 under FSDP2."
    )
    rows = [line.split("│")[1:4] for line in done.stdout.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["NovoGrad, adamw, int8", "FSDP2", "1"],
        ["NovoGrad, adamw, int4", "FSDP2", "1"],
        ["torch AdamW, fused", "FSDP2", "2"],
    ]
    assert done.stdout.count("(GiB)") == 2
    assert "--all" in done.stdout


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (
            ["--sharding", "none", "--device-memory", 64],
            "int4) in one process; with torch AdamW (fused) it does not.",
        ),
        (
            ["--sharding", "ddp", "--device-memory", 16],
            "does not fit on devices of 16 GiB with NovoGrad (adamw, int4)",
        ),
        (
            ["--optimizer", "lion", "--sharding", "zero3"],
            "fits on 2 devices of 80 GiB with Lion under ZeRO-3.",
        ),
    ],
    ids=["AdamW does not", "neither does", "another optimizer alone"],
)
def test_plan_says_what_does_not_fit_and_what_was_chosen(chosen, says):
    done = run("plan", "llama-8b", *chosen)
    assert done.exit_code == 0, done.stderr
    assert says in done.stdout.splitlines()[0]


def test_plan_of_all_shows_each_part_and_the_smallest_world():
    arguments = ["--world", 64, "--optimizer", "novograd", "--sharding", "zero3", "--device-memory", 80]
    done = run("plan", "llama-70b", *arguments, "--all")
    assert done.exit_code == 0, done.stderr
    assert "70.55 billion parameters on 64 ranks" in done.stdout
    assert "activations" in done.stdout
    assert "12.32" in done.stdout
    assert done.stdout.count("(GiB)") == 7


def test_plan_has_every_optimizer_and_sharding_with_all_and_in_json():
    rows = json.loads(run("plan", "builtin", "--json").stdout)["rows"]
    optimizers = {row["optimizer"] for row in rows}
    assert [row["sharding"] for row in rows] == [c for c in ("zero2", "zero3", "fsdp2") for _ in optimizers]
    shown = run("plan", "builtin", "--all").stdout
    assert sum(line.startswith("│") for line in shown.splitlines()) == len(rows)


def test_the_option_goes_by_its_former_name_too():
    named, formerly = (run("plan", "builtin", option, "zero3").stdout for option in ("--sharding", "--cut"))
    assert "ZeRO-3" in named
    assert formerly == named


def test_plan_of_released_gradients_says_which_rows_it_holds_for():
    chosen = [
        "--optimizer",
        "novograd-int4",
        "--optimizer",
        "adamw-fused",
        "--sharding",
        "none",
        "--sharding",
        "zero2",
    ]
    arguments = ["plan", "gpt2-1m", *chosen, "--precision", "bfloat16", "--release"]
    assert "no: not NovoGrad" in run(*arguments).stdout
    done = run(*arguments, "--all")
    assert done.exit_code == 0, done.stderr
    says = " ".join(done.stdout.split())
    assert "the most gradients that are alive at once" in says
    assert "no: not NovoGrad" in says
    report = json.loads(run(*arguments, "--json").stdout)
    assert report["release"] is True
    rows = {(row["optimizer"], row["sharding"]): row for row in report["rows"]}
    assert [row["why_not_released"] for row in rows.values()] == [
        *(None, "not NovoGrad"),
        *("not under ZeRO-2", "not NovoGrad"),
    ]
    assert [row["released"] for row in rows.values()] == [True, False, False, False]
    released, adamw = rows["NovoGrad, int4", "none"], rows["torch AdamW, fused", "none"]
    assert released["gradients"] < adamw["gradients"] / 2
    assert released["on_device"] == released["parameters"] + released["gradients"] + released["state"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["memory", "--optimizer", "nvograd"],
            "no optimizer 'nvograd'; there are: novograd, novograd-bfloat16,",
        ),
        (["plan", "llama-8b", "--optimizer", "adam"], "no optimizer 'adam'; there are: novograd,"),
        (["memory", "lama"], "no model 'lama'; did you mean: llama"),
        (
            ["memory", "--sharding", "zero4"],
            "no sharding 'zero4'; there are: none, ddp, zero1, zero2, zero3, offload, fsdp2",
        ),
        (["plan", "llama-8b", "--precision", "fp16"], "no precision 'fp16'; there are: float32, bf16-mixed"),
        (["plan", "llama-8b", "--optimizer", "gefen-x"], "gefen-x: no rule gives its state"),
        (["plan", "broken.json"], "broken.json: not a transformers config that can be built"),
        (["plan", "t5.json"], "transformers cannot build a causal language model"),
        (["plan", "llama-8b", "--world", "0"], "--world"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_named_and_ends_with_code_2(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text('{"vocab_size": ')
    (tmp_path / "t5.json").write_text('{"model_type": "t5"}')
    done = run(*arguments)
    assert done.exit_code == 2
    assert says in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
