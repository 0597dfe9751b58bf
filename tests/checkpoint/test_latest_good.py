"""The last complete checkpoint of a folder: DeepSpeed's, torch.distributed.checkpoint's, torch.save's."""

import json
import os
import pickle
import shutil
import struct
import zipfile

import pytest
import tools_ranks
import torch
from kept_ranks import run_ranks
from typer.testing import CliRunner
from zero_ranks import config

from novoscale.checkpoint import pickle_scan
from novoscale.cli import app

BF16_OPTIMIZER = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
CASES = {
    "stage 0": (0, {}),
    "stage 1": (1, {}),
    "stage 2": (2, {}),
    "stage 3": (3, {}),
    "BF16_Optimizer": (1, BF16_OPTIMIZER),
}


pytestmark = pytest.mark.usefixtures("deepspeed_operation")


def latest_good(folder, *options):
    done = CliRunner().invoke(app, ["latest-good", str(folder), *options])
    return done.exit_code, done.stdout.strip(), done.stderr


@pytest.fixture(scope="module", params=CASES)
def three(request, tmp_path_factory):
    """Checkpoints of steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("checkpoints")
    stage, more = CASES[request.param]
    run_ranks(tools_ranks.saved, 2, {**config(stage, 2), **more}, str(folder), 3)
    return folder


@pytest.fixture
def folder(three, tmp_path):
    return shutil.copytree(three, tmp_path / "copy")  # with the times of its files


def test_last_one_is_complete(folder):
    assert latest_good(folder) == (0, "global_step3", "")
    assert latest_good(folder, "--all") == (0, "global_step3", "")


def test_any_file_that_is_missing_is_named(folder):
    for file in sorted((folder / "global_step3").iterdir()):
        kept = file.read_bytes()
        file.unlink()
        code, good, said = latest_good(folder)
        assert (code, good) == (0, "global_step2")
        left = list((folder / "global_step3").iterdir())
        if any("model_states" in other.name for other in left):
            assert f"{file.name} is missing" in said
        else:
            assert ("says how many ranks there were" if left else "no file of a checkpoint") in said
        assert "latest names global_step3. Load global_step2 by its name" in said
        file.write_bytes(kept)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999], ids=str)
def test_any_file_that_is_cut_off_is_named(folder, kept):
    for file in sorted((folder / "global_step3").iterdir()):
        whole, times = file.read_bytes(), os.stat(file)
        file.write_bytes(whole[: int(len(whole) * kept)])
        code, good, said = latest_good(folder)
        assert (code, good) == (0, "global_step2")
        assert f"global_step3: {file.name} is truncated" in said
        file.write_bytes(whole)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_byte_that_has_changed(folder):
    file = max((folder / "global_step3").iterdir(), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:  # between its members there is room that nobody reads
        member = max(archive.infolist(), key=lambda info: info.file_size)
    header = struct.unpack_from("<HH", data, member.header_offset + 26)
    data[member.header_offset + 30 + sum(header) + member.file_size // 2] ^= 1
    file.write_bytes(data)
    code, good, said = latest_good(folder)
    assert (code, good) == (0, "global_step2")
    assert f"global_step3: {file.name} is damaged" in said or f"{file.name} is truncated" in said


def test_none_is_complete(folder):
    for step in (1, 2, 3):
        next((folder / f"global_step{step}").glob("*model_states.pt")).write_bytes(b"")
    code, good, _ = latest_good(folder, "--json")
    assert code == 1
    found = json.loads(good)
    assert found["latest_good"] is None
    assert list(found["problems"]) == ["global_step3", "global_step2", "global_step1"]
    assert all(found["problems"].values())
    assert latest_good(folder)[0] == 1
    assert "no checkpoint is complete" in latest_good(folder)[2]


def test_folder_of_a_tag_without_a_file(folder):
    (folder / "global_step4").mkdir()
    code, good, said = latest_good(folder)
    assert (code, good) == (0, "global_step3")
    assert "global_step4: no file of a checkpoint is there" in said


def test_folders_of_the_trainer(folder, tmp_path):
    """It puts one of DeepSpeed's folders into each of its own."""
    for step in (1, 2):
        made = tmp_path / "trainer" / f"checkpoint-{step}"
        shutil.copytree(folder / f"global_step{step}", made / f"global_step{step}")
        (made / "latest").write_text(f"global_step{step}")
        (made / "trainer_state.json").write_text("{}")
    (tmp_path / "trainer" / "runs").mkdir()
    (tmp_path / "trainer" / "runs" / "events").write_text("no checkpoint")
    assert latest_good(tmp_path / "trainer")[:2] == (0, "checkpoint-2")
    next((tmp_path / "trainer" / "checkpoint-2").rglob("*.pt")).write_bytes(b"PK")
    code, good, said = latest_good(tmp_path / "trainer")
    assert (code, good) == (0, "checkpoint-1")
    assert "checkpoint-2: global_step2: " in said


def test_distributed_checkpoints(tmp_path):
    run_ranks(tools_ranks.saved_distributed, 2, str(tmp_path), 3)
    assert latest_good(tmp_path) == (0, "step3", "")
    for name, says in (
        ("__1_0.distcp", "is missing"),
        (".metadata", "is missing, which is written when all"),
    ):
        file = tmp_path / "step3" / name
        kept = file.read_bytes()
        file.unlink()
        code, good, said = latest_good(tmp_path)
        assert (code, good) == (0, "step2")
        assert f"step3: {name} {says}" in said
        file.write_bytes(kept)
    file, kept = tmp_path / "step3" / "__0_0.distcp", (tmp_path / "step3" / "__0_0.distcp").read_bytes()
    file.write_bytes(kept[:-1])
    assert f"__0_0.distcp has {len(kept) - 1:,} bytes of {len(kept):,}" in latest_good(tmp_path)[2]
    file.write_bytes(kept[: len(kept) // 2] + bytes(len(kept) - len(kept) // 2))
    assert "step3: __0_0.distcp at byte" in latest_good(tmp_path)[2]


def test_files_of_torch_save(tmp_path):
    for step in (9, 10):
        torch.save({"step": step, "w": torch.ones(99)}, tmp_path / f"step{step}.pt")
        os.utime(tmp_path / f"step{step}.pt", (step, step))
    assert latest_good(tmp_path) == (0, "step10.pt", "")
    (tmp_path / "step10.pt").write_bytes((tmp_path / "step10.pt").read_bytes()[:-3])
    os.utime(tmp_path / "step10.pt", (10, 10))
    assert latest_good(tmp_path)[:2] == (0, "step9.pt")


def test_no_folder_and_no_checkpoint(tmp_path):
    assert latest_good(tmp_path / "none")[0] == 2
    code, good, said = latest_good(tmp_path)
    assert (code, good) == (1, "")
    assert "there is no checkpoint" in said


class Runs:
    def __reduce__(self):
        return (os.mkdir, ("it-ran",))


def test_nothing_that_a_pickle_names_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open(tmp_path / "pickle", "wb") as file:
        pickle.dump({"dp_world_size": 3, "other": [Runs(), torch.Size([2])]}, file)
    with open(tmp_path / "pickle", "rb") as file:
        assert pickle_scan.read(file)["dp_world_size"] == 3
    assert not (tmp_path / "it-ran").exists()
