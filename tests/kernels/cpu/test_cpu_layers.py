"""The pass over the layers in C++ gives the bits of the reference."""

import pytest
import torch
from hypothesis import example, given, settings
from layers_against_reference import Case, LocalParameter, assert_as_reference, cases, plain_group

from novoscale import kernels
from novoscale.kernels.cpu import layers as cpu_layers

pytestmark = pytest.mark.skipif(kernels.fused("cpu") is None, reason="no C++ compiler")


# Only a group of which nothing is here counts its steps.
NOTHING_COUNTED = Case(
    [plain_group(bias_correction=False), plain_group(bias_correction=True)],
    [LocalParameter(0, 1, 0, 1, False), LocalParameter(1, 0, 0, 1, False)],
    sums=True,
    scale=None,
    one_verdict=False,
    seed=0,
)


@example(case=NOTHING_COUNTED)
@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_any_layers_give_the_bits_of_the_reference(case):
    assert_as_reference(cpu_layers, case, torch.device("cpu"))
