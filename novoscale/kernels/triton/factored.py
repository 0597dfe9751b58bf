"""The statistic of factored parameters in Triton: sums of squares along rows and along columns, in one read.

A panel is a matrix, and each program has a strip of it, some hundred rows of some hundred columns: it writes
the partial sum of each of its rows and of each of its columns. A second kernel adds those of a layer or of a
column in a fixed order; without atomics two runs give the same bits. This is done in waves, each of which
writes its partials over those of the last: so they take no more memory in a larger model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from novoscale.kernels.shards import OF_SHARD, WIDTH, Shard, panels
from novoscale.kernels.triton import exact_sums
from novoscale.kernels.triton.formats import FORMATS, jit, load_elements
from novoscale.kernels.triton.tables import codes, ratio, to_device
from novoscale.sharding.indices import repeated

# Columns of a strip: few in a narrow panel, so that no thread is without work; in a wide one as many as a
# warp reads at a time of bfloat16, so that the sum of a row stays within the warp.
WIDTHS = (16, 64, 256)
# Panels are split into parts of at most so many rows and columns, a multiple of a strip's. So few that the
# partials of a part are at most a tenth of PARTIALS, and that a thread adds few of them one after another.
SIDE = 1 << 13
# There are at most so many float64 partials at a time: 64 MiB.
PARTIALS = 1 << 23
# Sums that a program of the second kernel makes: 512 consecutive bytes of each row of partials.
SUMS = tl.constexpr(64)

# The columns of the table of strips, int64; 64 bytes, the last eight unused.
GRAD = tl.constexpr(0)  # bytes from the beginning of the gradient, which may move, to the first element
ROWS = tl.constexpr(1)
COLUMNS = tl.constexpr(2)
PITCH = tl.constexpr(3)  # elements from a row to the next
OF_ROWS = tl.constexpr(4)  # where the partials of its rows go
OF_COLUMNS = tl.constexpr(5)
SHARD = tl.constexpr(6)  # of all gradients, the one of the elements
STRIP = tl.constexpr(8)

# The columns of the table of sources, int64: matrices of partials, whose columns are to be summed. 32 bytes.
PLACE = tl.constexpr(0)  # of the first partial
BEGIN = tl.constexpr(1)  # the sums are elements BEGIN..END of the statistic
END = tl.constexpr(2)
MANY = tl.constexpr(3)  # rows of the matrix
SOURCE = tl.constexpr(4)

# The columns of the table of destinations, int64: SUMS consecutive elements of the statistic, and the sources
# that are added to them. 32 bytes, the last eight unused.
FIRST = tl.constexpr(0)
FIRST_SOURCE = tl.constexpr(1)
LAST_SOURCE = tl.constexpr(2)  # exclusive
DESTINATION = tl.constexpr(4)


# ---- kernels ---------------------------------------------------------------------------------------------


@jit
def _tile(
    grad: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    pitch: tl.tensor,
    grad_type: tl.constexpr,
    aligned: tl.constexpr,
) -> tl.tensor:
    """The elements of some rows and columns; 0 outside the strip."""
    index = row.to(tl.int64)[:, None] * pitch + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if aligned:
        index = tl.max_contiguous(tl.multiple_of(index, (1, 8)), (1, 8))
        inside = tl.max_constancy(inside, (1, 8))
    return tl.where(inside, load_elements(grad, index, inside, grad_type, aligned), 0.0)


@jit
def _strip_in_float64(
    grad: tl.tensor,
    of_rows: tl.tensor,
    of_columns: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    pitch: tl.tensor,
    grad_type: tl.constexpr,
    width: tl.constexpr,
    tile: tl.constexpr,
    aligned: tl.constexpr,
) -> None:
    row = tl.arange(0, tile // width)
    column = tl.arange(0, width)
    totals = tl.zeros([tile // width, width], tl.float64)
    value = _tile(grad, row, column, rows, columns, pitch, grad_type, aligned)
    following = _tile(grad, row + tile // width, column, rows, columns, pitch, grad_type, aligned)
    for _ in range(0, rows, tile // width):
        squares = value.to(tl.float64) * value.to(tl.float64)
        totals += squares
        # Two tiles are on their way while the rows of this one are added.
        value = following
        following = _tile(grad, row + 2 * (tile // width), column, rows, columns, pitch, grad_type, aligned)
        tl.store(of_rows + row, tl.sum(squares, 1), mask=row < rows)
        row += tile // width
    tl.store(of_columns + column, tl.sum(totals, 0), mask=column < columns)


@jit
def _strip_in_words(
    grad: tl.tensor,
    of_rows: tl.tensor,
    of_columns: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    pitch: tl.tensor,
    grad_type: tl.constexpr,
    width: tl.constexpr,
    tile: tl.constexpr,
    aligned: tl.constexpr,
) -> tl.tensor:
    """The same, added as exact_sums does; returns whether any of the sums is wrong."""
    row = tl.arange(0, tile // width)
    column = tl.arange(0, width)
    high = tl.zeros([tile // width, width], tl.float32)
    middle, low = high, high
    any_wrong = row < 0
    value = _tile(grad, row, column, rows, columns, pitch, grad_type, aligned)
    for _ in range(0, rows, tile // width):
        product, rest, least = exact_sums.square(value)
        high, middle, low = exact_sums.add(high, middle, low, product, rest, least)
        value = _tile(grad, row + tile // width, column, rows, columns, pitch, grad_type, aligned)
        sums, wrong = exact_sums.total(product, rest, least, 1)
        any_wrong = any_wrong | wrong
        tl.store(of_rows + row, sums, mask=row < rows)
        row += tile // width
    sums, wrong = exact_sums.total(high, middle, low, 0)
    tl.store(of_columns + column, sums, mask=column < columns)
    return (tl.max(any_wrong.to(tl.int32)) | tl.max(wrong.to(tl.int32))) > 0


@jit
def _strip(
    grad: tl.tensor,
    of_rows: tl.tensor,
    of_columns: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    pitch: tl.tensor,
    grad_type: tl.constexpr,
    in_words: tl.constexpr,
    width: tl.constexpr,
    tile: tl.constexpr,
    aligned: tl.constexpr,
) -> None:
    if in_words:
        if _strip_in_words(grad, of_rows, of_columns, rows, columns, pitch, grad_type, width, tile, aligned):
            tl.debug_barrier()  # another thread may have written what is written again
            _strip_in_float64(
                grad, of_rows, of_columns, rows, columns, pitch, grad_type, width, tile, aligned
            )
    else:
        _strip_in_float64(grad, of_rows, of_columns, rows, columns, pitch, grad_type, width, tile, aligned)


@jit
def strip_statistic(
    table: tl.tensor,
    gradients: tl.tensor,
    partials: tl.tensor,
    statistic: tl.tensor,
    grad_type: tl.constexpr,
    in_words: tl.constexpr,
    width: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """The sums of g**2 of the rows and of the columns of each strip, which has at most ``width`` columns.

    ``gradients``: the address of each. ``in_words``: see ``statistic.chunk_statistic``. ``statistic`` is for
    panel_statistic only.
    """
    strip = table + tl.program_id(0) * STRIP
    grad = tl.load(gradients + tl.load(strip + SHARD)) + tl.load(strip + GRAD)
    rows = tl.load(strip + ROWS).to(tl.int32)
    columns = tl.load(strip + COLUMNS).to(tl.int32)
    pitch = tl.load(strip + PITCH)
    of_rows = partials + tl.load(strip + OF_ROWS)
    of_columns = partials + tl.load(strip + OF_COLUMNS)
    if (grad % 16 == 0) & ((pitch | columns) % 8 == 0):
        _strip(grad, of_rows, of_columns, rows, columns, pitch, grad_type, in_words, width, tile, True)
    else:
        _strip(grad, of_rows, of_columns, rows, columns, pitch, grad_type, in_words, width, tile, False)


@jit
def panel_statistic(
    table: tl.tensor, sources: tl.tensor, partials: tl.tensor, statistic: tl.tensor, tile: tl.constexpr
) -> None:
    """Add its partials to each sum of the statistic: source by source, in the order of the table."""
    rows: tl.constexpr = tile // SUMS
    row = table + tl.program_id(0) * DESTINATION
    index = tl.load(row + FIRST) + tl.arange(0, SUMS)
    total = tl.zeros([rows, SUMS], tl.float64)
    written = index < 0
    for number in range(tl.load(row + FIRST_SOURCE), tl.load(row + LAST_SOURCE)):
        source = sources + number * SOURCE
        begin = tl.load(source + BEGIN)
        end = tl.load(source + END)
        many = tl.load(source + MANY).to(tl.int32)
        inside = (index >= begin) & (index < end)
        written = written | inside
        matrix = partials + tl.load(source + PLACE) + (index - begin)[None, :]
        for first in range(0, many, rows):
            nth = first + tl.arange(0, rows)[:, None]
            total += tl.load(matrix + nth * (end - begin), mask=inside[None, :] & (nth < many), other=0.0)
    sums = tl.load(statistic + index, mask=written) + tl.sum(total, 0)
    tl.store(statistic + index, sums, mask=written)


# ---- tables and launches ---------------------------------------------------------------------------------


class Panels:
    """The sums of factored parameters: a part of ``elements.Kernels``.

    Args:
        shards: the tensors, of which only the pieces of factored parameters are used.
        gradients: the address of each, int64 on the device.
        layers: how many layers there are; the columns come after them in the statistic.
        area: elements of a strip: a power of two, at most SIDE times the smallest of WIDTHS.
        tile: elements a program handles at a time: a power of two, from the largest of WIDTHS to ``area``.
        in_words: see statistic.chunk_statistic.
        options: of all launches.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        gradients: Tensor,
        layers: int,
        area: int,
        tile: int,
        in_words: bool,
        **options: Any,
    ) -> None:
        parts = _parts(shards, area)
        strips, part = _strips(parts, _int64([s.grad.element_size() for s in shards]))
        device = self._device = gradients.device
        strips = to_device(device, strips)
        self._partials = parts.partials
        launches: list[tuple[int, Any]] = []
        for (wave, dtype, width), a, b in _runs(torch.stack((parts.wave, parts.dtype, parts.width), 1)[part]):
            kind = {"grad_type": list(FORMATS.values())[dtype], "in_words": in_words, "width": width}
            launch = strip_statistic[(b - a,)]
            launches.append((wave, partial(launch, strips[a:b], gradients, tile=tile, **kind, **options)))
        destinations, wave_of, sources = _sums(parts, layers)
        destinations, sources = to_device(device, destinations), to_device(device, sources)
        for (wave,), a, b in _runs(wave_of[:, None]):
            tables = (destinations[a:b], sources)
            launches.append((wave, partial(panel_statistic[(b - a,)], *tables, tile=tile, **options)))
        # In each wave the strips first, whose partials the sums are of.
        self._launches = [launch for _, launch in sorted(launches, key=lambda x: x[0])]

    def add_to(self, statistic: Tensor) -> None:
        """Add the sums to those of the statistic."""
        # Made here: there may be many tables, of which one is in use.
        partials = torch.empty(self._partials, dtype=torch.float64, device=self._device)
        for launch in self._launches:
            launch(partials, statistic)


