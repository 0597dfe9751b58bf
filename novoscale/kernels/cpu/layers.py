"""The pass over the layers in C++: ``layers.h``, which is given the addresses of their state."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from novoscale.kernels import interface
from novoscale.kernels.cpu.build import load
from novoscale.kernels.interface import AdvanceInputs, ByAddress
from novoscale.kernels.layers import LayerTable, OptionTable, empty_coefficients
from novoscale.kernels.shards import Coefficients

STRETCH = 1 << 12  # layers that a thread does at once

_POINTERS = (
    *("parameters", "stretches", "options", "statistic", "share", "mean_square", "finite"),
    *("each", "row_root", "column_root", "active", "key"),
)
_COUNTS = ("parameter_count", "stretch_count", "layers", "columns", "verdicts", "threads")


class _Step(ctypes.Structure):
    """As in layers.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _COUNTS),
        ("inverse", ctypes.c_double),
        ("clip", ctypes.c_double),
    )


class LayerKernels(ByAddress, interface.LayerKernels):
    """The pass over the layers, of which everything is in a CPU's memory."""

    def __init__(self, table: LayerTable, device: torch.device) -> None:
        self._table, self._library = table, load()
        self._records, self._stretches = table.records.contiguous(), table.stretches(STRETCH)
        self._step = _Step(
            parameters=self._records.data_ptr(),
            stretches=self._stretches.data_ptr(),
            share=None if table.share is None else table.share.data_ptr(),
            parameter_count=len(self._records),
            stretch_count=len(self._stretches),
            layers=table.layers,
            columns=table.columns,
        )

    def begin(self, options: OptionTable, statistic: Tensor, scale: Tensor | None) -> None:
        """See ``interface.LayerKernels.begin``."""
        if scale is None and not self._table.sums:
            return
        step = self._step
        step.options, step.statistic = options.table.data_ptr(), statistic.data_ptr()
        step.threads, step.inverse = torch.get_num_threads(), 1.0 if scale is None else 1 / float(scale)
        self._library.novoscale_begin(ctypes.byref(step))

    def advance(self, given: AdvanceInputs) -> Coefficients:
        """See ``interface.LayerKernels.advance``."""
        options, finite, scale = given.options, given.finite, given.scale
        made = empty_coefficients(self._table, options)
        step = self._step
        step.options, step.statistic = options.table.data_ptr(), given.statistic.data_ptr()
        step.finite, step.verdicts, step.threads = finite.data_ptr(), finite.numel(), torch.get_num_threads()
        step.inverse = 1.0 if scale is None else 1 / float(scale)
        step.clip = 1.0
        if "max_grad_norm" in self._table.uses:
            step.clip = min(options.limit / (math.sqrt(given.total) + 1e-6), 1.0)
        step.each, step.active, step.key = made.each.data_ptr(), made.active.data_ptr(), made.key.data_ptr()
        step.row_root, step.column_root = (
            None if t is None else t.data_ptr() for t in (made.row_root, made.column_root)
        )
        step.mean_square = None
        if "clip_threshold" in self._table.uses:
            mean_square = torch.empty(len(self._records), dtype=torch.float64, device="cpu")
            self._library.novoscale_average(ctypes.byref(step), mean_square.data_ptr())
            mean_square = given.share(mean_square)
            step.mean_square = mean_square.data_ptr()
        else:
            self._library.novoscale_average(ctypes.byref(step), None)
        self._library.novoscale_coefficients(ctypes.byref(step))
        return made
