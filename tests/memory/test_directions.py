"""The directions of preset="muon" are counted by plan and memory, and only where matrices are whole."""

import pytest
from patience import patient

from novoscale.kernels import orthogonal
from novoscale.memory.measuring import Job, measure
from novoscale.memory.models import MemoryToolError, build
from novoscale.memory.optimizers import CANDIDATES
from novoscale.memory.planning import plan
from novoscale.optimizer import hidden

MUON = "NovoGrad, muon, int8"


def hidden_sizes(model):
    roles = hidden.of_model(model, None)
    return [p.numel() for p in model.parameters() if roles[id(p)].hidden]


def transient(model, **options):
    return plan(model, CANDIDATES[MUON].state, "none", 1, "bfloat16", orthogonal=True, **options).transient


def test_a_plan_has_all_directions_or_as_many_as_fit(monkeypatch):
    model = build("gpt2-1m", "meta")
    sizes = hidden_sizes(model)
    assert transient(model) == 2 * sum(sizes)
    assert transient(model, release=True) == 2 * max(sizes)
    monkeypatch.setattr(orthogonal, "BUFFER", 1000)
    assert transient(model) == 2 * max(sizes)
    assert plan(model, CANDIDATES[MUON].state, "none", 1, "bfloat16").transient == 0


def test_a_step_takes_the_directions_and_a_few_matrices_and_gives_them_back():
    model = build("gpt2-1m", "meta")
    sizes = hidden_sizes(model)
    found = measure(Job("gpt2-1m", MUON, "none"), timeout=patient(200)).to_dict()
    directions = 4 * sum(sizes)  # on a CPU they are of float32
    assert directions <= found["transient_bytes"] <= directions + 4 * 8 * max(sizes)
    assert found["state_bytes_per_parameter"] == pytest.approx(1.05, abs=0.05)


@pytest.mark.parametrize("sharding", ["zero1", "zero2", "zero3", "offload", "fsdp2"])
def test_where_matrices_are_sharded_it_is_refused_by_name(sharding):
    with pytest.raises(MemoryToolError, match=f"{MUON} needs whole matrices on each rank, which {sharding}"):
        measure(Job("gpt2-1m", MUON, sharding, 2))
