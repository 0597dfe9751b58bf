"""Fused kernels for GPUs, in Triton."""

from novoscale.kernels.triton.elements import Kernels, load, supports
from novoscale.kernels.triton.layers import LayerKernels

__all__ = ["Kernels", "LayerKernels", "load", "supports"]
