"""The pass over the layers in C++ gives the bits of the reference."""

import pytest
import torch
from hypothesis import given, settings
from layers_against_reference import assert_as_reference, cases

from novoscale import kernels
from novoscale.kernels import cpu

pytestmark = pytest.mark.skipif(kernels.fused("cpu") is None, reason="no C++ compiler")


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_any_layers_give_the_bits_of_the_reference(case):
    assert_as_reference(cpu, case, torch.device("cpu"))
