"""Both passes for GPUs, in Triton: the launches of a step do not grow with the number of tensors or layers.

A table on the device has one row for each chunk of some thousand elements: where its weights, gradient and
first moment lie, as addresses, and which layers they belong to. It is made once and serves until a tensor
moves. The statistic is made in two stages, partials of the chunks and then their sum for each layer in a
fixed order; without atomics two runs give the same bits. Of factored parameters ``triton_factored`` makes it,
in more launches where a model has billions of elements. The update is one pass, and gives the bits of
``reference``. Nothing depends on CUDA: the same code runs on ROCm, and on the CPU with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from novoscale import momentum
from novoscale.blocks import BLOCK
from novoscale.kernels import triton_passes as passes
from novoscale.kernels.shards import (
    COLUMN,
    LAYER,
    POSITION,
    SIZE,
    START,
    STOP,
    Coefficients,
    Shard,
    chunks,
    in_one_order,
)
from novoscale.kernels.triton_check import check
from novoscale.kernels.triton_factored import Panels, to_device
from novoscale.kernels.triton_formats import FORMATS
from novoscale.kernels.triton_layers import LayerKernels as LayerKernels

# Elements of a chunk, the work of one program: enough of them to fill a GPU from models of a few million
# elements on (an H100 runs about two thousand programs at a time), and a table of 128 bytes in 16384
# elements, which is nothing beside what they take. A multiple of ALIGNMENT and of a moment's block, at most
# 2**15, for passes._layers, and a power of two: a chunk aligned in its parameter does not cross 2**32.
CHUNK = 1 << 14
# Elements a program handles at a time: eight a thread, which is 128 bits of bfloat16 or twice 128 of float32
# from each tensor, and 64 of int8 or 32 of int4 codes; half of it where that takes too many registers: see
# ``halved``. With at most 64 of them a thread, as many threads run as have more bytes in flight than the
# memory's latency times its bandwidth asks for. A warp of AMD's data-centre GPUs has 64 lanes. Half of a tile
# is a multiple of a moment's block.
WARPS = 4
TILE = 8 * WARPS * (64 if torch.version.hip else 32)

# No multiply-add is fused but where the kernels say so: the reference rounds each product and each sum.
LAUNCH = {"num_warps": WARPS, "enable_fp_fusion": False}

# Chunks begin at a multiple of so many elements of their tensor, the first lanes masked where their piece
# begins within: then one tile of a piece is handled by elements, and not its whole first chunk. Where the
# moment is kept in blocks, they begin at a block instead.
ALIGNMENT = 16

# Where layers are whole groups of so many elements, a thread looks up the coefficients of one layer for all
# that it handles at a time.
GROUP = 8

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
    if shard.exp_avg is not None and not momentum.known_format(shard.exp_avg, shard.exp_avg_scale):
        return False
    return in_one_order(shard)


class _Options(NamedTuple):
    """What the tensors of one launch have in common. The first two are all that the statistic depends on."""

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
        """The arguments of passes.update."""
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


def halved(constants: dict[str, Any]) -> bool:
    """Whether an update of these arguments handles half of a tile at a time.

    Moments in blocks and divisions take more registers. Half of the elements are still 128 bits of float32
    weights; and where it is done by elements, there is nothing to lose.
    """
    divided, by_elements = constants["divided"] is not None, constants["ragged"] or constants["group"] == 1
    wide = constants["param_type"] == tl.float32
    return (wide and (constants["largest"] > 0 or divided)) or (divided and by_elements)


def _in_blocks(shard: Shard) -> momentum.Format | None:
    """The format of a first moment in blocks."""
    if shard.exp_avg is None or shard.exp_avg_scale is None:
        return None
    return momentum.format_of(shard.exp_avg, shard.exp_avg_scale)


def _options(shard: Shard) -> _Options:
    form = _in_blocks(shard)
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


class Kernels:
    """Both passes, for tensors that stay where they are. Holds their addresses, and does not keep them alive.

    To be made anew when a tensor moves, or an option that a shard has; for gradients, which move in
    ordinary training, there is :meth:`moved`. The passes do not wait for the device and can be captured in a
    CUDA graph, once they have run and Triton has compiled them.

    Args:
        shards: the tensors; :func:`supports` is true of each.
        device: where they are, and the vectors that have one element per layer.
        layers: how many layers there are.
        columns: how many columns of factored parameters.
        cut_blocks: how many blocks of first moments are cut.

    Raises:
        ValueError: a tensor that these kernels cannot take, or that is somewhere else.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        device: torch.device,
        layers: int,
        columns: int = 0,
        cut_blocks: int = 0,
    ) -> None:
        self._statistic_size, self._cut_blocks, self._device = layers + columns, cut_blocks, device
        table = chunks(shards, CHUNK, BLOCK)
        self._factored = table[:, COLUMN] >= 0
        plain = table[~self._factored]
        # Of each chunk those of its first and of its last layer; if that is the same, the second stays 0.
        self._partials = torch.zeros(2 * len(plain), dtype=torch.float64, device=device)
        self._index = self._partials.get_device()
        for shard in shards:
            if not supports(shard) or shard.param.device != self._partials.device:
                where = f"of strides {shard.param.stride()} on {shard.param.device}"
                raise ValueError(f"the Triton kernels on {device} cannot take {_options(shard)} {where}")
        self._rows = _rows(shards, table)
        addresses = _int64([s.grad.data_ptr() for s in shards])
        self._addresses, self._gradients = addresses, to_device(device, addresses)
        # What a CUDA graph copies them from: while it is captured, none can be made.
        self._captured = addresses.pin_memory() if device.type == "cuda" else addresses.clone()
        # By name, for dtypes have no order.
        self._options = sorted({_options(s) for s in shards}, key=str)
        self._option_of = _int64([self._options.index(_options(s)) for s in shards])[table[:, -1]]
        self._panels = Panels(shards, self._gradients, layers, STRIP * CHUNK, TILE, **LAUNCH)
        ends = to_device(device, _ends(plain, _int64([s.norm_type for s in shards])))
        self._ends = partial(passes.layer_statistic[(len(ends),)], ends, self._partials, tile=TILE, **LAUNCH)
        self._arrange()

    def _arrange(self) -> None:
        """The table on the device, the chunks of a launch next to each other, and the launches."""
        launches, order = _launches(
            self._rows, self._addresses, self._factored, self._options, self._option_of
        )
        self._table = to_device(self._device, self._rows[order])
        self._statistics = [
            partial(
                passes.rows_statistic[(stop - start,)] if width else passes.chunk_statistic[(stop - start,)],
                self._table[start:stop],
                self._gradients,
                self._partials,
                grad_type=FORMATS[grad],
                squares=norm_type == 2,
                width=width,
                tile=TILE,
                **LAUNCH,
            )
            for (norm_type, grad, width), start, stop in _merged(launches)
        ]
        # From the end: what the first pass read last is still in the cache.
        self._updates = [self._update(*launch, passes.AGREED.value) for launch in reversed(launches)]
        self._finds = [self._update(*launch, passes.FIND.value) for launch in launches if launch[0].cut]

    def _update(self, kind: _Launch, start: int, stop: int, cut: int) -> tuple[_Launch, Any]:
        constants = {**kind.constants(), "cut": cut if kind.cut else None, "cut_count": self._cut_blocks}
        return kind, partial(
            passes.update[(stop - start,)], self._table[start:stop], self._gradients, **constants, **LAUNCH
        )

    def moved(self, gradients: Sequence[int]) -> None:
        """Go on with gradients at other addresses.

        Raises:
            RuntimeError: a CUDA graph is being captured, and one of them is aligned otherwise.
        """
        addresses = _int64(gradients)
        aligned_alike = torch.equal(addresses % 16, self._addresses % 16)
        if _capturing(self._device):
            if not aligned_alike:
                raise RuntimeError("while a CUDA graph is captured, gradients must stay aligned as they were")
            addresses = self._captured.copy_(addresses)
        elif self._device.type == "cuda":
            addresses = addresses.pin_memory()
        self._gradients.copy_(addresses, non_blocking=True)
        if not aligned_alike:
            self._addresses = addresses
            self._arrange()

    def sum_of_squares(self, more: int = 0) -> Tensor:
        """See :func:`novoscale.kernels.reference.sum_of_squares`."""
        statistic = torch.zeros(self._statistic_size + more, dtype=torch.float64, device=self._device)
        with torch.cuda.device(self._index):  # nothing where it is -1, the CPU's
            for launch in self._statistics:
                launch(statistic)
            self._ends(statistic)
            self._panels.add_to(statistic)
        return statistic

    def largest(self, coefficients: Coefficients) -> Tensor:
        """See :func:`novoscale.kernels.reference.largest`."""
        found = torch.zeros(2, self._cut_blocks, dtype=torch.int32, device=self._device)
        self._launch(self._finds, coefficients, found)
        return found

    def update(self, coefficients: Coefficients) -> None:
        """See :func:`novoscale.kernels.reference.update`."""
        cut = coefficients.cut
        assert cut is not None or not self._finds
        self._launch(self._updates, coefficients, None if cut is None else cut.contiguous())

    def _launch(self, launches: list[tuple[_Launch, Any]], c: Coefficients, cut: Tensor | None) -> None:
        vectors = [c.each.float(), c.options.float(), c.active, c.key]
        row_root, column_root = (None if t is None else t.float() for t in (c.row_root, c.column_root))
        with torch.cuda.device(self._index):
            for kind, launch in launches:
                # None where it is not needed: the kernel is the same whatever else there is in the model.
                roots = (row_root, column_root) if kind.factored else (None, None)
                launch(*vectors, *roots, cut if kind.cut else None)


