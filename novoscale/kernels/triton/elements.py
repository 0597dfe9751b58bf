"""Both passes over the elements for GPUs: launches of Triton kernels, as many for any number of tensors.

The work of a program is a chunk of some thousand elements. Tables on the device have the addresses of the
weights, gradients and first moments, and say which layers they belong to: see ``tables``. They are made once
and serve until a tensor moves. Where a layer is in several chunks, ``statistic`` works in two stages:
partials, and then their sum in a fixed order; without atomics two runs give the same bits. ``factored`` does
the same for factored parameters, in more launches where a model has billions of elements. ``update`` is one
pass, and gives the bits of ``reference``. Nothing depends on CUDA: the same code runs on ROCm, and on the CPU
with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from novoscale.kernels.interface import ByAddress, ElementKernels, VectorSizes
from novoscale.kernels.shards import Coefficients, Shard, in_one_order
from novoscale.kernels.triton import statistic, update
from novoscale.kernels.triton.check import check
from novoscale.kernels.triton.factored import Panels
from novoscale.kernels.triton.formats import FORMATS
from novoscale.kernels.triton.tables import Kind, in_blocks, statistic_tables, to_device, update_runs
from novoscale.kernels.uploads import Upload, capturing
from novoscale.sharding.blocks import BLOCK
from novoscale.state import formats

# Elements of a chunk, the work of one program: enough of them to fill a GPU from models of a few million
# elements on (an H100 runs about two thousand programs at a time). A multiple of a moment's block, at most
# 2**15 for update._layer_of_groups, and a power of two: a chunk aligned in its parameter does not cross
# 2**32.
CHUNK = 1 << 14
# Elements a program handles at a time: eight a thread, which is 128 bits of bfloat16 or twice 128 of float32
# from each tensor, and 64 of int8 or 32 of int4 codes; half of it where that takes too many registers: see
# ``halved``. With at most 64 registers a thread, so many threads run that they have more bytes in flight than
# the memory's latency times its bandwidth. A warp of AMD's data-centre GPUs has 64 lanes. Half of a tile is a
# multiple of a moment's block.
WARPS = 4
THREADS = 64 if torch.version.hip else 32  # of a warp
TILE = 8 * WARPS * THREADS

# No multiply-add is fused but where the kernels say so: the reference rounds each product and each sum.
LAUNCH = {"num_warps": WARPS, "enable_fp_fusion": False}

# The compute capabilities of chips whose float64 is about half as fast as their float32: P100, V100, A100,
# H100 and B200.
MUCH_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}

# Chunks in a strip of a factored parameter, the work of one program of its statistic. The larger it is, the
# fewer partials there are; with two, they take a twentieth of the bytes of a bfloat16 gradient.
STRIP = 2


def load() -> None:
    """Find out whether Triton can compile for the GPU of this machine. Waits for it.

    Raises:
        RuntimeError: it has no driver for it, or what it compiles is wrong.
        Exception: whatever else Triton raises: without a C compiler it cannot build its driver.
    """
    triton.runtime.driver.active.get_current_target()
    check(torch.device("cuda", torch.cuda.current_device()))


def supports(shard: Shard) -> bool:
    """Whether these kernels can take a tensor that is on a GPU; others are for ``reference``.

    Its weights, gradient and first moment have to be of the formats above, on one device, and in one order:
    see ``shards.in_one_order``.
    """
    if shard.param.dtype not in FORMATS or shard.grad.dtype not in FORMATS:
        return False
    if any(t.device != shard.param.device for t in shard.tensors):
        return False
    if shard.exp_avg is not None and not formats.known_format(shard.exp_avg, shard.exp_avg_scale):
        return False
    return in_one_order(shard)


class _Options(NamedTuple):
    """What the tensors of one launch have in common. The statistic depends on the first two only."""

    norm_type: int
    grad: torch.dtype
    param: torch.dtype
    exp_avg: torch.dtype | None
    largest: int  # code, of a moment in blocks
    codes_aligned: bool
    rounds_weights: bool
    decays: bool
    reg_inside_moment: bool
    nesterov: bool

    def constants(self) -> dict[str, Any]:
        """The arguments of ``update.update`` that follow from them."""
        moment = None if self.exp_avg is None else FORMATS.get(self.exp_avg, tl.int8)
        return {
            "param_type": FORMATS[self.param],
            "grad_type": FORMATS[self.grad],
            "exp_avg_type": moment,
            "largest": self.largest,
            "codes_aligned": self.codes_aligned,
            "rounds_weights": self.rounds_weights,
            "inside": self.decays and self.reg_inside_moment,
            "outside": self.decays and not self.reg_inside_moment,
            "nesterov": self.nesterov,
        }


def little_float64(device: torch.device) -> bool:
    """Whether sums of squares are to be made as in ``exact_sums``.

    All other chips of NVIDIA do two operations in float64 where they do 128 in float32, some of those for
    data centres too: A10, L4, L40S, B300.
    """
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) not in MUCH_FLOAT64


def halved(constants: dict[str, Any]) -> bool:
    """Whether an update of these arguments handles half of a tile at a time, and of a group.

    Moments in blocks and divisions take more registers. Half of the elements are still 128 bits of float32
    weights; and where elements are read one by one, there is nothing to lose. For bfloat16 weights with a
    moment in blocks, codes would be read by 32 or 16 bits: on an H100 full tiles are 9 % faster there.
    """
    divided, in_blocks = constants["divided"] is not None, constants["largest"] > 0
    by_elements = not constants["aligned"] or constants["group"] == 1
    wide = constants["param_type"] == tl.float32
    return (divided and not in_blocks) or ((divided or in_blocks) and (wide or by_elements))


def _options(shard: Shard) -> _Options:
    form = in_blocks(shard)
    return _Options(
        shard.norm_type,
        shard.grad.dtype,
        shard.param.dtype,
        None if shard.exp_avg is None else shard.exp_avg.dtype,
        form.largest if form else 0,
        form is None or cast(Tensor, shard.exp_avg).data_ptr() % 16 == 0,
        shard.rounds_weights,
        bool(shard.decays),
        bool(shard.reg_inside_moment),
        bool(shard.nesterov),
    )


class Kernels(ByAddress, ElementKernels):
    """Both passes, for tensors on one device that :func:`supports` allows. Keeps none of them alive.

    They must be made anew when a tensor moves, or when an option that a shard has changes; for gradients,
    which move in ordinary training, there is :meth:`move_gradients`. The passes do not wait for the device. A
    CUDA graph can capture them once they have run and Triton has compiled them.

    Raises:
        ValueError: a tensor that these kernels cannot take, or that is somewhere else.
    """

    def __init__(self, shards: Sequence[Shard], device: torch.device, sizes: VectorSizes) -> None:
        self._device, self._sizes = device, sizes
        here = torch.empty(0, device=device)
        self._index = here.get_device()
        for shard in shards:
            if not supports(shard) or shard.param.device != here.device:
                where = f"of strides {shard.param.stride()} on {shard.param.device}"
                raise ValueError(f"the Triton kernels on {device} cannot take {_options(shard)} {where}")
        self._addresses = _int64([s.grad.data_ptr() for s in shards])
        self._gradients = Upload(self._addresses.clone(), device)
        self._make_statistic(shards)
        options = [_options(s) for s in shards]
        self._options = list(dict.fromkeys(options))
        option_of = _int64([self._options.index(o) for o in options])
        self._runs = update_runs(shards, option_of, CHUNK, TILE)
        self._params = _int64([s.param.data_ptr() for s in shards])
        self._arrange()

    def _make_statistic(self, shards: Sequence[Shard]) -> None:
        """Make the tables and the launches of the statistic. Its partials come before it."""
        in_words = little_float64(self._device)
        tables = statistic_tables(shards, list(FORMATS), CHUNK, TILE)
        self._partials = tables.partials
        rows, run_of = (to_device(self._device, t) for t in tables.chunks[:2])
        self._sums: list[Any] = []
        for (norm_type, dtype, width), begin, count in tables.chunks.launches:
            kernel = statistic.rows_statistic if width else statistic.chunk_statistic
            squares = norm_type == 2
            kind = {"grad_type": list(FORMATS.values())[dtype], "squares": squares, "width": width}
            kind["in_words"] = squares and in_words
            given = (rows, run_of[begin:], self._gradients.on_device)
            self._sums.append(partial(kernel[(count,)], *given, tile=TILE, **kind, **LAUNCH))
        ends, few, several = to_device(self._device, tables.ends), tables.few, statistic.SEVERAL.value
        of_few = {"width": statistic.FEW.value, "tile": several * statistic.FEW.value, **LAUNCH}
        # What waits for memory takes as long for many partials as for few.
        of_many = {"width": 8 * TILE, "tile": 8 * TILE, **LAUNCH, "num_warps": 1024 // THREADS}
        for table, many, kind in ((ends[:few], several, of_few), (ends[few:], 1, of_many)):
            if len(table):
                self._sums.append(partial(statistic.layer_statistic[(len(table) // many,)], table, **kind))
        self._panels = Panels(
            shards, self._gradients.on_device, self._sizes.layers, STRIP * CHUNK, TILE, in_words, **LAUNCH
        )

    def _arrange(self) -> None:
        """Make the tables of the update on the device, and its launches: each of chunks in one stretch."""
        table = self._runs.arranged(self._addresses)
        rows, run_of = (to_device(self._device, t) for t in table[:2])
        launches = [
            (Kind(*facts), count, (rows, run_of[begin:], self._gradients.on_device))
            for facts, begin, count in table.launches
        ]
        # From the end: what the first pass read last is still in the cache.
        self._updates = [self._update(*launch, update.AGREED.value) for launch in reversed(launches)]
        self._finds = [self._update(*launch, update.FIND.value) for launch in launches if launch[0].sharded]

    def _update(self, kind: Kind, count: int, given: tuple[Tensor, ...], sharded: int) -> tuple[Kind, Any]:
        options = self._options[kind.option]
        constants: dict[str, Any] = {
            **options.constants(),
            "divided": ("term" if options.reg_inside_moment else "change") if kind.factored else None,
            "sharded": sharded if kind.sharded else None,
            "group": kind.group,
            "aligned": bool(kind.aligned),
            "whole": bool(kind.whole),
        }
        half = 2 if halved(constants) else 1
        if kind.group > 1:
            constants["group"] //= half
        tile = BLOCK if kind.sharded else TILE // half
        constants |= {"chunk": CHUNK, "tile": tile, "sharded_count": self._sizes.sharded_blocks}
        return kind, partial(update.update[(count,)], *given, **constants, **LAUNCH)

    def move_gradients(self, addresses: Sequence[int]) -> None:
        """See :class:`ElementKernels`.

        Raises:
            RuntimeError: a CUDA graph is being captured, and one of them is aligned otherwise.
        """
        moved_to = _int64(addresses)
        aligned_alike = torch.equal(moved_to % 16, self._addresses % 16)
        if not aligned_alike and capturing():
            raise RuntimeError("while a CUDA graph is captured, gradients must stay aligned as they were")
        self._gradients.write(moved_to)
        if not aligned_alike:
            self._addresses = moved_to
            self._arrange()

    def move_params(self, addresses: Sequence[int]) -> None:
        """See :class:`ElementKernels`.

        Raises:
            RuntimeError: one of them is aligned otherwise, or a CUDA graph is being captured.
        """
        moved_to = _int64(addresses)
        if torch.equal(moved_to, self._params):
            return
        if capturing() or not torch.equal(moved_to % 16, self._params % 16):
            raise RuntimeError(
                "weights must not move in a captured CUDA graph, and stay aligned as they were"
            )
        rows = self._runs.rows
        rows[:, update.PARAM.value] += (moved_to - self._params)[rows[:, update.SHARD.value]]
        self._params = moved_to
        self._arrange()

    def sum_of_squares(self, more: int = 0) -> Tensor:
        """See :class:`ElementKernels`."""
        size = self._partials + self._sizes.layers + self._sizes.columns + more
        found = torch.zeros(size, dtype=torch.float64, device=self._device)
        result = found[self._partials :]
        with torch.cuda.device(self._index):  # nothing where it is -1, the CPU's
            for launch in self._sums:
                launch(found)
            self._panels.add_to(result)
        return result

    def largest(self, coefficients: Coefficients) -> Tensor:
        """See :class:`ElementKernels`."""
        found = torch.zeros(2, self._sizes.sharded_blocks, dtype=torch.int32, device=self._device)
        self._launch(self._finds, coefficients, found)
        return found

    def update(self, coefficients: Coefficients) -> None:
        """See :class:`ElementKernels`: the bits of ``reference.elements.update``."""
        sharded = coefficients.sharded
        assert sharded is not None or not self._finds
        self._launch(self._updates, coefficients, None if sharded is None else sharded.contiguous())

    def _launch(self, launches: list[tuple[Kind, Any]], c: Coefficients, sharded: Tensor | None) -> None:
        vectors = [c.each.float(), c.options.float(), c.active, c.key]
        row_root, column_root = (None if t is None else t.float() for t in (c.row_root, c.column_root))
        with torch.cuda.device(self._index):
            for kind, launch in launches:
                # None where they are not needed, so that the compiled kernel is the same in all models.
                roots = (row_root, column_root) if kind.factored else (None, None)
                launch(*vectors, *roots, sharded if kind.sharded else None)


def _int64(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")
