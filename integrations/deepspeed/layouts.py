"""Which elements of the tensors that DeepSpeed's wrappers step belong to which layer.

Each function takes a wrapper that has just been constructed and yields, for each tensor that it will give to
its optimizer, the index of the param group, the tensor and its layout. Read in DeepSpeed 0.19.8; the tables
exist since 0.9.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from deepspeed import comm as dist
from torch import Tensor

from novoscale.sharding.layers import LayoutError, Parameter, describe, matrix_dimensions
from novoscale.sharding.layout import Fragment, Layout, unsharded
from novoscale.sharding.partition import one_after_another, partition

Bound = tuple[int, Tensor, Layout]

# Attribute of a wrapper: the places of the parameters that its optimizer was given, by id. They count frozen
# ones too, which DeepSpeed leaves out of its groups: the numbers of one process.
NUMBERS = "_novoscale_numbers"


def is_tensor_parallel(p: Tensor) -> bool:
    """Whether a parameter is one rank's part of a layer that is sharded over the tensor-parallel group."""
    return bool(getattr(p, "tensor_model_parallel", False) or getattr(p, "model_parallel", False))


def zero_1_and_2(zero: Any) -> Iterator[Bound]:
    """The flat partition of each param group under ZeRO stages 1 and 2.

    Read from the tables by which DeepSpeed copies gradients into the partitions. (``_hp_mapping`` is
    wrong with ``round_robin_gradients``: DeepSpeed 0.19.8, ``link_hp_params``.)
    """
    for i, params in enumerate(zero.bit16_groups):
        process_group = zero.real_dp_process_group[i]
        pieces: list[list[Fragment]] = [[] for _ in range(dist.get_world_size(group=process_group))]
        for layer, p in enumerate(params):
            key = zero.get_param_id(p)
            for holder in zero.param_to_partition_ids[i][key]:
                # int: DeepSpeed 0.16 computes with a partition_size that is a float.
                start = int(zero.grad_partition_insertion_offset[i][holder][key])
                offset = int(zero.grad_start_offset[i][holder][key])
                stop = min(start + p.numel() - offset, int(zero.partition_size[i]))
                pieces[holder].append(Fragment(start, stop, layer, offset))
        flat = zero.single_partition_of_fp32_groups[i]
        _check_weights(flat, [p.detach().reshape(-1) for p in params], pieces[_rank(process_group)])
        yield i, flat, _sharded(zero, i, params, pieces, flat, process_group)


def bf16(wrapper: Any) -> Iterator[Bound]:
    """The flat partition of each param group under BF16_Optimizer: the parameters one after another."""
    for i, params in enumerate(wrapper.bf16_groups):
        process_group = wrapper.real_dp_process_group[i]
        flat = wrapper.fp32_groups_flat_partition[i]
        world = dist.get_world_size(group=process_group)
        pieces = one_after_another([p.numel() for p in params], flat.numel(), world)
        _check_weights(flat, [p.detach().reshape(-1) for p in params], pieces[_rank(process_group)])
        yield i, flat, _sharded(wrapper, i, params, pieces, flat, process_group)


def zero_3(zero: Any) -> Iterator[Bound]:
    """The flat partition of each sub-group under ZeRO stage 3: an equal slice of every parameter.

    The end of the last slices is padding: of the weights uninitialised memory, which no fragment covers.
    """
    for sub_group, params in enumerate(zero.fp16_groups):
        process_group = process_group_of_sub_group(zero, sub_group)
        world = dist.get_world_size(group=process_group)
        pieces: list[list[Fragment]] = [[] for _ in range(world)]
        for layer, p in enumerate(params):
            _, start, length = zero.grad_position[zero.get_param_id(p)]
            for holder in range(world):
                real = min(max(p.ds_numel - holder * length, 0), length)
                if real:
                    pieces[holder].append(Fragment(start, start + real, layer, holder * length))
        flat = zero.fp32_partitioned_groups_flat[sub_group]
        group = zero.sub_group_to_group_id[sub_group]
        # ds_tensor is this rank's slice: put it where the slice lies in the parameter.
        rank = _rank(process_group)
        slices = [p.ds_tensor.detach().reshape(-1) for p in params]
        mine = [Fragment(s.start, s.stop, s.parameter) for s in pieces[rank]]
        _check_weights(flat, slices, mine)
        yield group, flat, _sharded(zero, group, params, pieces, flat, process_group)


