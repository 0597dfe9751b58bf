"""The definition of each pass: plain torch, any device."""

from novoscale.kernels.reference.elements import Kernels
from novoscale.kernels.reference.layers import LayerKernels

__all__ = ["Kernels", "LayerKernels"]
