"""DeepSpeed's calls for the optimizer's state of one parameter, and for moving states, of a NovoGrad.

``safe_get_full_optimizer_state`` and its three relatives take a state for a flat partition with a number for
each element. NovoGrad has first moments in codes, and second moments of layers. Of ``exp_avg`` they give and
take numbers here, whatever the format; of ``exp_avg_sq`` that by whose root an element's gradient is divided
(with ``norm_type=0`` that by which itself it is divided).

A call is answered, or refused, on every rank. Those for full parameters are collectives over their
data-parallel ranks, which first agree that they ask for the same and may have it. Those for this rank's part
are none: what they refuse is refused on each.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import mixed_precision_linkage
from torch import Tensor

from novoscale import NovoGrad
from novoscale.checkpoint import fragments
from novoscale.sharding.blocks import BLOCK
from novoscale.sharding.collectives import all_reduce, digest
from novoscale.sharding.layers import Parameter
from novoscale.sharding.layout import Layout

from .layouts import number_of

KEYS = ("exp_avg", "exp_avg_sq")
# What a value may differ by from the second moments that can be kept of it: float32's rounding.
TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class Place:
    """Where the state of a model's parameter is.

    Attributes:
        optimizer: whose state it is.
        group: the index of its param group.
        flat: the tensor that the optimizer steps.
        layout: of that tensor.
        parameter: in it.
        process_group: of the ranks that have parts of it.
        parallel: of the ranks of tensor parallelism that have other parts of it; None: there are none.
    """

    optimizer: NovoGrad
    group: int
    flat: Tensor
    layout: Layout
    parameter: Parameter
    process_group: Any
    parallel: Any = None

    @property
    def options(self) -> dict[str, Any]:
        """Its param group."""
        return self.optimizer.param_groups[self.group]

    @property
    def state(self) -> dict[str, Tensor]:
        """Of the flat tensor."""
        return cast("dict[str, Tensor]", self.optimizer.state[self.flat])

    @property
    def index(self) -> int | None:
        """See ``fragments.place_of``."""
        return fragments.place_of(self.layout, self.parameter)


def attach(
    wrapper: Any,
    bound: Sequence[tuple[int, Tensor, Layout]],
    members: Sequence[Sequence[Any]],
    process_groups: Sequence[Any],
) -> None:
    """Have each parameter of a model know where its state is.

    Args:
        wrapper: of the parameters.
        bound: what it is bound to: of each flat tensor the index of its param group, the tensor, its layout.
        members: the parameters that each holds, in its order.
        process_groups: of each.
    """
    optimizer: NovoGrad = wrapper.optimizer
    for (group, flat, layout), params, process_group in zip(bound, members, process_groups, strict=True):
        completed = [(c.process_group, q) for c in layout.reductions for q in c.parameters]
        known = {q.number: q for _, q in completed} | {
            shard.parameter.number: shard.parameter for shard in layout.local_shards
        }
        parallel = {q.number: over for over, q in completed if over is not process_group}
        for p in params:
            number = number_of(wrapper, p)
            where = (optimizer, group, flat, layout, known[number], process_group, parallel.get(number))
            p._novoscale = Place(*where)


def detach(params: Iterable[Any]) -> None:
    """Have parameters forget where their state was, for another wrapper that takes them over."""
    for p in params:
        vars(p).pop("_novoscale", None)


def register() -> None:
    """Extend DeepSpeed's calls. Idempotent."""
    for name, of_full in (("get_full_hp_param", _get), ("set_full_hp_param", _set)):
        _extend(mixed_precision_linkage, name, of_full)
        _extend(DeepSpeedZeroOptimizer_Stage3, name, of_full)
    _extend(DeepSpeedZeroOptimizer_Stage3, "get_local_fp32_param", _get_local)
    _extend(DeepSpeedZeroOptimizer_Stage3, "set_local_hp_param", _set_local)
    _extend(DeepSpeedZeroOptimizer_Stage3, "get_hp_param_device", _device)
    _extend_offloading(DeepSpeedZeroOptimizer_Stage3)


