"""The pass over the layers in Triton gives the bits of the reference."""

import torch
from hypothesis import given, settings
from layers_against_reference import assert_as_reference, cases

from novoscale.kernels import triton_layers


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_any_layers_give_the_bits_of_the_reference(case):
    assert_as_reference(triton_layers, case, torch.device("cpu"))
