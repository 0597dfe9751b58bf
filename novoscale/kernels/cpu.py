"""Both passes fused, for tensors in a CPU's memory (ZeRO-Offload): ``cpu.cpp``, built at first use.

The C++ source knows nothing of torch: it is called with addresses, so it compiles in seconds and serves
every version of torch. The library is kept in ``$XDG_CACHE_HOME/novoscale`` (``~/.cache/novoscale``) under a
name made of all that it depends on. It chooses between the instruction sets of its kind of processor when
it is loaded, so a home folder may be shared by different machines.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from novoscale.blocks import BLOCK
from novoscale.kernels import cpu_layers
from novoscale.kernels.layers import LayerTable
from novoscale.kernels.shards import (
    COLUMN,
    CUT,
    START,
    STOP,
    Coefficients,
    Shard,
    chunks,
    in_one_order,
    panels,
)
from novoscale.layout import repeated
from novoscale.momentum import known_format

CHUNK = 1 << 16  # elements, a multiple of BLOCK: what a thread does at once, and the unit of the sums
# Of a factored parameter it is so many elements of the first pass, in rows of so many, whose sums the second
# cache holds; and at least so many rows: the sums of their columns are written and read too, and must be few
# beside the gradient's elements.
PANEL, PANEL_WIDTH, PANEL_ROWS = 1 << 18, 1 << 14, 64
WAVE = 1 << 22  # sums of panels that are kept at once: 32 MiB

SOURCE = Path(__file__).with_name("cpu.cpp")
HEADERS = [SOURCE.with_name(n) for n in ("cpu_formats.h", "cpu_layers.h", "cpu_rounding.h")]
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fopenmp",
    # Each product and each sum rounded, as the reference does.
    "-ffp-contract=off",
    # Nobody asks for floating-point exceptions; without them conditional values become vector code.
    "-fno-trapping-math",
)

# Numbered as in cpu.cpp and cpu_formats.h.
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


class BuildError(RuntimeError):
    """This kernel cannot be built or loaded on this machine; the message says why."""


class Kernels:
    """Both passes, for tensors that :func:`supports` allows.

    Holds addresses only and keeps no tensor alive: it must not be used after one of the tensors has been
    freed or given other memory.

    Args:
        shards: the tensors.
        device: of the vectors that have one element per layer.
        layers: how many layers there are.
        columns: how many columns of factored parameters.
        cut_blocks: how many blocks of first moments are cut.

    Raises:
        BuildError: see :func:`load`.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        device: torch.device,
        layers: int,
        columns: int = 0,
        cut_blocks: int = 0,
    ) -> None:
        self._library, self._device, self._counts = load(), device, (layers, columns)
        self._shards = (_Shard * len(shards))(*map(_entry, shards))
        table = chunks(shards, CHUNK, BLOCK)
        self._chunks = _with_ends(table, table[:, STOP] - table[:, START])
        cut = table[table[:, CUT] >= 0]
        self._cut, self._cut_blocks = _with_ends(cut, cut[:, STOP] - cut[:, START]), cut_blocks
        self._found = torch.empty((len(cut), 2), dtype=torch.int32, device="cpu")
        factored = table[:, COLUMN] >= 0
        self._factored = bool(factored.any())
        plain = table[~factored]
        self._plain = _with_ends(plain, plain[:, STOP] - plain[:, START]) if self._factored else self._chunks
        self._panels, self._sums = panel_table(shards)
        self._ends = torch.empty((len(self._plain), 2), dtype=torch.float64, device="cpu")

    def moved(self, gradients: Sequence[int]) -> None:
        """Go on with gradients at other addresses."""
        for entry, address in zip(self._shards, gradients, strict=True):
            entry.grad = address

    def sum_of_squares(self, more: int = 0) -> Tensor:
        """This rank's part of each layer's and column's statistic: see ``reference.sum_of_squares``.

        Returns:
            float64 ``[layers + columns + more]``. The bits do not depend on the number of threads.
        """
        result = torch.zeros(sum(self._counts) + more, dtype=torch.float64, device="cpu")
        self._library.novoscale_sum_of_squares(
            ctypes.addressof(self._shards),
            self._plain.data_ptr(),
            len(self._plain),
            self._panels.data_ptr(),
            len(self._panels),
            self._ends.data_ptr(),
            _scratch.of(self._sums).data_ptr(),
            result.data_ptr(),
            *self._counts,
            torch.get_num_threads(),
        )
        return result.to(self._device)

    def largest(self, coefficients: Coefficients) -> Tensor:
        """This rank's part of what the ranks have to agree on of cut blocks: see ``reference.largest``."""
        largest = torch.zeros((2, self._cut_blocks), dtype=torch.int32, device="cpu")
        vectors = self._vectors(coefficients)
        self._library.novoscale_largest(
            ctypes.addressof(self._shards),
            self._cut.data_ptr(),
            len(self._cut),
            self._found.data_ptr(),
            *(v.data_ptr() for v in vectors),
            torch.get_num_threads(),
            *(row.data_ptr() for row in largest),
        )
        return largest.to(self._device)

    def update(self, coefficients: Coefficients) -> None:
        """m and w of every active layer, in place: the bits of ``reference.update``."""
        vectors, cut = self._vectors(coefficients), coefficients.cut
        assert cut is not None or not len(self._cut)
        agreed = torch.zeros((2, 0), dtype=torch.int32, device="cpu")
        if cut is not None:
            agreed = cut.to("cpu", torch.int32).contiguous()
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
        # What is not there does not enter the arithmetic, but its address may be read.
        optional = (c.each if v is None else v for v in (c.row_root, c.column_root))
        vectors = [v.to("cpu", torch.float32).contiguous() for v in (c.each, c.options, *optional)]
        return [*vectors, c.active.to("cpu").contiguous(), c.key.to("cpu").contiguous()]


