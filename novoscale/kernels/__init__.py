"""The two passes over the elements: the statistic of each layer, and the update.

``reference`` is the definition. Kernels see tensors and tables only: no distribution, no optimizer.
"""

from novoscale.kernels.reference import sum_of_squares, update
from novoscale.kernels.shards import Coefficients, Shard

__all__ = ["Coefficients", "Shard", "sum_of_squares", "update"]
