"""Which parameters, gradients and states NovoGrad can step, and what it says of the others."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from novoscale import kernels
from novoscale.sharding.dtensors import local_tensor
from novoscale.sharding.layers import describe
from novoscale.sharding.layout import Layout
from novoscale.state.formats import format_of, kept_format

_said: set[str] = set()  # what warn_of_float16 has named

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def listed(params: Any) -> Any:
    """What NovoGrad was given to optimise, as a list; what else it is torch says.

    Raises:
        TypeError: a module, or another thing that is known to be given in place of its parameters.
        ValueError: nothing is in it.
    """
    if isinstance(params, nn.Module):
        raise TypeError(
            f"NovoGrad was given a module ({type(params).__name__}): give it the module's parameters, "
            "NovoGrad(model.parameters(), ...) or NovoGrad(novoscale.param_groups(model), ...)"
        )
    if isinstance(params, Mapping):
        raise TypeError(
            'NovoGrad was given a dict: give it a list of param groups, [{"params": ...}], or '
            "model.parameters()"
        )
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        if inspect.isroutine(params):
            raise TypeError(f"NovoGrad was given a function: call it, {params.__name__}()")
        return params
    refuse_used_up(params, "NovoGrad")
    return list(params)


def refuse_used_up(params: Any, where: str) -> None:
    """Raise ValueError for a generator that has nothing left."""
    if inspect.isgenerator(params) and inspect.getgeneratorstate(params) == inspect.GEN_CLOSED:
        raise ValueError(
            f"{where}: an empty parameter list: {params.__name__}() gives its parameters once, and they have "
            "been taken already. Call it again, or keep a list of them"
        )


def check_parameter(name: str, p: Any) -> None:
    """Raise ValueError, with the parameter's name, for one that cannot be optimised.

    A frozen parameter may be of any kind, such as the codes of quantised weights: it is looked at when it has
    a gradient.
    """
    if not isinstance(p, Tensor):
        return  # torch says it
    if is_lazy(p):
        raise ValueError(
            f"{name} has no shape yet: it is a lazy module's. Call the model once, and make NovoGrad then"
        )
    if isinstance(p, nn.Parameter) and not p.requires_grad:
        return
    if not (p.is_leaf or p.retains_grad):
        raise ValueError(
            f"{name}: can't optimize a non-leaf Tensor; give NovoGrad the parameter that it was computed from"
        )
    if p.dtype not in DTYPES:
        raise ValueError(
            f"{name} has dtype {p.dtype}; NovoGrad optimises "
            f"{', '.join(str(d).removeprefix('torch.') for d in DTYPES)}. Set requires_grad=False on it and "
            "leave it out"
        )
    if p.layout != torch.strided:
        raise ValueError(f"{name} is not a dense tensor ({p.layout}); NovoGrad optimises dense ones only")
    if not _has_own_elements(local_tensor(p)):
        raise ValueError(
            f"{name} is a {type(local_tensor(p)).__name__}, a kind of tensor whose elements NovoGrad cannot "
            "read and write. Make NovoGrad from the model before it is converted to them, or give this "
            "parameter to another optimizer"
        )


def _has_own_elements(tensor: Any) -> bool:
    """Whether the elements of a tensor lie in its own memory, where the kernels read and write them.

    Those of a wrapper subclass, such as torchao's weights in int8, lie in other tensors, in other forms.
    """
    if getattr(type(tensor), "__torch_dispatch__", None) is Tensor.__torch_dispatch__:
        return True
    if is_traceable_wrapper_subclass(tensor):
        return False
    try:
        return bool(tensor.is_meta or tensor.numel() == 0 or tensor.data_ptr() != 0)
    except (NotImplementedError, RuntimeError, TypeError):
        return False


def check_gradient(name: str, p: Tensor) -> None:
    """Raise RuntimeError, with the parameter's name, for a gradient that cannot be used."""
    grad = p.grad
    assert grad is not None
    try:
        check_parameter(name, p)  # it may have been frozen when NovoGrad was given it
    except ValueError as error:
        raise RuntimeError(str(error)) from None
    if p.is_meta:
        raise RuntimeError(
            f"{name} is on the device meta: it has no memory, and cannot be stepped. Use "
            "model.to_empty(device=...), initialise the model, and make NovoGrad from its parameters then"
        )
    if grad.is_complex():
        raise RuntimeError(f"{name}: NovoGrad does not support complex gradients")
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{name}: NovoGrad does not support sparse gradients; use nn.Embedding(sparse=False), or give "
            "this parameter to another optimizer"
        )
    if grad.shape != p.shape or grad.device != p.device or grad.dtype not in DTYPES:
        raise RuntimeError(
            f"{name}: its gradient ({grad.dtype}, shape {tuple(grad.shape)}, on {grad.device}) does not fit "
            f"the parameter ({p.dtype}, shape {tuple(p.shape)}, on {p.device})"
        )


