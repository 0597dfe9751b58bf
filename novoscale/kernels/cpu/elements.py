"""Both passes over the elements in C++ (``kernels.cpp``), for tensors in a CPU's memory (ZeRO-Offload)."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from novoscale.kernels.cpu.build import load
from novoscale.kernels.interface import ByAddress, ElementKernels, VectorSizes
from novoscale.kernels.shards import (
    COLUMN,
    SHARDED,
    START,
    STOP,
    Coefficients,
    Shard,
    chunks,
    in_one_order,
    panels,
)
from novoscale.sharding.blocks import BLOCK
from novoscale.sharding.indices import repeated
from novoscale.state.formats import known_format

CHUNK = 1 << 16  # elements, a multiple of BLOCK: what a thread does at once, and the unit of the sums
# Of a factored parameter a thread sums PANEL elements at once, in rows of at most PANEL_WIDTH, whose sums the
# second-level cache holds; and at least PANEL_ROWS rows: the sums of their columns are written and read too,
# and must be few compared with the gradient's elements.
PANEL, PANEL_WIDTH, PANEL_ROWS = 1 << 18, 1 << 14, 64
WAVE = 1 << 22  # how many sums of panels are kept at once: 32 MiB

# Numbers of the formats, as in formats.h; of the options, as in kernels.cpp.
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MOMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 3, torch.uint8: 4}
MOMENT, NESTEROV, DECAYS, INSIDE = 1, 2, 4, 16


class _Shard(ctypes.Structure):
    _fields_ = (
        ("param", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("exp_avg", ctypes.c_void_p),
        ("exp_avg_scale", ctypes.c_void_p),
        ("param_format", ctypes.c_int32),
        ("grad_format", ctypes.c_int32),
        ("exp_avg_format", ctypes.c_int32),
        ("norm_type", ctypes.c_int32),
        ("options", ctypes.c_int32),
        ("rounds_weights", ctypes.c_int32),
        ("group", ctypes.c_int32),
    )


class _Scratch(threading.local):
    """The sums of panels, while a statistic is made: one buffer for all tables, of which there are many."""

    buffer = torch.empty(0, dtype=torch.float64, device="cpu")

    def of(self, sums: int) -> Tensor:
        if len(self.buffer) < sums:
            self.buffer = torch.empty(sums, dtype=torch.float64, device="cpu")
        return self.buffer


_scratch = _Scratch()


class Kernels(ByAddress, ElementKernels):
    """Both passes, for tensors that :func:`supports` allows.

    Keeps no tensor alive: it must not be used after one of the tensors has been freed or given other memory.

    Raises:
        BuildError: see ``build.load``.
    """

    def __init__(self, shards: Sequence[Shard], device: torch.device, sizes: VectorSizes) -> None:
        self._library, self._device, self._sizes = load(), device, sizes
        self._shards = (_Shard * len(shards))(*map(_entry, shards))
        table = chunks(shards, CHUNK, BLOCK)
        self._chunks = _with_ends(table, table[:, STOP] - table[:, START])
        sharded = table[table[:, SHARDED] >= 0]
        self._sharded = _with_ends(sharded, sharded[:, STOP] - sharded[:, START])
        self._found = torch.empty((len(sharded), 2), dtype=torch.int32, device="cpu")
        factored = table[:, COLUMN] >= 0
        self._factored = bool(factored.any())
        plain = table[~factored]
        self._plain = _with_ends(plain, plain[:, STOP] - plain[:, START]) if self._factored else self._chunks
        self._panels, self._sums = panel_table(shards)
        self._ends = torch.empty((len(self._plain), 2), dtype=torch.float64, device="cpu")

    def move_gradients(self, addresses: Sequence[int]) -> None:
        """See :class:`ElementKernels`."""
        for entry, address in zip(self._shards, addresses, strict=True):
            entry.grad = address

    def move_params(self, addresses: Sequence[int]) -> None:
        """See :class:`ElementKernels`."""
        for entry, address in zip(self._shards, addresses, strict=True):
            entry.param = address

    def sum_of_squares(self, more: int = 0) -> Tensor:
        """See :class:`ElementKernels`. The bits do not depend on the number of threads."""
        layers, columns = self._sizes.layers, self._sizes.columns
        result = torch.zeros(layers + columns + more, dtype=torch.float64, device="cpu")
        self._library.novoscale_sum_of_squares(
            ctypes.addressof(self._shards),
            self._plain.data_ptr(),
            len(self._plain),
            self._panels.data_ptr(),
            len(self._panels),
            self._ends.data_ptr(),
            _scratch.of(self._sums).data_ptr(),
            result.data_ptr(),
            layers,
            columns,
            torch.get_num_threads(),
        )
        return result.to(self._device)

    def largest(self, coefficients: Coefficients) -> Tensor:
        """See :class:`ElementKernels`."""
        largest = torch.zeros((2, self._sizes.sharded_blocks), dtype=torch.int32, device="cpu")
        vectors = self._vectors(coefficients)
        self._library.novoscale_largest(
            ctypes.addressof(self._shards),
            self._sharded.data_ptr(),
            len(self._sharded),
            self._found.data_ptr(),
            *(v.data_ptr() for v in vectors),
            torch.get_num_threads(),
            *(row.data_ptr() for row in largest),
        )
        return largest.to(self._device)

    def update(self, coefficients: Coefficients) -> None:
        """See :class:`ElementKernels`: the bits of ``reference.elements.update``."""
        vectors, sharded = self._vectors(coefficients), coefficients.sharded
        assert sharded is not None or not len(self._sharded)
        agreed = torch.zeros((2, 0), dtype=torch.int32, device="cpu")
        if sharded is not None:
            agreed = sharded.to("cpu", torch.int32).contiguous()
        self._library.novoscale_update(
            ctypes.addressof(self._shards),
            self._chunks.data_ptr(),
            len(self._chunks),
            *(v.data_ptr() for v in vectors),
            *(row.data_ptr() for row in agreed),
            torch.get_num_threads(),
        )

    def _vectors(self, c: Coefficients) -> list[Tensor]:
        """The vectors of the coefficients, in the order of the library's arguments."""
        assert (c.row_root is not None and c.column_root is not None) or not self._factored
        # A missing vector does not enter the arithmetic, but memory at its address may be read.
        optional = (c.each if v is None else v for v in (c.row_root, c.column_root))
        vectors = [v.to("cpu", torch.float32).contiguous() for v in (c.each, c.options, *optional)]
        return [*vectors, c.active.to("cpu").contiguous(), c.key.to("cpu").contiguous()]


