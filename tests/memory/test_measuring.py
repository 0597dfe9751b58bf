"""A cell is measured, or says why not; an optimizer that a sharding changes is marked."""

import pytest

from novoscale.memory import measuring
from novoscale.memory.comparison import compare
from novoscale.memory.measuring import Job, measure
from novoscale.memory.models import MemoryToolError
from novoscale.memory.optimizers import CANDIDATES
from novoscale.tools.local_ranks import RankError


def test_phases_of_two_steps_and_accounts_of_every_rank():
    found = measure(Job("builtin", "NovoGrad", "zero2", 2))
    assert len(found.accounts) == len(found.phases) == 2
    for phases in found.phases:
        assert [p.name for p in phases] == [
            "model",
            *("warm-up forward", "warm-up backward", "warm-up step"),
            *("forward", "backward", "step"),
        ]
    assert found.state_per_parameter == pytest.approx(4, rel=0.01)
    assert found.to_dict()["transient_bytes"] < 0.1 * found.parameters  # of NovoGrad, not of its wrapper


def test_an_optimizer_that_a_sharding_changes_is_marked_by_its_update():
    rows = list(compare("builtin", ["NovoGrad", "torch Adafactor"], [("none", 1), ("zero2", 2)], "float32"))
    assert [(r["optimizer"], r["sharding"], r["ranks"]) for r in rows] == [
        ("NovoGrad", "none", 1),
        ("NovoGrad", "zero2", 2),
        ("torch Adafactor", "none", 1),
        ("torch Adafactor", "zero2", 2),
    ]
    novograd, adafactor = rows[1], rows[3]
    assert novograd["same_training"] is True
    assert novograd["deviation"] < 1e-4
    assert adafactor["same_training"] is False
    assert adafactor["deviation"] > 0.2
    # Silently unfactored: a flat partition has no rows and columns.
    assert rows[2]["state_bytes_per_parameter"] < 0.3
    assert adafactor["state_bytes_per_parameter"] == pytest.approx(4, rel=0.01)


def test_what_cannot_be_measured_says_why():
    apex, fsdp2 = compare("builtin", ["Apex FusedAdam"], [("none", 1), ("fsdp2", 2)], "float32")
    assert apex["why"] == fsdp2["why"] == "not installed: pip install apex"
    with pytest.raises(MemoryToolError, match="pip install apex"):
        measure(Job("builtin", "Apex FusedAdam", "none"))


def test_an_error_of_a_rank_is_its_cells_reason():
    if not CANDIDATES["CAME"].installed():
        pytest.skip("needs came-pytorch")
    (row,) = compare("builtin", ["CAME"], [("fsdp2", 2)], "float32")
    assert "DTensor" in row["why"]


def test_the_reason_of_a_cell_is_the_error_and_not_the_advice_below_it(monkeypatch):
    def fails(job, timeout):
        raise RankError(
            "rank 1 of 2:\nTraceback\nAssertionError: aten.x expects size 5. Please look\nSee the handbook\n"
        )

    monkeypatch.setattr(measuring, "measure", fails)
    (row,) = compare("builtin", ["NovoGrad"], [("none", 1)], "float32")
    assert row["why"] == "AssertionError: aten.x expects size 5."