def check_structure(
    name: str, state: Mapping[str, Any], shape: Sequence[int], layout: Layout, group: Mapping[str, Any]
) -> None:
    """Raise RuntimeError where an option that says what the state is was changed while it is in use.

    Args:
        name: of the parameter.
        state: of the parameter, maybe empty.
        shape: of the parameter.
        layout: that it had when NovoGrad was given it.
        group: its param group.
    """
    was: dict[str, Any] = {}
    if "exp_avg" in state:
        kept = format_of(state["exp_avg"], state.get("exp_avg_scale")).name
        if kept != kept_format(group["momentum_dtype"], math.prod(shape)).name:
            was["momentum_dtype"] = kept
    if layout.local_shards:
        had, has = layout.local_shards[0].parameter, describe(name, shape, group["granularity"])
        if (had.layers, had.factored) != (has.layers, has.factored):
            was["granularity"] = f"one of {had.layers} layers{' and of columns' if had.factored else ''}"
    for option, value in was.items():
        raise RuntimeError(
            f"{name}: the {option} of its param group was {value!r} and is {group[option]!r} now: the state "
            f"is still what it was. Make a new optimizer with that {option}, and give it the old one's state "
            "with load_state_dict"
        )


def unknown_layers(name: str, tensor: Tensor, known: Layout | None, wrapper: str | None) -> str:
    """What to say of a tensor whose layers are not known.

    Args:
        name: of the parameter.
        tensor: in its place in ``param_groups``.
        known: the layout that was noted of it, if any.
        wrapper: what replaced the parameters, if anything did.
    """
    if is_fsdp1(tensor):
        return (
            f"{name} is a flat parameter of FSDP1, and which layers its elements belong to is not known. "
            "FSDP1 is not supported: use FSDP2, torch.distributed.fsdp.fully_shard."
        )
    if known is not None and known.numel != tensor.numel():
        what = f"had {known.numel} elements when NovoGrad was given it and has {tensor.numel()} now"
    else:
        what = f"({tensor.numel()} elements) is not what NovoGrad was given"
    return (
        f"{name}: the tensor in param_groups {what}{f' by {wrapper}' if wrapper else ''}. "
        "Which layers its elements belong to is not known, and a norm taken over it would be wrong. "
        "Under DeepSpeed, `import novoscale.integrations.deepspeed` before deepspeed.initialize. If the "
        "model was changed, or the optimizer copied after it was wrapped: make a new optimizer from the "
        "model's present parameters."
    )


def is_fsdp1(tensor: Tensor) -> bool:
    """Whether a tensor is a flat parameter of FSDP1, or a part of one."""
    return getattr(tensor, "_fsdp_flattened", False) or hasattr(tensor, "_fqns")


def warn_of_no_gradient(params: Sequence[Tensor]) -> None:
    """Say that nothing is trained, of the parameters that need a gradient and have none."""
    why = (
        "They are on the device meta, and the model's have been made since (to_empty)"
        if any(p.is_meta for p in params)
        else "If the model's parameters have been replaced since (fully_shard, parallelize_module, to_empty)"
    )
    warnings.warn(
        f"NovoGrad.step() changes nothing: none of its {len(params)} parameters has a gradient, and none has "
        f"had one. {why}, make NovoGrad after that. Else call step() after backward() and before zero_grad()",
        stacklevel=2,
    )


def warn_of_float16(name: str) -> None:
    """Say what is lost of float16 weights, once in a process."""
    if _said:
        return
    _said.add(name)
    warnings.warn(
        f"{name} is float16, which is rounded to the nearest: steps of less than half a float16 are lost, "
        "and weights may stand still. Use bfloat16, which is rounded stochastically, or float32 weights and "
        "torch.autocast. stochastic_rounding=False accepts it, and says nothing",
        stacklevel=2,
    )


def not_in_full_param_groups(name: str) -> str:
    """What to say of a parameter that is not among those of ``number_as``."""
    return (
        f"{name} is not in the param groups that number_as was given. Give it those of the full model: with "
        "ZeroRedundancyOptimizer, optimizer.optim.number_as(optimizer.param_groups)"
    )


def check_has_fused(p: Tensor, where: str) -> None:
    """Raise RuntimeError where there is no fused kernel for a parameter."""
    device = p.device.type
    if device not in kernels.FUSED_DEVICES or p.dtype == torch.float64:
        raise RuntimeError(
            f"{where}: `fused=True` requires all the params to be float32, bfloat16 or float16 Tensors "
            f"of supported devices: {list(kernels.FUSED_DEVICES)}, got {p.dtype} on {device}"
        )
    if kernels.fused(device) is None:
        raise RuntimeError(f"{where}: `fused=True`: {kernels.unfused_reason(device)}")


def captured(again: bool) -> str:
    """What is wrong with a step in a CUDA graph for which the tables of the kernels would have to be made."""
    if not again:
        return (
            "NovoGrad has never stepped these tensors, and a CUDA graph is being captured: nothing can be "
            "allocated and compiled now. Make three steps before the capture, as torch's documentation says"
        )
    return (
        "a tensor, a state or an option of NovoGrad is not what it was at its last step, or an earlier CUDA "
        "graph has its tables, and a graph is being captured: they cannot be made anew now. Make one step "
        "with what is to be captured, outside of the graph, before each capture"
    )
