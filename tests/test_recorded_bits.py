"""The bits of weights and states are those that were recorded, in every preset and format."""

import json

import pytest
import recorded_bits
import torch
from kept_ranks import run_ranks

RECORDED = json.loads(recorded_bits.RECORDED.read_text())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", recorded_bits.FORMS)
def test_one_process_has_the_recorded_bits(form, dtype, fused):
    expected = RECORDED["one process"][f"{form}, {dtype} weights"]
    assert recorded_bits.in_one_process(form, dtype, fused) == expected


@pytest.mark.parametrize("form", recorded_bits.FORMS)
def test_dtensors_on_three_ranks_have_the_recorded_bits(form):
    assert run_ranks(recorded_bits.as_dtensors, recorded_bits.RANKS, form) == RECORDED["DTensors"][form]


@pytest.mark.usefixtures("deepspeed_operation")
@pytest.mark.parametrize(("stage", "form"), [(s, form) for s in (2, 3) for form in RECORDED[f"ZeRO-{s}"]])
def test_zero_on_three_ranks_has_the_recorded_bits(stage, form):
    found = run_ranks(recorded_bits.under_zero, recorded_bits.RANKS, form, stage)
    assert found == RECORDED[f"ZeRO-{stage}"][form]
