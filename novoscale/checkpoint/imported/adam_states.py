"""The moments that an Adam keeps, in the forms in which different Adams keep them.

torch's (Adam, AdamW, NAdam, RAdam), Apex's and DeepSpeed's: ``exp_avg`` and ``exp_avg_sq``, of the shape of
the parameter, and ``step``, a number or a tensor of one, beside them or in the param group. bitsandbytes':
``state1`` and ``state2``, in 32 bits, or in 8: codes, which are places in a table of numbers, and a factor
for each block of elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from novoscale.sharding.dtensors import local_tensor

# What a state may have beside the moments. NAdam's mu_product is of its step, not of them.
MOMENTS = frozenset({"exp_avg", "exp_avg_sq"})
BESIDE = frozenset({"step", "mu_product", "max_exp_avg_sq"})
# bitsandbytes keeps its tensors apart where FSDP1 might gather them.
WRAPPED = "__bnb_optimizer_quant_state__"
STATES = ("state1", "state2")
QUANTISED = frozenset({"qmap1", "qmap2", "absmax1", "absmax2"})
BESIDE_STATES = QUANTISED | {"step", "gnorm_vec", "unorm_vec"}
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Moments:
    """What an Adam keeps of one tensor: local tensors, not in blocks.

    Attributes:
        exp_avg: the average of the gradients, from zero.
        exp_avg_sq: of their squares.
        step: how many steps are in them.
        betas: of the two averages.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int
    betas: tuple[float, float]


def shape_of(name: str, state: Mapping[str, Any]) -> torch.Size:
    """The shape of the moments of a parameter."""
    known = _unwrapped(state)
    for key in ("exp_avg", "state1"):
        if isinstance(known.get(key), Tensor):
            return torch.Size(known[key].shape)
    raise ValueError(f"{name}: its state is not that of an Adam: it has {_listed(known)}")


def moments_of(name: str, state: Mapping[str, Any], adam: Mapping[str, Any], p: Tensor) -> Moments:
    """Both moments of this rank's part of a tensor.

    Raises:
        ValueError: the state is not an Adam's, or of another shape.
    """
    state = _unwrapped(state)
    betas = adam.get("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{name}: the param group of an Adam has two betas, this one {betas!r}")
    if "max_exp_avg_sq" in state or adam.get("amsgrad"):
        raise ValueError(
            f"{name}: its state is that of AMSGrad (max_exp_avg_sq), which NovoGrad has not. To go on "
            "without it, take max_exp_avg_sq out of every state and set amsgrad=False in the param groups"
        )
    if _is_plain(state):
        first, second = (_local(name, key, state[key], p) for key in ("exp_avg", "exp_avg_sq"))
    elif is_one(state):
        first, second = (_local(name, key, _dequantised(name, key, state), p) for key in STATES)
    else:
        raise ValueError(
            f"{name}: its state is not that of an Adam, which has step, exp_avg and exp_avg_sq "
            f"(bitsandbytes': state1 and state2): it has {_listed(state)}"
        )
    # DeepSpeed's FusedAdam, without ZeRO, counts the steps of the last tensor of a group only.
    step = max((int(found["step"]) for found in (state, adam) if found.get("step") is not None), default=None)
    if step is None:
        raise ValueError(
            f"{name}: neither its state nor its param group says how many steps are in it (step)"
        )
    return Moments(first, second, step, (float(betas[0]), float(betas[1])))


def is_one(state: Mapping[str, Any]) -> bool:
    """Whether the state of a parameter is that of an Adam; also of one with AMSGrad."""
    keys = _unwrapped(state).keys()
    return _is_plain(state) or {*STATES} <= keys <= {*STATES} | BESIDE_STATES


def _is_plain(state: Mapping[str, Any]) -> bool:
    return MOMENTS <= state.keys() <= MOMENTS | BESIDE


def _unwrapped(state: Mapping[str, Any]) -> Mapping[str, Any]:
    if WRAPPED not in state:
        return state
    return {**{key: value for key, value in state.items() if key != WRAPPED}, **state[WRAPPED]}


def _listed(keys: Any) -> str:
    return ", ".join(sorted(map(str, keys))) or "nothing"


def _dequantised(name: str, key: str, state: Mapping[str, Any]) -> Any:
    """One of bitsandbytes' moments as numbers: a code is the place of a number in qmap, times its block's."""
    codes = state[key]
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8:
        return codes
    qmap, absmax = (state.get(f"{part}{key[-1]}") for part in ("qmap", "absmax"))
    if not isinstance(qmap, Tensor) or not isinstance(absmax, Tensor):
        raise ValueError(
            f"{name}: {key} is in 8 bits and there is no qmap{key[-1]} or absmax{key[-1]}: this is not the "
            "form of bitsandbytes in blocks. Load it into bitsandbytes with optim_bits=32, and save it again"
        )
    sizes = [n for n in BLOCK_SIZES if math.ceil(codes.numel() / n) == absmax.numel()]
    if not sizes or qmap.numel() != 256:
        raise ValueError(
            f"{name}: {key} has {codes.numel()} elements, absmax{key[-1]} {absmax.numel()} and qmap{key[-1]} "
            f"{qmap.numel()}: no size of blocks that bitsandbytes has fits"
        )
    values = qmap.float()[codes.reshape(-1).int()]
    scales = absmax.float().repeat_interleave(sizes[-1])[: codes.numel()]
    return (values * scales).view(codes.shape)


def _local(name: str, key: str, tensor: Any, p: Tensor) -> Tensor:
    """This rank's part of a moment."""
    if type(tensor) not in (Tensor, torch.nn.Parameter, DTensor) or not tensor.is_floating_point():
        kind = f"{type(tensor).__name__}{f' of {tensor.dtype}' if isinstance(tensor, Tensor) else ''}"
        raise ValueError(f"{key} of {name} is {kind}: give its numbers as a plain tensor")
    if isinstance(p, DTensor) and not isinstance(tensor, DTensor) and tensor.shape != local_tensor(p).shape:
        if tensor.shape == p.shape:
            tensor = distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    elif isinstance(p, DTensor) and isinstance(tensor, DTensor) and tensor.placements != p.placements:
        raise ValueError(
            f"{key} of {name} is placed as {tuple(tensor.placements)} and the parameter as "
            f"{tuple(p.placements)}: redistribute one of them, or load a full state dict"
        )
    local = local_tensor(tensor)
    if local.shape != local_tensor(p).shape:
        raise ValueError(
            f"{key} of {name} has the shape {tuple(local.shape)}, and that of the parameter is "
            f"{tuple(local_tensor(p).shape)}: the state belongs to another model or another sharding of it"
        )
    return local if p.device.type == "meta" else local.to(p.device)
