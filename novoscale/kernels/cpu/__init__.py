"""Fused kernels for tensors in a CPU's memory, in C++."""

from novoscale.kernels.cpu.build import load
from novoscale.kernels.cpu.elements import Kernels, supports
from novoscale.kernels.cpu.layers import LayerKernels

__all__ = ["Kernels", "LayerKernels", "load", "supports"]
