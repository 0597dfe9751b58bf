"""Phases: what was held before, at most and after; exact, temporaries inside of operators included."""

import itertools

import phases_ranks
import pytest

from novoscale.tools.local_ranks import run_ranks

MIB = 2**20


def phases(optimizer):
    return {phase["name"]: phase for phase in run_ranks(phases_ranks.phases, 1, optimizer)[0]}


def test_peak_and_rest_of_a_phase():
    found = phases("NovoGrad")
    first, frees = found["keeps 1 MiB of 3"]["allocated"]["cpu"], found["frees"]["allocated"]["cpu"]
    assert (first["before"], first["peak"], first["after"]) == (0, 3 * MIB, MIB)
    assert (frees["before"], frees["peak"], frees["after"]) == (MIB, MIB, 0)
    assert all(p["rss"] >= p["uss"] > 0 for p in found.values())
    peak = found["step"]["peak_rss"]
    assert peak is None or peak > 100 * MIB


@pytest.mark.parametrize("slices", [1, 2, 40])
def test_bytes_over_the_time_of_a_phase_keep_its_peak(slices):
    (rises, frees), (rising, freeing) = run_ranks(phases_ranks.timeline, 1, slices)[0]
    assert len(rising) == len(freeing) == slices
    assert max(rising) == rises["allocated"]["cpu"]["peak"] == 5 * MIB
    assert max(freeing) == frees["allocated"]["cpu"]["peak"] == freeing[0] == 2 * MIB
    if slices == 40:  # each level for a while, in this order; and one of them for a moment
        order = [level for level, _ in itertools.groupby(rising) if level]  # nothing yet, on a busy machine
        assert order == [MIB, 5 * MIB, 2 * MIB]
        assert rising.count(5 * MIB) <= 2
        assert freeing[-1] == 0


@pytest.mark.parametrize(
    ("optimizer", "least", "most"),
    [("NovoGrad", 0, 0.05), ("torch AdamW, fused", 0, 0.05), ("torch AdamW, foreach", 1, 1.05)],
)
def test_what_an_update_takes_besides_its_result(optimizer, least, most):
    """Of the weights' 1 MiB: foreach AdamW holds a copy for a moment, NovoGrad nothing that grows."""
    warm_up, update = (u["cpu"] for u in phases(optimizer)["step"]["updates"])
    assert warm_up["after"] > update["before"] - MIB
    assert update["after"] == update["before"]
    assert least * MIB <= update["peak"] - update["after"] <= most * MIB