class _Parts(NamedTuple):
    """What panels are split into: vectors with one element per part, wave by wave.

    Attributes:
        start: of the tensor, the first element.
        rows: how many.
        columns: how many.
        pitch: elements from a row to the next.
        layer: of the first row.
        column: the first one, of all columns.
        shard: the shard of the part.
        dtype: of the gradient, as a place in FORMATS.
        width: of its strips.
        across: how many strips are beside each other.
        down: how many strips are one below the other.
        height: of its strips.
        wave: in which wave it is: the partials of a wave exist at the same time.
        place: of its first partial.
        partials: how many all parts of the largest wave have.
    """

    start: Tensor
    rows: Tensor
    columns: Tensor
    pitch: Tensor
    layer: Tensor
    column: Tensor
    shard: Tensor
    dtype: Tensor
    width: Tensor
    across: Tensor
    down: Tensor
    height: Tensor
    wave: Tensor
    place: Tensor
    partials: int


def _parts(shards: Sequence[Shard], area: int) -> _Parts:
    table = panels(shards)
    dtypes, widths = list(FORMATS), _int64(WIDTHS)
    dtype = _int64([dtypes.index(s.grad.dtype) for s in shards])[table[:, OF_SHARD]]
    width = widths[torch.bucketize(table[:, WIDTH].clamp(max=WIDTHS[-1]), widths)]
    # Those of a launch next to each other.
    order = torch.argsort(dtype * WIDTHS[-1] + width, stable=True)
    start, rows, pitch, layer, column, shard = table[order].unbind(1)
    # How many of them are beside each other, and where each begins in its panel.
    beside = ratio(pitch, SIDE)
    panel, nth = repeated(ratio(rows, SIDE) * beside)
    top, left = nth // beside[panel] * SIDE, nth % beside[panel] * SIDE
    start, rows, pitch, layer, column, shard, dtype, width = (
        x[panel] for x in (start, rows, pitch, layer, column, shard, dtype[order], width[order])
    )
    start += top * pitch + left
    rows, columns = (rows - top).clamp(max=SIDE), (pitch - left).clamp(max=SIDE)
    height = area // width
    across, down = ratio(columns, width), ratio(rows, height)
    partials = rows * across + columns * down
    before = partials.cumsum(0) - partials
    # A part is of the wave that it begins in, and may end beyond it: by one part's partials at most.
    wave = before // (PARTIALS - int(partials.max())) if len(partials) else before
    _, wave, counts = torch.unique_consecutive(wave, return_inverse=True, return_counts=True)
    place = before - before[counts.cumsum(0) - counts][wave]
    most = int((place + partials).max()) if len(partials) else 0
    return _Parts(
        start, rows, columns, pitch, layer + top, column + left, shard, dtype, width, across, down, height,
        wave, place, most,
    )  # fmt: skip


