"""The pass over the layers in Triton gives the bits of the reference."""

import fixed_gradients
import missing_ranks
import pytest
import torch
import triton_layers_ranks
from hypothesis import HealthCheck, given, settings
from kept_ranks import run_ranks
from layers_against_reference import assert_as_reference, cases

pytest.importorskip("triton", reason="Triton is not installed")

from novoscale.kernels.triton import layers as triton_layers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPTIONS = {
    "default": {},
    "clipped": {"max_grad_norm": 0.5, "momentum_dtype": "int8"},
    "rows": {"granularity": "row", "normalize": "rms", "bias_correction": True, "max_grad_norm": 0.5},
    "adamw": {"preset": "adamw", "momentum_dtype": "int8", "max_grad_norm": 0.5},
    "relative": {"preset": "adamw", "clip_threshold": 0.5, "scale_parameter": True},
    "largest": {"norm_type": 0},
}


@pytest.fixture(params=[True, False], ids=["in several tiles", "in one tile"])
def tiles(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(triton_layers, "TILE", 16)
        monkeypatch.setattr(triton_layers, "MANY", {**triton_layers.MANY, "tile": 32})


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_any_layers_give_the_bits_of_the_reference(tiles, case):
    assert_as_reference(triton_layers, case, DEVICE)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layers_that_ranks_complete_give_the_bits_of_one_process(options):
    """What the collective carries is packed and unpacked by Triton."""
    options = {"lr": 0.05, "weight_decay": 0.1, **options}
    ranks = run_ranks(triton_layers_ranks.pieces, 2, options)
    assert not fixed_gradients.differing(ranks, fixed_gradients.unsharded(options))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30, None], ids=str)
@pytest.mark.parametrize("options", [{}, {"preset": "adamw"}], ids=str)
def test_a_step_is_skipped_and_noted_as_elsewhere(options, bad):
    found = run_ranks(triton_layers_ranks.noted, 2, options, bad)
    assert all(on_triton == elsewhere for on_triton, elsewhere in found)


@pytest.mark.parametrize("options", [{"preset": "adamw", "max_grad_norm": 1.0}, {"norm_type": 0}], ids=str)
def test_a_gradient_that_some_ranks_lack_is_noted_as_elsewhere(options):
    arguments = ({"preset": "paper", **options}, (2,), "s", [1], 2)
    on_triton, elsewhere = (
        run_ranks(module.missing_gradient, 2, *arguments) for module in (triton_layers_ranks, missing_ranks)
    )
    assert on_triton == elsewhere
    assert all("b" in found["layers"] for found in on_triton)


@pytest.mark.parametrize("kind", ["replicas", "experts", "on rank 0"])
def test_one_factor_clips_every_rank(kind):
    found = run_ranks(triton_layers_ranks.clipped_with_plain, 2, kind, (2,))
    assert found[0] == found[1]
    assert found[0][0] == pytest.approx(found[0][1], rel=1e-6)