def _extend(owner: Any, name: str, own: Callable[[Place, Any, str, Any], Any]) -> None:
    """Have a call of DeepSpeed for an optimizer's state answered by ``own`` where that is a NovoGrad's."""
    original = getattr(owner, name, None)
    if original is None or hasattr(original, "_novoscale"):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def extended(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        p, key = given.get("param", given["self"]), given.get("optim_state_key")
        place = getattr(p, "_novoscale", None)
        if place is None or key is None:  # of another optimizer, or for the weights
            return original(*args, **kwargs)
        with torch.no_grad():
            return own(place, p, key, given.get("value"))

    extended._novoscale = True  # type: ignore[attr-defined]
    setattr(owner, name, extended)


# ---- full parameters -------------------------------------------------------------------------------------


def _get(place: Place, p: Any, key: str, _: None) -> Tensor:
    _agree(place, f"get {key}", _refusal(place, key))
    if key == "exp_avg":
        full = torch.zeros(place.parameter.numel, dtype=torch.float32, device=place.flat.device)
        if place.index is not None:
            for first, values in fragments.moments(place.state, place.layout, place.index):
                full[first : first + len(values)] = values
        full = all_reduce(full, dist.ReduceOp.SUM, place.process_group)
    else:
        full = _of_elements(place, *_all_second_moments(place))
    return full.view(_shape(p)).to(p.device)


def _set(place: Place, p: Any, key: str, value: Any) -> None:
    refusal = _refusal(place, key) or _refusal_of_value(place, key, value, place.parameter.numel)
    if key == "exp_avg_sq" and refusal is None:
        refusal = _refusal_of_second_moments(place, value)
    _agree(place, f"set {key}", refusal)
    value = value.detach().to(place.flat.device, torch.float32).reshape(-1)
    if key == "exp_avg":
        fragments.set_moments(place.state, place.layout, place.parameter, place.options, value)
    elif place.index is not None:
        shard = place.layout.local_shards[place.index]
        rows, columns = _of_layers(place, value)
        own_rows, own_columns = fragments.second_moments(place.state, place.layout, place.index)
        own_rows.copy_(rows[shard.first : shard.stop])
        if own_columns is not None:
            own_columns.copy_(columns)


def _all_second_moments(place: Place) -> tuple[Tensor, Tensor]:
    """The second moments of all layers and of all columns (none where it is not factored), on every rank."""
    q = place.parameter
    found = torch.zeros(q.layers + q.columns, dtype=torch.float32, device=place.flat.device)
    if place.index is not None:
        shard = place.layout.local_shards[place.index]
        rows, columns = fragments.second_moments(place.state, place.layout, place.index)
        found[shard.first : shard.stop] = rows
        if columns is not None:
            found[q.layers :] = columns
    found = all_reduce(found, dist.ReduceOp.MAX, place.process_group)  # none is negative
    return found[: q.layers], found[q.layers :]


def _of_elements(place: Place, rows: Tensor, columns: Tensor) -> Tensor:
    """The second moment of each element: that by whose root its gradient is divided."""
    q = place.parameter
    if not q.factored:
        return (rows / fragments.units(q, place.options))[:, None].expand(-1, q.layer_numel).reshape(-1)
    total = rows.double().sum()
    if q.column_shares > 1:  # other ranks have other rows of the matrix
        total = all_reduce(total, dist.ReduceOp.SUM, place.parallel)
    return _product(rows, columns, total / (q.layers * q.column_shares))


def _product(rows: Tensor, columns: Tensor, mean: Tensor) -> Tensor:
    """The second moments of a matrix of its rows' and columns'; 0 where there has been no gradient."""
    return (rows.double()[:, None] * columns / mean).nan_to_num(0.0).float().view(-1)


def _of_layers(place: Place, value: Tensor) -> tuple[Tensor, Tensor]:
    """The second moments of layers and columns of which those of elements are made: their means."""
    q = place.parameter
    by_layer = value.double().view(q.layers, q.layer_numel)
    rows = (by_layer.mean(1) * fragments.units(q, place.options)).float()
    return rows, by_layer.mean(0).float()


# ---- this rank's part of parameters under stage 3 ----------------------------------------------------------


def _get_local(place: Place, p: Any, key: str, _: None) -> Tensor:
    _raise(place, _refusal(place, key) or _refusal_of_local(place, key, reads=True))
    first, length = _part(place, p)
    part = torch.zeros(length, dtype=torch.float32, device=place.flat.device)  # at its end may be padding
    if place.index is None:
        return part.to(get_accelerator().current_device_name())
    if key == "exp_avg":
        for start, values in fragments.moments(place.state, place.layout, place.index):
            part[start - first : start - first + len(values)] = values
    else:
        shard, size = place.layout.local_shards[place.index], place.parameter.layer_numel
        rows = fragments.second_moments(place.state, place.layout, place.index)[0]
        last = min(first + length, place.parameter.numel)
        layer = torch.arange(first, last, device=rows.device) // size - shard.first
        part[: last - first] = rows[layer] / fragments.units(place.parameter, place.options)
    return part.to(get_accelerator().current_device_name())


def _set_local(place: Place, p: Any, key: str, value: Any) -> None:
    first, length = _part(place, p)
    _raise(
        place,
        _refusal(place, key)
        or _refusal_of_local(place, key, reads=False, part=length)
        or _refusal_of_value(place, key, value, length),
    )
    value = value.detach().to(place.flat.device, torch.float32).reshape(-1)
    fragments.set_moments(place.state, place.layout, place.parameter, place.options, value, first)


def _part(place: Place, p: Any) -> tuple[int, int]:
    """Which elements of a parameter this rank has: the first, and how many with padding."""
    length = int(p.ds_tensor.ds_numel)
    return length * dist.get_rank(place.process_group), length


def _device(place: Place, p: Any, key: str, _: None) -> torch.device:
    _raise(place, _refusal(place, key))
    return next(iter(place.state.values())).device


# ---- what is refused -------------------------------------------------------------------------------------


def _refusal(place: Place, key: str) -> str | None:
    if key not in KEYS:
        known = " and ".join(map(repr, KEYS))
        return f"DeepSpeed's tools have no {key!r} of a NovoGrad, only {known}"
    if key == "exp_avg" and place.options["betas"][0] == 0:
        return "there is no exp_avg: betas[0] is 0, and no first moment is kept"
    return None


def _refusal_of_value(place: Place, key: str, value: Any, numel: int) -> str | None:
    if not isinstance(value, Tensor) or value.numel() != numel:
        has = f"{value.numel()} elements" if isinstance(value, Tensor) else f"no tensor, but {value!r}"
        return f"the value for {key} has {has}, where {numel} are set. Nothing has been changed"
    if not bool(value.isfinite().all()):
        return f"the value for {key} has elements that are not finite. Nothing has been changed"
    if key == "exp_avg_sq" and bool((value < 0).any()):
        return "the value for exp_avg_sq has negative elements. Nothing has been changed"
    return None


def _refusal_of_second_moments(place: Place, value: Tensor) -> str | None:
    if place.parallel is not None:
        return "its layers are sharded over the tensor-parallel ranks: exp_avg_sq cannot be set"
    q, value = place.parameter, value.detach().to(place.flat.device, torch.float32).reshape(-1)
    rows, columns = _of_layers(place, value)
    kept = _of_elements(place, rows, columns)
    if place.options["allow_lossy_load"] or torch.allclose(kept, value, rtol=TOLERANCE, atol=0):
        return None
    what = "one for each row and each column" if q.factored else f"one for each of {q.layers} layers"
    return (
        f"NovoGrad keeps of exp_avg_sq {what}, and the value has others. Give a value that is the same in "
        "each, or make the optimizer with allow_lossy_load=True to have means taken. Nothing has been changed"
    )


def _refusal_of_local(place: Place, key: str, reads: bool, part: int = 0) -> str | None:
    """Why the part of one rank cannot be had or set without the others: the same on each."""
    if key == "exp_avg_sq" and (place.parameter.factored or not reads):
        return (
            "exp_avg_sq is of whole layers, which ranks share. Use "
            f"safe_{'get' if reads else 'set'}_full_optimizer_state"
        )
    sharded = part % BLOCK and dist.get_world_size(place.process_group) > 1
    if not reads and sharded and fragments.keeps_blocks(place.parameter, place.options):
        return (
            f"exp_avg is in blocks of {BLOCK} elements with one scale each, and a rank's {part} elements end "
            "within one. Use safe_set_full_optimizer_state, which has the ranks agree on it"
        )
    return None


def _raise(place: Place, refusal: str | None) -> None:
    if refusal is not None:
        raise ValueError(f"{place.parameter.name}: {refusal}")


def _agree(place: Place, call: str, refusal: str | None) -> None:
    """Raise ValueError on every rank if one refuses, or if they do not make the same call."""
    said = digest(f"{call} of parameter {place.parameter.number}")
    given = torch.tensor([said, -said, refusal is not None], dtype=torch.float64, device=place.flat.device)
    largest, smallest, refused = all_reduce(given, dist.ReduceOp.MAX, place.process_group).tolist()
    _raise(place, refusal)
    if largest != -smallest:
        _raise(place, f"this rank would {call}, and another rank something else. Make the same calls on each")
    if refused:
        _raise(place, f"{call} is refused on another rank, which says why. Nothing has been changed")


def _shape(p: Any) -> Any:
    return getattr(p, "ds_shape", p.shape)


# ---- states moved away -----------------------------------------------------------------------------------


def _extend_offloading(stage_3: Any) -> None:
    """Have ``engine.offload_states`` take a NovoGrad's states under stage 3, where it knows FusedAdam's.

    Under stages 1 and 2 it takes any optimizer's.
    """
    offload, reload = stage_3.offload_states, stage_3.reload_states
    if hasattr(offload, "_novoscale"):
        return
    weights, states = OffloadStateTypeEnum.hp_params, OffloadStateTypeEnum.optim_states

    @functools.wraps(offload)
    def offload_states(
        self: Any,
        include: Any = None,
        device: Any = None,
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        more = {} if device is None else {"device": device}
        if not isinstance(self.optimizer, NovoGrad):
            offload(self, include=include, pin_memory=pin_memory, non_blocking=non_blocking, **more)
            return
        wanted = set(OffloadStateTypeEnum) if include is None else set(include)
        rest = wanted - {weights, states}
        offload(self, include=rest, pin_memory=pin_memory, non_blocking=non_blocking, **more)
        moved = (wanted & {weights, states}) - self.offloaded_states
        to = functools.partial(_away, pin=pin_memory, non_blocking=non_blocking)
        if weights in moved:
            for flat in self.fp32_partitioned_groups_flat:
                flat.data = to(flat.data)
        if states in moved:
            _move(self.optimizer, to)
        self.offloaded_states |= moved

    @functools.wraps(reload)
    def reload_states(self: Any, non_blocking: bool = False) -> None:
        if isinstance(self.optimizer, NovoGrad) and states in self.offloaded_states:
            device = get_accelerator().current_device_name()
            _move(self.optimizer, lambda t: t.to(device, non_blocking=non_blocking))
            self.offloaded_states.remove(states)
        reload(self, non_blocking=non_blocking)

    offload_states._novoscale = True  # type: ignore[attr-defined]
    stage_3.offload_states, stage_3.reload_states = offload_states, reload_states


def _away(tensor: Tensor, pin: bool, non_blocking: bool) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    if not pin:
        return tensor.to("cpu", non_blocking=non_blocking)
    target = get_accelerator().pin_memory(torch.empty_like(tensor, device="cpu"))
    return target.copy_(tensor, non_blocking=non_blocking)  # type: ignore[no-any-return]


def _move(optimizer: NovoGrad, to: Callable[[Tensor], Tensor]) -> None:
    for state in optimizer.state.values():
        state.update({key: to(value) for key, value in state.items() if isinstance(value, Tensor)})
