"""Both passes for GPUs, in Triton: the launches of a step do not grow with the number of tensors.

A table on the device has one row for each chunk of some thousand elements: where its weights, gradient and
first moment lie, as addresses, and which layer they belong to. It is made once and serves until a tensor
moves. The statistic takes two launches, one partial for each chunk and then their sum for each layer in a
fixed order; without atomics two runs give the same bits. The update is one more, and gives the bits of
``reference``. Nothing depends on CUDA: the same code runs on ROCm, and on the CPU with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from novoscale.kernels.shards import Coefficients, Shard, chunks, in_one_order

# Elements of a chunk, the work of one program: enough of them to fill a GPU from models of a few million
# elements on (an H100 runs about two thousand programs at a time), and a table of 64 bytes in 16384
# elements, which is nothing beside what they take. A multiple of ALIGNMENT.
CHUNK = 1 << 14
# Elements a program handles at a time: eight a thread, which is 128 bits of bfloat16 or twice 128 of float32
# from each tensor. With at most 48 registers a thread, as many threads run as have more bytes in flight than
# the memory's latency times its bandwidth asks for. A warp of AMD's data-centre GPUs has 64 lanes.
WARPS = 4
BLOCK = 8 * WARPS * (64 if torch.version.hip else 32)

# No multiply-add is fused but where the kernels say so: the reference rounds each product and each sum.
LAUNCH = {"num_warps": WARPS, "enable_fp_fusion": False}

# Weights and gradients, and the first moment. A further format is an entry here and a case in _load and
# _store.
FORMATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
MOMENTS = (torch.float32, torch.bfloat16)

# Chunks begin at a multiple of so many elements of their tensor, the first lanes masked where their segment
# begins within: then one block of a segment is handled by elements, and not its whole first chunk.
ALIGNMENT = 16

# The columns of the table, int64. A row is 64 bytes, so that the rows of each launch are aligned alike.
_PARAM = tl.constexpr(0)  # addresses of the chunk's first element, 0 where there is no such tensor
_GRAD = tl.constexpr(1)
_EXP_AVG = tl.constexpr(2)
_BEGIN = tl.constexpr(3)  # its elements begin..end, counted from there, are those of the segment
_END = tl.constexpr(4)
_LAYER = tl.constexpr(5)  # of all layers
_SLOT = tl.constexpr(6)  # its place in the vector of partials
_ROW = tl.constexpr(8)

# With a type, because Triton ships none.
_jit: Callable[[Callable[..., Any]], Any] = triton.jit


@_jit
def _pointers(address: tl.tensor, index: tl.tensor, dtype: tl.constexpr, aligned: tl.constexpr) -> tl.tensor:
    pointer = address.to(tl.pointer_type(dtype))
    if aligned:  # the compiler cannot know it of an address from a table
        pointer = tl.multiple_of(pointer, 16)
    return pointer + index


@_jit
def _load(
    address: tl.tensor, index: tl.tensor, mask: tl.tensor, dtype: tl.constexpr, aligned: tl.constexpr
) -> tl.tensor:
    """Elements ``index`` of the tensor at ``address``, as float32."""
    if dtype == tl.bfloat16:
        # By integers: Triton's interpreter is wrong for subnormal values, and it is as fast.
        bits = tl.load(_pointers(address, index, tl.uint16, aligned), mask=mask)
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return tl.load(_pointers(address, index, dtype, aligned), mask=mask).to(tl.float32)


@_jit
def _store(
    address: tl.tensor,
    index: tl.tensor,
    value: tl.tensor,
    mask: tl.tensor,
    dtype: tl.constexpr,
    aligned: tl.constexpr,
) -> None:
    """Round float32 ``value`` to the nearest of ``dtype``, to even in the middle, and write it."""
    if dtype == tl.bfloat16:
        # By integers: Triton's interpreter cuts off, and not every GPU can do it in one instruction.
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(value == value, bits, 0x7FC0).to(tl.uint16)
        tl.store(_pointers(address, index, tl.uint16, aligned), bits, mask=mask)
    else:
        tl.store(_pointers(address, index, dtype, aligned), value.to(dtype), mask=mask)


@_jit
def _accumulate(total: tl.tensor, value: tl.tensor, squares: tl.constexpr) -> tl.tensor:
    if squares:
        # The product is exact, so that fusing it with the sum saves an instruction and not a rounding.
        wide = value.to(tl.float64)
        return tl.fma(wide, wide, total)
    # Without its sign, a float32 orders as the integer of the same bits, and NaN is above infinity.
    return tl.maximum(total, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)


@_jit
def _chunk_statistic(
    table: tl.tensor, partials: tl.tensor, grad_type: tl.constexpr, squares: tl.constexpr, block: tl.constexpr
) -> None:
    """The statistic of each chunk, a float64: the sum of g**2, or the largest abs(g)."""
    row = table + tl.program_id(0) * _ROW
    grad = tl.load(row + _GRAD)
    begin = tl.load(row + _BEGIN).to(tl.int32)
    end = tl.load(row + _END).to(tl.int32)
    total = tl.zeros([block], tl.float64 if squares else tl.int32)
    for offset in range(0, end, block):
        index = offset + tl.arange(0, block)
        if (grad % 16 == 0) & (offset >= begin) & (offset + block <= end):
            total = _accumulate(total, _load(grad, index, None, grad_type, True), squares)
        else:
            inside = (index >= begin) & (index < end)
            value = tl.where(inside, _load(grad, index, inside, grad_type, False), 0.0)
            total = _accumulate(total, value, squares)
    result = tl.sum(total) if squares else tl.max(total).to(tl.float32, bitcast=True).to(tl.float64)
    tl.store(partials + tl.load(row + _SLOT), result)


@_jit
def _layer_statistic(
    table: tl.tensor, partials: tl.tensor, statistic: tl.tensor, block: tl.constexpr
) -> None:
    """The statistic of each layer. A row of its table: first and last (exclusive) partial, norm type."""
    layer = tl.program_id(0)
    first = tl.load(table + layer * 3)
    last = tl.load(table + layer * 3 + 1)
    total = tl.zeros([block], tl.float64)
    largest = tl.zeros([block], tl.int64)
    for offset in range(first, last, block):
        index = offset + tl.arange(0, block)
        value = tl.load(partials + index, mask=index < last, other=0.0)
        total += value
        largest = tl.maximum(largest, value.to(tl.int64, bitcast=True))
    if tl.load(table + layer * 3 + 2) == 2:
        tl.store(statistic + layer, tl.sum(total))
    else:
        tl.store(statistic + layer, tl.max(largest).to(tl.float64, bitcast=True))


@_jit
def _update_block(
    param: tl.tensor,
    grad: tl.tensor,
    exp_avg: tl.tensor,
    index: tl.tensor,
    mask: tl.tensor,
    grad_scale: tl.tensor,
    step_size: tl.tensor,
    decay: tl.tensor,
    beta1: tl.tensor,
    beta3: tl.tensor,
    weight_decay: tl.tensor,
    param_type: tl.constexpr,
    grad_type: tl.constexpr,
    exp_avg_type: tl.constexpr,
    inside: tl.constexpr,
    outside: tl.constexpr,
    aligned: tl.constexpr,
) -> None:
    """The order of reference.update. No multiply-add is fused: see LAUNCH."""
    weight = _load(param, index, mask, param_type, aligned)
    moment = _load(grad, index, mask, grad_type, aligned) * grad_scale
    if inside:
        moment += weight * weight_decay
    moment *= beta3  # where it is 1, the same bits
    if exp_avg_type is not None:
        moment += _load(exp_avg, index, mask, exp_avg_type, aligned) * beta1
        _store(exp_avg, index, moment, mask, exp_avg_type, aligned)
    change = moment * step_size
    if outside:
        change += weight * decay
    _store(param, index, weight - change, mask, param_type, aligned)


@_jit
def _update(
    table: tl.tensor,
    grad_scale: tl.tensor,
    step_size: tl.tensor,
    decay: tl.tensor,
    active: tl.tensor,
    beta1: tl.tensor,
    beta3: tl.tensor,
    weight_decay: tl.tensor,
    param_type: tl.constexpr,
    grad_type: tl.constexpr,
    exp_avg_type: tl.constexpr,
    inside: tl.constexpr,
    outside: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """First moment and weights of the active layers, in place."""
    # From the end: what the first pass read last is still in the cache.
    row = table + (tl.num_programs(0) - 1 - tl.program_id(0)) * _ROW
    layer = tl.load(row + _LAYER)
    if tl.load(active + layer):
        param = tl.load(row + _PARAM)
        grad = tl.load(row + _GRAD)
        exp_avg = tl.load(row + _EXP_AVG)
        begin = tl.load(row + _BEGIN).to(tl.int32)
        end = tl.load(row + _END).to(tl.int32)
        scale = tl.load(grad_scale + layer).to(tl.float32)
        step = tl.load(step_size + layer).to(tl.float32)
        shrink = tl.load(decay + layer).to(tl.float32)
        for offset in range(0, end, block):
            index = offset + tl.arange(0, block)
            if ((param | grad | exp_avg) % 16 == 0) & (offset >= begin) & (offset + block <= end):
                _update_block(
                    param, grad, exp_avg, index, None, scale, step, shrink, beta1, beta3, weight_decay,
                    param_type, grad_type, exp_avg_type, inside, outside, True,
                )  # fmt: skip
            else:
                mask = (index >= begin) & (index < end)
                _update_block(
                    param, grad, exp_avg, index, mask, scale, step, shrink, beta1, beta3, weight_decay,
                    param_type, grad_type, exp_avg_type, inside, outside, False,
                )  # fmt: skip


def load() -> None:
    """Find out whether Triton can compile for the GPU of this machine.

    Raises:
        RuntimeError: it has no driver for it.
    """
    triton.runtime.driver.active.get_current_target()


def supports(shard: Shard) -> bool:
    """Whether these kernels can take a tensor that is on a GPU; others are for ``reference``.

    Its weights, gradient and first moment have to be of the formats above, on one device, and in one order:
    see ``shards.in_one_order``.
    """
    if any(t.dtype not in FORMATS or t.device != shard.param.device for t in shard.tensors):
        return False
    if shard.exp_avg is not None and shard.exp_avg.dtype not in MOMENTS:
        return False
    return in_one_order(shard)


class _Options(NamedTuple):
    """What the tensors of one launch have in common. The first two are all that the statistic depends on."""

    norm_type: int
    grad: torch.dtype
    param: torch.dtype
    exp_avg: torch.dtype | None
    beta1: float
    beta3: float
    weight_decay: float
    reg_inside_moment: bool


def _options(shard: Shard) -> _Options:
    return _Options(
        shard.norm_type,
        shard.grad.dtype,
        shard.param.dtype,
        None if shard.exp_avg is None else shard.exp_avg.dtype,
        float(shard.beta1),
        float(shard.beta3),
        float(shard.weight_decay),
        bool(shard.reg_inside_moment),
    )


class Kernels:
    """Both passes, for tensors that stay where they are. Holds their addresses, and does not keep them alive.

    To be made anew when an option of a param group changes or a tensor moves; for gradients, which move in
    ordinary training, there is :meth:`moved`. The passes do not wait for
    the device and can be captured in a CUDA graph, once they have run and Triton has compiled them.

    Args:
        shards: the tensors; :func:`supports` is true of each.
        device: where they are, and the vectors that have one element per layer.
        layers: how many layers there are.

    Raises:
        ValueError: a tensor that these kernels cannot take, or that is somewhere else.
    """

    def __init__(self, shards: Sequence[Shard], device: torch.device, layers: int) -> None:
        self._layers, self._device = layers, device
        table = chunks(shards, CHUNK)
        partials = torch.empty(len(table), dtype=torch.float64, device=device)
        for shard in shards:
            if not supports(shard) or shard.param.device != partials.device:
                where = f"of strides {shard.param.stride()} on {shard.param.device}"
                raise ValueError(f"the Triton kernels on {device} cannot take {_options(shard)} {where}")
        self._index = partials.get_device()
        rows, launches, self._shard_of = _rows(shards, table)
        self._from_grad = rows[:, _GRAD.value] - _int64([s.grad.data_ptr() for s in shards])[self._shard_of]
        self._table = _to(device, rows)
        self._partials = [
            partial(
                _chunk_statistic[(stop - start,)],
                self._table[start:stop],
                partials,
                grad_type=FORMATS[grad],
                squares=norm_type == 2,
                block=BLOCK,
                **LAUNCH,
            )
            for (norm_type, grad), start, stop in _merged(launches)
        ]
        self._statistic = partial(
            _layer_statistic[(layers,)],
            _to(device, _layer_rows(table, _int64([s.norm_type for s in shards]), layers)),
            partials,
            block=BLOCK,
            **LAUNCH,
        )
        self._updates = [
            partial(
                _update[(stop - start,)],
                self._table[start:stop],
                beta1=o.beta1,
                beta3=o.beta3,
                weight_decay=o.weight_decay,
                param_type=FORMATS[o.param],
                grad_type=FORMATS[o.grad],
                exp_avg_type=None if o.exp_avg is None else FORMATS[o.exp_avg],
                inside=o.weight_decay != 0 and o.reg_inside_moment,
                outside=o.weight_decay != 0 and not o.reg_inside_moment,
                block=BLOCK,
                **LAUNCH,
            )
            for o, start, stop in reversed(launches)
        ]

    def moved(self, gradients: Sequence[int]) -> None:
        """Go on with gradients at other addresses."""
        column = _int64(gradients)[self._shard_of] + self._from_grad
        self._table[:, _GRAD.value] = _to(self._device, column)

    def sum_of_squares(self) -> Tensor:
        """See :func:`novoscale.kernels.reference.sum_of_squares`."""
        statistic = torch.empty(self._layers, dtype=torch.float64, device=self._device)
        with torch.cuda.device(self._index):  # nothing where it is -1, the CPU's
            for launch in self._partials:
                launch()
            self._statistic(statistic)
        return statistic

    def update(self, coefficients: Coefficients) -> None:
        """See :func:`novoscale.kernels.reference.update`."""
        vectors = (
            coefficients.grad_scale.contiguous(),
            coefficients.step_size.contiguous(),
            coefficients.decay.contiguous(),
            coefficients.active.contiguous(),
        )
        with torch.cuda.device(self._index):
            for launch in self._updates:
                launch(*vectors)


def _rows(shards: Sequence[Shard], chunks: Tensor) -> tuple[Tensor, list[tuple[_Options, int, int]], Tensor]:
    """The table, the chunks of one launch next to each other; each launch's rows; each row's shard."""
    options = [_options(shard) for shard in shards]
    # By name, for dtypes have no order; it puts those together that have the first options in common.
    kinds = sorted(set(options), key=str)
    kind = {o: i for i, o in enumerate(kinds)}
    tensors = [(shard.param, shard.grad, shard.exp_avg) for shard in shards]
    address = _int64([[0 if t is None else t.data_ptr() for t in row] for row in tensors]).view(-1, 3)
    size = _int64([[0 if t is None else t.element_size() for t in row] for row in tensors]).view(-1, 3)
    shard_of, start, stop, layer = chunks.unbind(1)
    begin = start % ALIGNMENT
    first = start - begin
    rows = torch.zeros(len(chunks), _ROW.value, dtype=torch.int64, device="cpu")
    rows[:, : _BEGIN.value] = address[shard_of] + first[:, None] * size[shard_of]
    rows[:, _BEGIN.value] = begin
    rows[:, _END.value] = stop - first
    rows[:, _LAYER.value] = layer
    rows[:, _SLOT.value] = torch.arange(len(chunks), device="cpu")
    kind_of = _int64([kind[o] for o in options])[shard_of]
    bounds = [0, *torch.bincount(kind_of, minlength=len(kinds)).cumsum(0).tolist()]
    launches = [(o, a, b) for o, a, b in zip(kinds, bounds[:-1], bounds[1:], strict=True) if a < b]
    order = torch.argsort(kind_of, stable=True)
    return rows[order], launches, shard_of[order]


def _merged(launches: list[tuple[_Options, int, int]]) -> list[tuple[tuple[int, torch.dtype], int, int]]:
    """The launches of the statistic: fewer than of the update, for it depends on fewer options."""
    groups = groupby(launches, key=lambda launch: (launch[0].norm_type, launch[0].grad))
    return [(key, rows[0][1], rows[-1][2]) for key, rows in ((k, list(g)) for k, g in groups)]


def _layer_rows(chunks: Tensor, norm_types: Tensor, layers: int) -> Tensor:
    """For each layer, which partials are its own, and its norm type; int64 ``[layers, 3]``."""
    shard, layer = chunks[:, 0], chunks[:, 3].contiguous()
    bounds = torch.searchsorted(layer, torch.arange(layers + 1, device="cpu"))
    norm_type = torch.full((layers,), 2, dtype=torch.int64, device="cpu")
    norm_type[layer] = norm_types[shard]
    return torch.stack((bounds[:-1], bounds[1:], norm_type), dim=1)


def _int64(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _to(device: torch.device, table: Tensor) -> Tensor:
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)
