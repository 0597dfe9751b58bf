"""DeepSpeed's operation is built once; a lock that a killed build has left is found, and never waited for."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from novoscale.tools import deepspeed_operation as operation
from novoscale.tools.local_ranks import RankError

pytestmark = pytest.mark.usefixtures("deepspeed_operation")

BUILD = "from novoscale.tools import deepspeed_operation; deepspeed_operation.build()"


@pytest.fixture
def built(monkeypatch, tmp_path):
    """A copy of what is built, in a folder of the user's choice."""
    folder = tmp_path / "chosen" / operation.NAME
    shutil.copytree(Path(os.environ[operation.FOLDER], operation.NAME), folder)
    monkeypatch.setenv(operation.FOLDER, str(folder.parent))
    return folder


def test_what_is_built_is_not_built_again(built):
    library = built / f"{operation.NAME}.so"
    before = library.stat()
    operation.build(timeout=100)
    assert (library.stat().st_ino, library.stat().st_mtime) == (before.st_ino, before.st_mtime)


def test_a_lock_that_was_left_in_a_folder_of_the_users_choice_is_named(built):
    (built / "lock").touch()
    start = time.monotonic()
    with pytest.raises(RankError, match=f"LockError: {built}/lock was left by a build .* delete it") as error:
        operation.build(timeout=100)
    assert time.monotonic() - start < 60
    assert len(error.value.brief().splitlines()) == 1
    (built / "lock").unlink()
    operation.build(timeout=100)


@pytest.mark.parametrize("name", ["lock", "novoscale.lock"])
def test_a_lock_that_is_held_for_too_long_is_named_with_the_process(built, name):
    hold = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print(flush=True); time.sleep(1000)"
    )
    command = [sys.executable, "-c", hold, str(built / name)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        try:
            with pytest.raises(RankError, match=f"{built}/{name} is still held .* by process {holder.pid},"):
                operation.build(timeout=1)
        finally:
            holder.kill()


@pytest.mark.parametrize("all_at_once", [False, True], ids=["the caller", "all at once"])
def test_a_build_that_is_killed_does_not_hang_the_next_one(all_at_once, built, monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase " $* " in *" -c "*) sleep 1000;; *) exec c++ "$@";; esac\n')
    compiler.chmod(0o755)
    monkeypatch.delenv(operation.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lock = operation.own_folder() / operation.NAME / "lock"
    environment = {**os.environ, "CXX": str(compiler)}
    killed = subprocess.Popen([sys.executable, "-c", BUILD], env=environment, start_new_session=True)
    until(lambda: lock.exists() and len(at_work(lock.parent)) > 2, 200)
    if all_at_once:  # the process that builds can release no lock and end no compiler
        for pid in [*operation._holders(lock), *at_work(lock.parent)]:
            os.kill(pid, signal.SIGKILL)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    until(lambda: not at_work(lock.parent), 20)
    assert lock.exists() or not all_at_once
    # Not to compile here for a minute: what the next build would find half done is there.
    shutil.copytree(built, lock.parent, dirs_exist_ok=True)
    start = time.monotonic()
    operation.build(timeout=100)
    assert time.monotonic() - start < 60
    assert not lock.exists()


def at_work(folder):
    """What builds in a folder: ninja, and the compilers that it has started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.path.samefile(process / "cwd", folder):
                found.append(int(process.name))
    return found


def until(holds, seconds):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