def unfused(wrapper: Any) -> Iterator[Bound]:
    """The float32 copies of FP16_UnfusedOptimizer: unsharded parameters."""
    groups = wrapper.optimizer.param_groups
    for i, (copies, params) in enumerate(zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True)):
        granularity = groups[i].get("granularity", "tensor")
        for position, (copy, p) in enumerate(zip(copies, params, strict=True)):
            known = groups[i].get("param_names", ())
            name = (
                known[position] if len(known) == len(copies) else f"parameter {position} of param group {i}"
            )
            yield i, copy, unsharded(describe(name, copy.shape, granularity, number_of(wrapper, p)))


def process_group_of_sub_group(zero: Any, sub_group: int) -> Any:
    """The ranks over which the parameters of a sub-group of stage 3 are sharded."""
    if hasattr(zero, "sub_group_process_groups"):
        return zero.sub_group_process_groups[sub_group]
    return getattr(zero.fp16_groups[sub_group][0], "ds_process_group", zero.dp_process_group)


def number_of(wrapper: Any, p: Tensor) -> int:
    """The place of a parameter among all that the wrapper's optimizer was given: see ``Parameter.number``."""
    return int(getattr(wrapper, NUMBERS)[id(p)])


def _rank(process_group: Any) -> int:
    return int(dist.get_rank(group=process_group))


def _sharded(
    wrapper: Any,
    group: int,
    params: Sequence[Any],
    pieces: Sequence[Sequence[Fragment]],
    flat: Tensor,
    process_group: Any,
) -> Layout:
    # Wrappers of DeepSpeed 0.16 do not all know the names.
    names = getattr(wrapper, "param_names", None)
    if names is None:
        names = {p: name for name, p in wrapper.module.named_parameters()}
    granularity = wrapper.optimizer.param_groups[group].get("granularity", "tensor")
    parameters = []
    for n, p in enumerate(params):
        name = names.get(p, f"parameter {n} of param group {group}")
        shape = getattr(p, "ds_shape", p.shape)
        parameter = describe(name, shape, granularity, number_of(wrapper, p))
        if is_tensor_parallel(p):
            parameter = _shared(p, parameter, shape, granularity, wrapper.mpu.get_model_parallel_world_size())
        parameters.append(parameter)
    parallel = [n for n, p in enumerate(params) if is_tensor_parallel(p)]
    also = [(wrapper.mpu.get_model_parallel_group(), parallel)] if parallel else []
    return partition(
        parameters,
        pieces,
        rank=_rank(process_group),
        numel=flat.numel(),
        process_group=process_group,
        also=also,
    )


def _shared(
    p: Any, parameter: Parameter, shape: Sequence[int], granularity: str | int, ranks: int
) -> Parameter:
    """A rank's part of a tensor-parallel parameter: over how many ranks its layers or columns are sharded.

    Rows are not if the parameter is sharded along one of their dimensions, as Megatron's ``partition_dim``
    says.
    """
    if granularity == "tensor" or isinstance(granularity, int) or (len(shape) < 2 and granularity == "row"):
        return replace(parameter, row_shares=ranks)
    dim = getattr(p, "partition_dim", None)
    if dim is None:
        raise LayoutError(
            f"{parameter.name} is tensor-parallel and has no partition_dim: whether its rows are sharded is "
            'not known. Set it, or use granularity="tensor"'
        )
    of_rows = matrix_dimensions(shape) if parameter.factored else 1
    if int(dim) < of_rows:
        return replace(parameter, column_shares=ranks)
    return replace(parameter, row_shares=ranks)


def _check_weights(flat: Tensor, weights: Sequence[Tensor], fragments: Sequence[Fragment]) -> None:
    """The flat tensor must hold the weights that the layout says it holds, or DeepSpeed has changed."""
    for s in fragments:
        weight = weights[s.parameter][s.offset : s.offset + s.numel].to(flat)
        found = flat.detach()[s.start : s.stop]
        if not bool(((found == weight) | weight.isnan()).all()):
            raise LayoutError(
                "DeepSpeed's flat partition does not hold the weights that its tables say it holds: this "
                "version of DeepSpeed is not supported"
            )
