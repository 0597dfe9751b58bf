"""The pass over the layers in C++: ``cpu_layers.h``, which knows their state by its addresses."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import torch
from torch import Tensor

from novoscale.kernels import reference_layers
from novoscale.kernels.layers import LayerTable, OptionTable
from novoscale.kernels.shards import Coefficients

STRETCH = 1 << 12  # layers that a thread does at once

_POINTERS = (
    *("parameters", "stretches", "options", "statistic", "share", "mean_square", "finite"),
    *("each", "row_root", "column_root", "active", "key"),
)
_COUNTS = ("parameter_count", "stretch_count", "layers", "columns", "verdicts", "threads")


class _Step(ctypes.Structure):
    """As in cpu_layers.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _COUNTS),
        ("inverse", ctypes.c_double),
        ("clip", ctypes.c_double),
    )


class LayerKernels(reference_layers.LayersByAddress):
    """See ``reference_layers.LayerKernels``.

    Args:
        known: the layers.
        library: see ``cpu.load``.
    """

    def __init__(self, known: LayerTable, library: ctypes.CDLL) -> None:
        self._table, self._library = known, library
        self._records, self._stretches = known.records.contiguous(), known.stretches(STRETCH)
        self._step = _Step(
            parameters=self._records.data_ptr(),
            stretches=self._stretches.data_ptr(),
            share=None if known.share is None else known.share.data_ptr(),
            parameter_count=len(self._records),
            stretch_count=len(self._stretches),
            layers=known.layers,
            columns=known.columns,
        )

    def begin(self, options: OptionTable, statistic: Tensor, scale: Tensor | None) -> None:
        """See ``reference_layers.LayerKernels.begin``."""
        if scale is None and not self._table.sums:
            return
        step = self._step
        step.options, step.statistic = options.table.data_ptr(), statistic.data_ptr()
        step.threads, step.inverse = torch.get_num_threads(), 1.0 if scale is None else 1 / float(scale)
        self._library.novoscale_begin(ctypes.byref(step))

    def advance(
        self,
        options: OptionTable,
        statistic: Tensor,
        finite: Tensor,
        total: Tensor,
        scale: Tensor | None,
        share: Callable[[Tensor], Tensor],
    ) -> Coefficients:
        """See ``reference_layers.LayerKernels.advance``."""
        made = reference_layers.room(self._table, options)
        step = self._step
        step.options, step.statistic = options.table.data_ptr(), statistic.data_ptr()
        step.finite, step.verdicts, step.threads = finite.data_ptr(), finite.numel(), torch.get_num_threads()
        step.inverse = 1.0 if scale is None else 1 / float(scale)
        step.clip = 1.0
        if "max_grad_norm" in self._table.uses:
            step.clip = min(options.limit / (math.sqrt(total) + 1e-6), 1.0)
        step.each, step.active, step.key = made.each.data_ptr(), made.active.data_ptr(), made.key.data_ptr()
        step.row_root, step.column_root = (
            None if t is None else t.data_ptr() for t in (made.row_root, made.column_root)
        )
        step.mean_square = None
        if "clip_threshold" in self._table.uses:
            mean_square = torch.empty(len(self._records), dtype=torch.float64, device="cpu")
            self._library.novoscale_average(ctypes.byref(step), mean_square.data_ptr())
            mean_square = share(mean_square)
            step.mean_square = mean_square.data_ptr()
        else:
            self._library.novoscale_average(ctypes.byref(step), None)
        self._library.novoscale_coefficients(ctypes.byref(step))
        return made


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the functions take."""
    library.novoscale_begin.argtypes = library.novoscale_coefficients.argtypes = [ctypes.POINTER(_Step)]
    library.novoscale_average.argtypes = [ctypes.POINTER(_Step), ctypes.c_void_p]
    for function in (library.novoscale_begin, library.novoscale_average, library.novoscale_coefficients):
        function.restype = None