def _strips(parts: _Parts, itemsize: Tensor) -> tuple[Tensor, Tensor]:
    """The table of strips, and the part of each; ``itemsize``: of the gradients."""
    part, nth = repeated(parts.across * parts.down)
    rows, columns, place, across = (
        parts.rows[part],
        parts.columns[part],
        parts.place[part],
        parts.across[part],
    )
    width, height, pitch = parts.width[part], parts.height[part], parts.pitch[part]
    # Strips beside each other follow each other: they read the same rows at the same time.
    down, right = nth // across, nth % across
    top, left = down * height, right * width
    entries = {
        GRAD: (parts.start[part] + top * pitch + left) * itemsize[parts.shard[part]],
        ROWS: torch.minimum(rows - top, height),
        COLUMNS: torch.minimum(columns - left, width),
        PITCH: pitch,
        OF_ROWS: place + right * rows + top,
        OF_COLUMNS: place + rows * across + down * columns + left,
        SHARD: parts.shard[part],
    }
    table = torch.zeros(len(part), STRIP.value, dtype=torch.int64, device="cpu")
    for column, values in entries.items():
        table[:, column.value] = values
    return table, part


def _sums(parts: _Parts, layers: int) -> tuple[Tensor, Tensor, Tensor]:
    """The table of destinations, the wave of each, and the sources in the order of the destinations."""
    of_rows = (parts.place, parts.layer, parts.layer + parts.rows, parts.across)
    first = layers + parts.column
    of_columns = (parts.place + parts.rows * parts.across, first, first + parts.columns, parts.down)
    sources = torch.stack([torch.stack(s, dim=1) for s in (of_rows, of_columns)], dim=1).view(-1, 4)
    begin = sources[:, BEGIN.value] // SUMS.value
    source, nth = repeated(ratio(sources[:, END.value], SUMS.value) - begin)
    destination, wave = begin[source] + nth, parts.wave[source // 2]
    code = codes(torch.stack((wave, destination), dim=1))
    order = torch.argsort(code, stable=True)
    _, counts = torch.unique_consecutive(code[order], return_counts=True)
    stop = counts.cumsum(0)
    some = order[stop - 1]
    first = destination[some] * SUMS.value
    table = torch.stack((first, stop - counts, stop, torch.zeros_like(stop)), dim=1)
    return table, wave[some], sources[source[order]]


def _runs(keys: Tensor) -> list[tuple[list[int], int, int]]:
    """Runs of equal rows: the row, and the first and the last (exclusive) place."""
    _, counts = torch.unique_consecutive(codes(keys), return_counts=True)
    stop = counts.cumsum(0)
    return list(zip(keys[stop - 1].tolist(), (stop - counts).tolist(), stop.tolist(), strict=True))


def _int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")
