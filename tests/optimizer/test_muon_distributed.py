"""Orthogonal directions on several ranks: the same training where matrices are whole, refused elsewhere."""

import muon_ranks
import pytest
import torch
from kept_ranks import run_ranks


@pytest.mark.parametrize("zero_redundancy", [False, True])
@pytest.mark.parametrize("momentum_dtype", ["float32", "int8"])
def test_replicas_stay_the_same_and_train_as_one_process(zero_redundancy, momentum_dtype):
    options = {"momentum_dtype": momentum_dtype}
    first, second = run_ranks(muon_ranks.ddp, 2, zero_redundancy, options)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for p, expected in zip(first, muon_ranks.alone(**options), strict=True):
        if momentum_dtype == "float32" and not zero_redundancy:
            torch.testing.assert_close(p, expected, rtol=0, atol=2e-4)
        elif not zero_redundancy:  # other gradients in the last bits are rounded to other codes
            torch.testing.assert_close(p, expected, rtol=0, atol=5e-2)


def test_a_matrix_that_is_sharded_is_refused_by_name_on_every_rank():
    first, second = run_ranks(muon_ranks.refusals, 2)
    assert first == second
    for said in first.values():
        assert "needs the whole matrix on the rank that steps it" in said
        assert "sharded over 2 ranks" in said
    assert first["made from DTensors"].startswith("1.weight:")
    assert first["put in place of a parameter"].startswith("up:")


def test_fsdp2_on_one_rank_has_whole_matrices_and_the_bits_of_no_wrapper():
    assert run_ranks(muon_ranks.sharded_over_one_rank, 1) == [True]


def test_a_dtensor_that_is_replicated_is_whole():
    assert run_ranks(muon_ranks.replicated, 2) == [True, True]


@pytest.mark.usefixtures("deepspeed_operation")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_refused(stage):
    for said in run_ranks(muon_ranks.under_deepspeed, 2, stage):
        assert "orthogonalize=True needs the whole matrix" in said
