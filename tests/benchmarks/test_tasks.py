"""The tasks: the protocol asks for what it says, each task trains, results are kept and shown."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import typer
from patience import patient

from benchmarks.tasks import bible, data, report, speech
from benchmarks.tasks.__main__ import Store
from benchmarks.tasks.protocol import (
    FORMS,
    LARGE_BATCH,
    METHODS,
    MOST_RATES,
    MUON,
    ROBUSTNESS,
    Results,
    Run,
    missing,
)
from benchmarks.tasks.task import samples
from benchmarks.tasks.training import TASKS, load, train
from benchmarks.trials import make_optimizer, rates

ROOT = Path(__file__).parent.parent.parent


def finished_protocol(tasks, loss):
    """All runs that the protocol asks for, if these are their losses."""
    rows = []
    while runs := list(missing(Results(rows), tasks, list(METHODS))):
        rows += [{**run._asdict(), "loss": loss(run)} for run in runs[:2]]
    return rows


def distance_from(best):
    return lambda run: abs(math.log2(run.lr / best)) + 0.01 * run.seed - (0.1 if run.weight_decay else 0)


@pytest.mark.parametrize(("best", "tried"), [(1.0, 5), (4.0, 6), (0.5, 5), (1e-2, 11)])
def test_rates_are_added_until_two_that_are_worse_are_on_either_side(best, tried):
    known = {}
    while missing_rates := [lr for lr in rates((0.5, 1.0, 2.0), known.get, 2, MOST_RATES) if lr not in known]:
        known.update({lr: abs(math.log2(lr / best)) for lr in missing_rates})
    found = rates((0.5, 1.0, 2.0), known.get, 2, MOST_RATES)
    chosen = min(known, key=lambda lr: known[lr])
    assert len(found) == tried
    assert found.index(chosen) in range(2, len(found) - 2)


def test_a_search_ends_when_everything_diverges():
    assert len(rates((0.5, 1.0, 2.0), lambda lr: math.inf, 2, MOST_RATES)) < 20


def test_every_optimizer_has_the_same_search_and_formats_have_the_rate_of_another():
    rows = finished_protocol(["images"], distance_from(0.004))
    best = {row["method"]: (row["lr"], row["weight_decay"]) for row in rows if row["seed"] == 2}
    near = {
        m: 2 ** round(math.log2(0.004 / how.rate)) * how.rate for m, how in METHODS.items() if not how.like
    }
    assert best == {m: (near[how.like or m], METHODS[how.like or m].decay) for m, how in METHODS.items()}
    decays = Counter(
        row["method"] for row in rows if row["weight_decay"] and not row["seed"] and not row["variant"]
    )
    assert {decays[m] for m, how in METHODS.items() if not how.like} == {3}
    seeds = Counter(row["method"] for row in rows if row["seed"])
    assert seeds == {m: how.seeds - 1 for m, how in METHODS.items()}
    robust = {row["method"] for row in rows if row["variant"] in ROBUSTNESS}
    assert robust == {row["method"] for row in rows if row["variant"] == LARGE_BATCH}
    assert robust == {m for m, how in METHODS.items() if how.robust}


def test_the_long_run_has_the_rate_of_the_language_task_and_no_search():
    rows = finished_protocol(["language-bpe", "long"], distance_from(0.004))
    long = [row for row in rows if row["task"] == "long"]
    assert {row["method"] for row in long} == {"AdamW", *FORMS, *MUON}
    assert {(row["lr"], row["seed"]) for row in long} == {(0.004, 0)}


def test_a_run_that_diverged_is_the_worst():
    rows = finished_protocol(["images"], lambda run: None if run.lr == 0.1 else distance_from(0.2)(run))
    assert Results(rows).best("images", "SGD").lr == 0.2


@pytest.mark.parametrize(("total", "count"), [(10, 3), (7, 7), (5, 12)])
def test_each_epoch_has_each_sample_once(total, count):
    steps = [samples(total, count, step, seed=3) for step in range(total)]
    assert all(len(chosen) == count for chosen in steps)
    assert torch.cat(steps).bincount().tolist() == [count] * total


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("...to mute, or un-mute!", "to mute or un mute"),
        ("à l\u2019échec", "a l'echec"),
        ("at [@]", ""),
        ("Dial 500", ""),
    ],
)
def test_a_text_says_what_is_heard_or_is_left_out(said, text):
    assert speech.normalised(said) == text


def test_characters_that_are_wrong_are_counted():
    assert [speech.distance(list(b"kitten"), list(other)) for other in (b"sitting", b"kitten", b"")] == [
        3,
        0,
        6,
    ]
    likeliest = torch.tensor([0, 2, 2, 0, 2, 1, 0])
    assert speech.greedy(torch.eye(3)[likeliest]) == [2, 2, 1]


@pytest.fixture
def small_data(monkeypatch, tmp_path):
    """A few made-up verses, sounds and digits in the place of the real ones."""
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    (tmp_path / "prepared").mkdir()
    words = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "e", "ing", "ow", "ur")]
    generator = torch.Generator().manual_seed(0)
    book = ["Mark", "Genesis"]

    def verse(i):
        chosen = [words[k] for k in torch.randint(len(words), (12,), generator=generator).tolist()]
        return (book[i % 2], " ".join(chosen), " ".join(chosen[::-1]))

    torch.save([verse(i) for i in range(400)], tmp_path / "prepared" / "verses.pt")
    sounds = [(torch.randn(80 + i, speech.MELS, generator=generator), "ab c"[: 1 + i % 4]) for i in range(64)]
    torch.save(sounds, tmp_path / "prepared" / "speech.pt")
    digits = (torch.randn(200, 1, 28, 28, generator=generator), torch.arange(200) % 10)
    torch.save(digits, tmp_path / "prepared" / "digits.pt")
    forget()
    monkeypatch.setattr(TASKS["fine-tuning"], "pretraining_steps", 2)
    monkeypatch.setattr(TASKS["long"], "windows", 64)
    yield
    forget()


def forget():
    """What was read before."""
    for cached in (bible.verses, bible.tokenizer, load):
        cached.cache_clear()


@pytest.mark.usefixtures("small_data")
@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_and_measures_what_it_says_and_is_the_same_each_time(name):
    run = Run(name, "NovoGrad, adamw, int4", 0.01)
    row, again = train(run, 3), train(run, 3)
    assert set(TASKS[name].measures) <= set(row)
    assert all(
        math.isfinite(row[measure]) for measure in TASKS[name].measures if not measure.startswith("rare")
    )
    assert [step for step, _ in row["curve"]] == [0, 1, 2, 3]
    assert (row["loss"], row["curve"]) == (again["loss"], again["curve"])
    assert row["loss"] != train(run._replace(seed=1), 3)["loss"]
    # Tensors of fewer than 4,096 elements, as all of LoRA's, keep a first moment in float32.
    assert 0.5 < row["state_bytes"] / row["parameters"] < (5 if name == "lora" else 2)


@pytest.mark.usefixtures("small_data")
def test_lora_trains_little_and_begins_where_fine_tuning_begins():
    rows = {name: train(Run(name, "AdamW", 0.001), 1) for name in ("fine-tuning", "lora")}
    assert rows["lora"]["parameters"] < rows["fine-tuning"]["parameters"] / 5
    begin, other = (row["curve"][0][1] for row in rows.values())
    assert begin == pytest.approx(other, rel=1e-4)


@pytest.mark.usefixtures("small_data")
@pytest.mark.parametrize("variant", [*ROBUSTNESS, LARGE_BATCH])
def test_a_variant_is_another_training(variant):
    run = Run("images", "SGD", 0.05)
    row, plain = train(run._replace(variant=variant), 64), train(run, 64)
    assert row["steps"] == (8 if variant == LARGE_BATCH else 64)
    assert row["loss"] != plain["loss"]


def test_a_training_that_diverges_ends_there_and_says_so():
    row = train(Run("language-bytes", "SGD", 1e30), 40)
    assert row["loss"] is None
    assert row["curve"][-1][1] is None or len(row["curve"]) < 11


@pytest.mark.parametrize("method", METHODS)
def test_every_optimizer_can_be_made_and_decays_matrices_only(method):
    kind, options = METHODS[method].kind, METHODS[method].options
    if kind in ("AdamMini", "AdamW8bit", "Lion"):
        pytest.importorskip("bitsandbytes" if kind == "AdamW8bit" else "pytorch_optimizer")
    groups = make_optimizer(kind, torch.nn.Linear(4, 4), 0.1, lr=0.01, **options).param_groups
    if kind != "AdamMini":  # which takes the model, and decides for itself
        decays = {p.ndim: group["weight_decay"] for group in groups for p in group["params"]}
        assert decays == {2: 0.1, 1: 0.0}


@pytest.mark.usefixtures("small_data")
@pytest.mark.parametrize("task", ["translation", "language-bytes"])
def test_adam_mini_goes_by_the_heads_of_the_model(task):
    pytest.importorskip("pytorch_optimizer")
    assert train(Run(task, "Adam-mini", 0.001), 20)["loss"] < 10


def test_data_that_is_not_there_is_named_with_the_command_that_fetches_it(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    with pytest.raises(data.MissingDataError, match=r"no debian/usr in .*; run: make tasks-data"):
        data.path("debian", "usr")


def rows_of(task, losses):
    """Made-up results: a run of every method with seeds."""
    rows = finished_protocol([task], lambda run: losses[run.method] + distance_from(0.004)(run) / 100)
    about = {"steps": 100, "parameters": 10, "state_bytes": 20, "step_ms": 1.0, "training": [], "error": 1.0}
    return [
        {**row, **about, "curve": [[0, 9.0], [50, row["loss"] + 0.5], [100, row["loss"]]]} for row in rows
    ]


def test_tables_tell_the_mean_of_the_seeds_and_the_distance_from_adamw_and_what_is_missing():
    losses = dict.fromkeys(METHODS, 3.0) | {"SGD": 2.0, "NAdamW": 4.0}
    rows = [row for row in rows_of("images", losses) if row["method"] != "Lion"]
    table, *others = report.tables(rows)
    cells = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert "Lion" not in cells
    assert table.note == "Not measured: Lion."
    assert cells["AdamW"]["from AdamW's"] == "+0"
    assert cells["NAdamW"]["from AdamW's"] == "+1"
    assert cells["SGD"]["steps to AdamW's loss"] == "50 %"
    assert cells["NAdamW"]["steps to AdamW's loss"] == "not reached"
    assert cells["AdamW"]["lowest to highest (seeds)"].endswith("(5)")
    assert cells["AdamW"]["steps to AdamW's loss"] == "100 %"
    assert cells["SGD"]["state, bytes per parameter"] == "2.00"
    assert len(others) == 2 + len(ROBUSTNESS)


def test_a_page_gets_the_tables_between_its_marks_and_keeps_the_rest(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    rows = rows_of("images", dict.fromkeys(METHODS, 2.0))
    for _ in range(2):
        report.write(rows, page)
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "old" not in text
        assert text.count("### ") == len(list(report.tables(rows)))


def test_the_quick_run_trains_what_is_missing_and_nothing_else(tmp_path):
    rows = finished_protocol(["language-bytes"], distance_from(0.004))
    rows = [row for row in rows if not row["variant"]]  # of which it has none
    about = {"steps": 1, "parameters": 10, "state_bytes": 20, "step_ms": 1.0, "curve": [[0, 5.0], [1, 4.0]]}
    rows = [{**row, **about} for row in rows]
    rows.remove(next(row for row in rows if row["method"] == "NovoGrad, adamw" and row["seed"] == 2))
    file = tmp_path / "language-bytes.json"
    file.write_text(json.dumps({"steps": 1, "runs": rows}))
    command = [sys.executable, "-m", "benchmarks.tasks", "--quick", "--steps", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patient(240))
    assert done.returncode == 0, done.stderr
    stored = json.loads(file.read_text())
    assert len(stored["runs"]) == len(rows) + 1
    trained = stored["runs"][-1]
    run = Run(*(trained[name] for name in Run._fields))
    assert run == Run("language-bytes", "NovoGrad, adamw", 0.004, 0.1, 2)
    assert trained["loss"] == train(run, 1)["loss"]
    assert stored["provenance"]["command"].startswith("make tasks")
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png", ".svg"}


def test_results_of_another_number_of_steps_are_not_mixed(tmp_path):
    (tmp_path / "images.json").write_text(json.dumps({"steps": 1, "runs": []}))
    with pytest.raises(typer.BadParameter, match="images was trained for 1 steps; use another --out"):
        Store(tmp_path)