def panel_table(shards: Sequence[Shard]) -> tuple[Tensor, int]:
    """Split the panels of factored parameters into parts that a thread sums at once, and put these in waves.

    Returns:
        int64 ``[panels, 9]``, the columns of ``Panel`` in kernels.cpp, and how many sums a wave has at most.
    """
    start, rows, stride, layer, column, shard = panels(shards).unbind(1)
    width = stride.clamp(max=PANEL_WIDTH)
    height = (PANEL // width).clamp(min=PANEL_ROWS)
    across, down = (stride - 1) // PANEL_WIDTH + 1, (rows - 1) // height + 1
    panel, nth = repeated(across * down)
    top, left = nth // across[panel] * height[panel], nth % across[panel] * PANEL_WIDTH
    rows = torch.minimum(rows[panel] - top, height[panel])
    width = (stride[panel] - left).clamp(max=PANEL_WIDTH)
    sums = rows + width
    # Where the sums would lie if all were kept: a wave has the parts that begin within the same WAVE sums.
    place = sums.cumsum(0) - sums
    begins = place // WAVE != place.roll(1) // WAVE
    begins[:1] = True
    offset = place - place[begins][begins.cumsum(0) - 1]
    table = torch.stack(
        [
            start[panel] + top * stride[panel] + left,
            rows,
            width,
            stride[panel],
            layer[panel] + top,
            column[panel] + left,
            shard[panel],
        ],
        dim=1,
    )
    table = torch.cat((_with_ends(table, rows * width), offset[:, None]), dim=1)
    return table, int((offset + sums).max()) if len(table) else 0


def _with_ends(table: Tensor, elements: Tensor) -> Tensor:
    """Add a last column: how many elements there are up to and including each row."""
    return torch.cat((table, elements.cumsum(0)[:, None]), dim=1).contiguous()


def supports(shard: Shard) -> bool:
    """Whether :class:`Kernels` can do this shard; if not, the reference can.

    Its tensors must be in a CPU's memory, in the formats above, and in one order: see
    ``shards.in_one_order``. Nesterov's step needs a first moment.
    """
    if any(t.device.type != "cpu" or t.layout != torch.strided for t in shard.tensors):
        return False
    if shard.param.dtype not in FORMATS or shard.grad.dtype not in FORMATS:
        return False
    if shard.exp_avg is not None and not known_format(shard.exp_avg, shard.exp_avg_scale):
        return False
    return in_one_order(shard) and (shard.exp_avg is not None or not shard.nesterov)


def _entry(shard: Shard) -> _Shard:
    options = MOMENT * (shard.exp_avg is not None) | NESTEROV * shard.nesterov
    options |= DECAYS * shard.decays | INSIDE * shard.reg_inside_moment
    return _Shard(
        shard.param.data_ptr(),
        shard.grad.data_ptr(),
        *(None if t is None else t.data_ptr() for t in (shard.exp_avg, shard.exp_avg_scale)),
        FORMATS[shard.param.dtype],
        FORMATS[shard.grad.dtype],
        0 if shard.exp_avg is None else MOMENTS[shard.exp_avg.dtype],
        shard.norm_type,
        options,
        shard.rounds_weights,
        shard.group,
    )
