"""Ranks that raise, die or hang: one error with what the rank has said, and nothing is left."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import failing_ranks
import pytest
import torch

from novoscale.tools.local_ranks import RankError, Ranks, _on_gpu, run_ranks


def left(folder):
    """The processes that have written their number into a folder and still run, after some seconds."""

    def runs(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError:
            return False

    end = time.monotonic() + 5  # one that is killed takes a moment
    while (running := [pid for pid in os.listdir(folder) if runs(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    return running


def buffers(folder):
    """The files in shared memory that those processes have made and that are still there."""
    names = [file.read_text() for file in folder.iterdir()]
    assert any(names)
    return [name for name in names if name and Path("/dev/shm", name).exists()]


def until(holds, seconds):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


LAST_LINES = r"\| the last lines of rank 1:\n\| the last words of rank 1"


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raises", r"rank 1 of 3:\nTraceback[\s\S]*ValueError: no way to shard this"),
        ("exits", rf"rank 1 of 3 died: exit code 3\n{LAST_LINES}"),
        ("is killed", rf"rank 1 of 3 died: SIGKILL\n{LAST_LINES}"),
        (
            "hangs",
            r"ranks \[0, 1, 2\] of 3 did not end within 8 s\n"
            r"\| rank 0 is in \(innermost first\)\n[\s\S]*in barrier\n[\s\S]*"
            r"\| rank 1 is in \(innermost first\)\n\| File .* in hangs\n[\s\S]*" + LAST_LINES,
        ),
    ],
    ids=["raises", "exits", "is killed", "hangs"],
)
def test_one_error_with_the_last_lines_of_the_rank_and_nothing_left(how, says, tmp_path):
    start = time.monotonic()
    with pytest.raises(RankError) as error:
        run_ranks(failing_ranks.fails, 3, how, str(tmp_path), timeout=8 if how == "hangs" else 200)
    assert time.monotonic() - start < 60
    assert re.match(says, str(error.value))
    assert len(re.findall(r"^rank \d+ of", str(error.value), re.MULTILINE)) == (0 if how == "hangs" else 1)
    assert len(os.listdir(tmp_path)) >= 2  # rank 1, and what it has started
    assert left(tmp_path) == []
    assert buffers(tmp_path) == []


def test_a_caller_that_is_killed_leaves_no_rank(tmp_path):
    caller = subprocess.Popen([sys.executable, failing_ranks.__file__, str(tmp_path)])
    until(lambda: len(os.listdir(tmp_path)) == 3, 100)  # two ranks, and what one of them has started
    caller.kill()
    caller.wait()
    until(lambda: left(tmp_path) == [], 20)
    assert buffers(tmp_path) == []


def test_ranks_stay_for_many_calls_with_the_environment_they_had():
    with Ranks(2) as ranks:
        first, second = (ranks.run(failing_ranks.identity) for _ in range(2))
        assert [pid for pid, _ in first] == [pid for pid, _ in second]
        assert [calls for _, calls in first + second] == [1, 1, 2, 2]
        for _ in range(2):
            assert ranks.run(failing_ranks.changes_its_environment) == ["absent"] * 2
    with pytest.raises(ValueError, match="closed"):
        ranks.run(failing_ranks.identity)


def test_a_call_that_fails_ends_the_ranks(tmp_path):
    ranks = Ranks(2)
    with pytest.raises(RankError, match="no way to shard this"):
        ranks.run(failing_ranks.fails, "raises", str(tmp_path))
    assert ranks.closed
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("gpus", "world_size", "expected"),
    [
        (4, 4, {}),
        (2, 4, {"LOCAL_RANK": "1", "NCCL_HOSTID": "rank3", "NCCL_SOCKET_IFNAME": "lo"}),
    ],
)
def test_ranks_that_outnumber_the_gpus_share_them_as_if_on_different_hosts(
    monkeypatch, gpus, world_size, expected
):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert _on_gpu(3, world_size) == expected
    assert chosen == [3 % gpus]
