"""Where a result comes from: the code, and the command without the folders of the machine."""

import subprocess
import sys

import pytest

from novoscale.tools import provenance as module
from novoscale.tools.provenance import make_command, provenance


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "make chip"),
        (["--only", "bits"], 'make chip ARGS="--only bits"'),
        (["--out", "/somewhere/else/out"], 'make chip ARGS="--out out"'),
        (["--out=/somewhere/else/out", "a b"], "make chip ARGS=\"--out=out 'a b'\""),
        (["--text", "corpora/mine"], 'make chip ARGS="--text corpora/mine"'),
    ],
)
def test_a_command_names_no_folder_of_this_machine(monkeypatch, arguments, said):
    monkeypatch.setattr(sys, "argv", ["benchmarks/chip.py", *arguments])
    assert make_command("chip") == said
    assert "/somewhere" not in provenance()["command"]


CODE, RESULT = "novoscale/tools/provenance.py", "benchmarks/results/quality.json"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A clean repository that novoscale seems to lie in."""

    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    for name in (CODE, RESULT, "benchmarks/quality.py", "docs/quality.md", "novoscale/docs/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("committed\n")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--no-gpg-sign", "--message", "all")
    monkeypatch.setattr(module, "__file__", str(tmp_path / CODE))
    return tmp_path, git("rev-parse", "--short=12", "HEAD").strip()


@pytest.mark.parametrize("changed", [(), (RESULT,), (RESULT, "docs/quality.md")], ids=str)
def test_a_result_does_not_make_the_next_one_come_from_modified_code(repository, changed):
    folder, commit = repository
    for name in changed:
        (folder / name).write_text("another\n")
    assert provenance()["commit"] == commit


@pytest.mark.parametrize("changed", [CODE, "benchmarks/quality.py", "novoscale/docs/x.py"])
def test_code_that_differs_from_its_commit_is_said_to_be_modified(repository, changed):
    folder, commit = repository
    (folder / changed).write_text("another\n")
    (folder / RESULT).write_text("another\n")
    assert provenance()["commit"] == f"{commit} (modified)"


def test_code_outside_of_its_repository_has_no_commit(repository, monkeypatch):
    monkeypatch.setattr(module, "__file__", str(repository[0] / "novoscale" / "tools" / "installed.py"))
    assert provenance()["commit"] == "unknown"
