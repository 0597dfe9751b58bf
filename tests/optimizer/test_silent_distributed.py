"""Faults of several ranks that would be silent: what is said, and what is promised no more."""

from pathlib import Path

import silent_ranks
from kept_ranks import run_ranks

RELIABILITY = Path(__file__).parent.parent.parent / "docs" / "reliability.md"


def test_parameters_that_are_thawed_have_the_bits_of_one_process():
    for same in run_ranks(silent_ranks.thawed, 2):
        assert all(same.values()), same


def test_an_optimizer_that_was_made_before_fully_shard_says_that_nothing_is_trained():
    for said in run_ranks(silent_ranks.made_before_fully_shard, 2):
        (line,) = said
        assert "none of its 3 parameters has a gradient" in line


def test_ranks_of_ddp_are_not_compared_and_the_docs_say_so():
    assert run_ranks(silent_ranks.other_options_under_ddp, 2) == [True, True]
    (promise,) = [
        line for line in RELIABILITY.read_text().splitlines() if line.startswith("| ranks with other options")
    ]
    assert "DDP" in promise