class LayerKernels(cpu_layers.LayerKernels):
    """The pass over the layers."""

    def __init__(self, known: LayerTable, device: torch.device) -> None:
        super().__init__(known, load())


def panel_table(shards: Sequence[Shard]) -> tuple[Tensor, int]:
    """The panels of factored parameters, in parts that a thread sums at once, and these in waves.

    Returns:
        int64 ``[panels, 9]``, the columns of ``Panel`` in cpu.cpp, and how many sums a wave has at most.
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
    # Where they would lie if all were kept: a wave has those that begin within the same WAVE sums.
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
    """A last column: how many elements there are up to and with each row."""
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


@functools.cache
def load() -> ctypes.CDLL:
    """The library; built by ``$CXX`` (``c++``) if the cache has none.

    Raises:
        BuildError: there is no compiler, it fails (``-fopenmp`` not known, for one), or its library does
            not load. A failure is not remembered: ask once.
    """
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    version = _run([*compiler, "--version"])
    identity = [
        SOURCE.read_text(),
        *(header.read_text() for header in HEADERS),
        *compiler,
        version,
        *FLAGS,
        platform.machine(),
    ]
    name = f"cpu-{hashlib.sha256(repr(identity).encode()).hexdigest()[:20]}.so"
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    try:
        if home.is_absolute():
            return _open(home / "novoscale" / name, compiler)
    except OSError:  # it cannot be written to, or nothing in it may be executed
        pass
    try:
        with tempfile.TemporaryDirectory(prefix="novoscale-") as folder:
            return _open(Path(folder, name), compiler)  # stays loaded when the file is gone
    except OSError as error:
        raise BuildError(f"novoscale's CPU kernel cannot be loaded: {error}") from error


def _open(path: Path, compiler: Sequence[str]) -> ctypes.CDLL:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Under a name of its own, then moved: several ranks may build at once, and a build that is
        # killed blocks nobody.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder, path.name)
            _run([*compiler, *FLAGS, str(SOURCE), "-o", str(built)])
            built.replace(path)
    library = ctypes.CDLL(str(path))
    address, integer = ctypes.c_void_p, ctypes.c_int64
    table = (address, integer)
    library.novoscale_sum_of_squares.argtypes = [address, *table * 2, *[address] * 3, *[integer] * 3]
    library.novoscale_largest.argtypes = [address, *table, *[address] * 7, integer, *[address] * 2]
    library.novoscale_update.argtypes = [address, *table, *[address] * 8, integer]
    cpu_layers.declare(library)
    for function in (library.novoscale_sum_of_squares, library.novoscale_largest, library.novoscale_update):
        function.restype = None
    return library


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"novoscale's CPU kernel needs a C++ compiler: {error}") from error
    except subprocess.CalledProcessError as error:
        message = f"novoscale's CPU kernel: {shlex.join(command)} failed:\n{error.stderr}"
        raise BuildError(message) from error
    return done.stdout
