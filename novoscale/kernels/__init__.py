"""The passes of a step: two over the elements, and between them one over the layers.

``interface`` says what each implementation has. ``reference`` is the definition, in plain torch; ``triton``
(GPU) and ``cpu`` (C++) are fused kernels that give the same bits; ``dispatch`` chooses between them for each
tensor. Kernels see tensors and tables only: no process group, no optimizer.
"""

from novoscale.kernels.dispatch import FUSED_DEVICES, Kernels, fused, layer_kernels, unfused_reason
from novoscale.kernels.interface import LayerKernels, VectorSizes
from novoscale.kernels.shards import Coefficients, Matrices, Shard, ShardTensors

__all__ = [
    "FUSED_DEVICES",
    "Coefficients",
    "Kernels",
    "LayerKernels",
    "Matrices",
    "Shard",
    "ShardTensors",
    "VectorSizes",
    "fused",
    "layer_kernels",
    "unfused_reason",
]  # fmt: skip