def _capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _rows(shards: Sequence[Shard], table: Tensor) -> Tensor:
    """The rows of the table, in the order of the chunks."""
    start, stop, layer, position, size, place, column, cut, shard_of = table.unbind(1)
    in_blocks = torch.tensor([s.exp_avg_scale is not None for s in shards], dtype=torch.bool, device="cpu")[
        shard_of
    ]
    begin = torch.where(in_blocks, position % BLOCK, start % ALIGNMENT)
    # Where index 0 of the chunk lies, in elements of each tensor or, of the codes and scales, in blocks.
    first = start - begin
    index = torch.stack((first, first, torch.where(in_blocks, place, place - begin), place), dim=1)
    tensors = [(s.param, s.grad, s.exp_avg, s.exp_avg_scale) for s in shards]
    address = _int64([[0 if t is None else t.data_ptr() for t in row] for row in tensors]).view(-1, 4)
    address[:, 1] = 0  # gradients may move
    itemsize = _int64([[0 if t is None else t.element_size() for t in row] for row in tensors]).view(-1, 4)
    itemsize[:, 2] *= _int64([BLOCK // form.packed if (form := _in_blocks(s)) else 1 for s in shards])
    # A layer larger than a chunk ends in it at most once, so that it may as well be as large as one.
    within, width = position % size, size
    left = size - within
    size = size.clamp(max=CHUNK)
    several = stop - start > left
    rows = torch.zeros(len(table), passes.ROW.value, dtype=torch.int64, device="cpu")
    rows[:, [c.value for c in (passes.PARAM, passes.GRAD, passes.EXP_AVG, passes.SCALE)]] = (
        address[shard_of] + index * itemsize[shard_of]
    )
    rows[:, passes.BEGIN.value] = begin
    rows[:, passes.END.value] = begin + stop - start
    rows[:, passes.LAYER.value] = layer
    rows[:, passes.SLOT.value] = (column < 0).cumsum(0) - 1
    rows[:, passes.POSITION.value] = position
    rows[:, passes.WITHIN.value] = size - torch.minimum(left, size)
    rows[:, passes.SIZE.value] = size
    factored = column >= 0
    rows[:, passes.COLUMN.value] = torch.where(factored, column + within - begin, 0)
    rows[:, passes.WIDTH.value] = torch.where(factored & several, width, 0)
    rows[:, passes.CUT.value] = cut
    rows[:, passes.GROUP.value] = _int64([s.group for s in shards])[shard_of]
    rows[:, passes.SHARD.value] = shard_of
    return rows


class _Launch(NamedTuple):
    """What the chunks of one launch have in common: beside their tensors' options, arguments of the kernels.

    Attributes:
        options: of the tensors.
        factored: whether they are of factored parameters.
        width: of passes.rows_statistic; 0 where the chunks lie in one layer each, or are factored.
        group: of passes.update.
        ragged: of passes.update.
        cut: whether they are pieces of cut blocks.
    """

    options: _Options
    factored: bool
    width: int
    group: int
    ragged: bool
    cut: bool

    def constants(self) -> dict[str, Any]:
        """The arguments of passes.update."""
        divided = ("term" if self.options.reg_inside_moment else "change") if self.factored else None
        found = {
            **self.options.constants(),
            "divided": divided,
            "group": self.group,
            "ragged": self.ragged,
        }
        return found | {"tile": BLOCK if self.cut else TILE // 2 if halved(found) else TILE}


def _launches(
    rows: Tensor, gradients: Tensor, factored: Tensor, options: Sequence[_Options], option_of: Tensor
) -> tuple[list[tuple[_Launch, int, int]], Tensor]:
    """The launches of the update, each with its first and last (exclusive) row, and the order of the rows."""
    begin, end, within, size = (
        rows[:, c.value] for c in (passes.BEGIN, passes.END, passes.WITHIN, passes.SIZE)
    )
    several = within + end - begin > size
    widths = 1 << torch.arange(3, TILE.bit_length(), device="cpu")
    width = torch.where(several & ~factored, widths[torch.bucketize(size.clamp(max=TILE), widths)], 0)
    group = torch.where(((within - begin) | size) % GROUP == 0, GROUP, 1)
    cut = rows[:, passes.CUT.value] >= 0
    group = torch.where(several | cut, group, 0)  # cut blocks always with what each element's layer does
    grad = gradients[rows[:, passes.SHARD.value]] + rows[:, passes.GRAD.value]
    addresses = rows[:, passes.PARAM.value] | grad
    columns = rows[:, passes.COLUMN.value] | rows[:, passes.WIDTH.value]
    ragged = ((begin | end) % GROUP != 0) | (addresses % 16 != 0) | ((group != 1) & (columns % GROUP != 0))
    ragged &= rows[:, passes.SCALE.value] != 0
    # In an order in which the launches of the statistic, which depend on fewer options, have theirs together.
    prefixes = {o[:2]: i for i, o in enumerate(options)}
    prefix = _int64([prefixes[o[:2]] for o in options])[option_of]
    kinds = torch.stack((factored.long(), prefix, width, option_of, group, ragged.long(), cut.long()), dim=1)
    found, kind_of, counts = torch.unique(kinds, dim=0, return_inverse=True, return_counts=True)
    bounds = [0, *counts.cumsum(0).tolist()]
    launches = [
        (_Launch(options[option], bool(is_factored), width, group, bool(ragged), bool(is_cut)), a, b)
        for (is_factored, _, width, option, group, ragged, is_cut), a, b in zip(
            found.tolist(), bounds[:-1], bounds[1:], strict=True
        )
    ]
    return launches, torch.argsort(kind_of, stable=True)


def _merged(
    launches: list[tuple[_Launch, int, int]],
) -> list[tuple[tuple[int, torch.dtype, int], int, int]]:
    """The launches of the statistic: fewer than of the update, for it depends on fewer options.

    Those of factored parameters are made by Panels.
    """
    plain = [launch for launch in launches if not launch[0].factored]
    groups = groupby(plain, key=lambda x: (x[0].options.norm_type, x[0].options.grad, x[0].width))
    return [(key, found[0][1], found[-1][2]) for key, found in ((k, list(g)) for k, g in groups)]


def _ends(table: Tensor, norm_types: Tensor) -> Tensor:
    """The layers that are first or last in a chunk, which partials are their own, and their norm type.

    Of the two partials of a chunk the second is of its last layer; chunks are in the order of their layers,
    so that the partials are.
    """
    within = table[:, POSITION] % table[:, SIZE]
    last = table[:, LAYER] + (within + table[:, STOP] - table[:, START] - 1) // table[:, SIZE]
    owners = torch.stack((table[:, LAYER], last), dim=1).view(-1)
    layers, counts = torch.unique_consecutive(owners, return_counts=True)
    stop = counts.cumsum(0)
    norm_type = norm_types[table[(stop - 1) // 2, -1]]
    return torch.stack((layers, stop - counts, stop, norm_type), dim=1)


def _int64(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")
