"""Where a result comes from is said without the folders of the machine that it comes from."""

import sys

import pytest

from novoscale.provenance import make_command, provenance


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
