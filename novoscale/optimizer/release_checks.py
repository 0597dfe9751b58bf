"""What ``release_gradients`` refuses because the training could not stay the same; and what it says of it."""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.autograd import Variable
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad

from novoscale.optimizer.novograd import NovoGrad
from novoscale.optimizer.options import (
    NOT_CLIPPED,
    clipped_and_released,
    one_max_grad_norm,
    wrapped_and_released,
)

DDP = (
    "DistributedDataParallel adds up gradients after they have been released, in buckets that hold all of "
    "them. Use FSDP2 (torch.distributed.fsdp.fully_shard)"
)
FSDP1 = "NovoGrad does not know the layers of FSDP1's flat parameters. Use FSDP2 (fully_shard)"


class Released(Protocol):
    """What is known here of a handle of ``release_gradients``."""

    def parameters(self) -> Sequence[Tensor]:
        """Those that are stepped in the backward pass."""

    def grad_norm(self) -> Tensor:
        """The norm of the gradients that this step has used so far."""


def novograd(optimizer: Any) -> NovoGrad:
    """The NovoGrad itself, out of Accelerate's wrapper.

    Raises:
        TypeError: it is another optimizer.
        ValueError: it clips by ``max_grad_norm``.
    """
    inner = optimizer
    while not isinstance(inner, NovoGrad) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, NovoGrad):
        raise TypeError(
            f"release_gradients needs a NovoGrad, got {type(optimizer).__name__}: other optimizers have no "
            "step for one parameter"
        )
    limit = one_max_grad_norm(inner.param_groups)
    if limit:
        raise ValueError(clipped_and_released(limit))
    return inner


def names(model: nn.Module, optimizer: NovoGrad) -> dict[int, str]:
    """The names of the optimizer's parameters, by id.

    Raises:
        ValueError: the model has not all of them, or is one whose gradients cannot be released.
        TypeError: it is no model, such as its parameters.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"release_gradients needs the model, and got a {type(model).__name__}: "
            "release_gradients(model, optimizer)"
        )
    for name, module in model.named_modules():
        _refuse_wrapper(module)
        if getattr(module, "sparse", False) and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            raise ValueError(
                f"{name}: sparse=True gives sparse gradients, which NovoGrad does not support: leave it out"
            )
    known = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for index, group in enumerate(optimizer.param_groups):
        given = group.get("param_names", ())
        for position, p in enumerate(group["params"]):
            if id(p) not in known:
                name = given[position] if given else f"parameter {position} of param group {index}"
                raise ValueError(
                    f"{name} (shape {tuple(p.shape)}) is the optimizer's and not the model's: give "
                    "release_gradients the model whose parameters the optimizer was given, after it was "
                    "wrapped; of several models, nn.ModuleList([...])"
                )
            found[id(p)] = known[id(p)]
    return found


def _refuse_wrapper(module: Any) -> None:
    """Raise ValueError for a module that does with gradients what cannot be done when they are gone."""
    for kind, reason in ((DistributedDataParallel, DDP), (FullyShardedDataParallel, FSDP1)):
        if isinstance(module, kind):
            raise ValueError(f"release_gradients cannot be used with {kind.__name__}: {reason}")
    if type(module).__module__.partition(".")[0] == "deepspeed":
        raise ValueError(wrapped_and_released(type(module).__name__))


def at_forward(model: nn.Module, attach_again: Callable[[], None]) -> list[Any]:
    """Have the forward passes of a model attach hooks again, the first one look for wrappers around it.

    Args:
        model: the model.
        attach_again: to parameters that have lost theirs.

    Returns:
        The handles of hooks.
    """
    hook = _AtForward(attach_again)
    return [module.register_forward_pre_hook(hook) for module in _called(model)]


class _AtForward:
    """A hook with which a model can be saved and copied: a copy, whose gradients stay, has an empty one."""

    def __init__(self, attach_again: Callable[[], None]) -> None:
        self._attach_again, self._looked = attach_again, False

    def __call__(self, *_: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        self._attach_again()
        if self._looked:
            return
        self._looked = True
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if isinstance(frame.f_locals.get("self"), nn.Module):
                _refuse_wrapper(frame.f_locals["self"])
            frame = frame.f_back

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_effect, ()


class _NoEffect:
    def __call__(self, *_: Any) -> None:
        """Do nothing."""


def _no_effect() -> _NoEffect:
    return _NoEffect()


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """The module, or, of a list of modules, each of them."""
    if type(module).forward is not nn.Module.forward:
        yield module
    else:
        for child in module.children():
            yield from _called(child)


# ---- a step ----------------------------------------------------------------------------------------------


def options(optimizer: NovoGrad) -> list[dict[str, Any]]:
    """The options of the param groups: of tensors the version too, which counts what is written to them."""
    return [
        {name: (group.get(name), getattr(group.get(name), "_version", None)) for name in optimizer.defaults}
        for group in optimizer.param_groups
    ]


def before_step(
    optimizer: NovoGrad,
    arguments: Sequence[Any],
    known: Mapping[int, str],
    stepped_with: list[dict[str, Any]],
) -> None:
    """Raise RuntimeError where ``step()`` is called in a way in which it cannot be the end of this step.

    Args:
        optimizer: about to step.
        arguments: of ``step``.
        known: names of the parameters whose gradients are released, by id.
        stepped_with: :func:`options` when the first of them was stepped; empty if none was.
    """
    if any(argument is not None for argument in arguments):
        raise RuntimeError(
            "step(closure) cannot be used with release_gradients: the parameters are stepped in the backward "
            "pass of the closure. Call loss.backward() and then step()"
        )
    if getattr(optimizer, "grad_scale", None) is not None:
        raise RuntimeError(SCALING)
    present = {id(p) for group in optimizer.param_groups for p in group["params"]}
    gone = [name for key, name in known.items() if key not in present]
    if gone:
        raise RuntimeError(
            f"{gone[0]} is not the optimizer's any more: the model was wrapped after release_gradients. Call "
            "that after fully_shard or accelerator.prepare"
        )
    for index, (before, now) in enumerate(zip(stepped_with, options(optimizer), strict=False)):
        for name, (value, version) in before.items():
            if now[name] != (value, version):
                raise RuntimeError(
                    f"param group {index}: {name} was {value} in the backward pass, in which the parameters "
                    f"were stepped, and is {now[name][0]} at step(). Change it before the backward pass, or "
                    "after step()"
                )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, has no memory left."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


# ---- torch's own functions for full gradients  -----------------------------------------------------------

SCALING = (
    "GradScaler cannot be used with release_gradients: whether a scaled step is taken is known only when all "
    "gradients are there. Train in bfloat16, which needs no scaling (torch.autocast(..., torch.bfloat16), "
    "GradScaler(enabled=False))"
)
_in_use: weakref.WeakSet[Released] = weakref.WeakSet()
_scaled: set[int] = set()  # the backward passes of scaled losses that are running


def guard(handle: Released) -> None:
    """Have torch's clipping and ``GradScaler`` refused for its parameters, which have no effect on them."""
    for name in ("clip_grad_norm_", "clip_grad_value_"):
        original = getattr(clip_grad, name)
        if not hasattr(original, "_novoscale"):
            guarded = _guarded_clipping(original)
            setattr(clip_grad, name, guarded)
            setattr(torch.nn.utils, name, guarded)
    if not hasattr(GradScaler.scale, "_novoscale"):
        setattr(GradScaler, "scale", _guarded_scaling(GradScaler.scale))  # noqa: B010
    _in_use.add(handle)


def unguard(handle: Released) -> None:
    """The end of it."""
    _in_use.discard(handle)


def refuse_scaled() -> None:
    """Raise RuntimeError in the backward pass of a loss that GradScaler has scaled."""
    if _scaled and (torch._C._current_graph_task_id() in _scaled or in_nested_backward()):
        _scaled.clear()
        raise RuntimeError(SCALING)


def _guarded_clipping(original: Any) -> Any:
    @functools.wraps(original)
    def clip(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        ids = set(map(id, params))
        for handle in _in_use:
            released = set(map(id, handle.parameters()))
            if not released & ids:
                continue
            limit = args[0] if args else kwargs.get("max_norm")
            of_all = limit == math.inf and released <= ids and kwargs.get("norm_type", 2) == 2
            if not of_all or len(args) > 1:
                raise RuntimeError(
                    f"{original.__name__} cannot be used with release_gradients: {NOT_CLIPPED}"
                )
            return _norm(handle, original(params, math.inf))
        return original(params, *args, **kwargs)

    clip._novoscale = True  # type: ignore[attr-defined]
    return clip


def _norm(handle: Released, remaining: Tensor) -> Tensor:
    """Of the gradients that are gone and those that remain: what the Trainer logs when it does not clip."""
    full = remaining.full_tensor() if hasattr(remaining, "full_tensor") else remaining
    return torch.hypot(handle.grad_norm().to(full), full)


def _guarded_scaling(original: Any) -> Any:
    @functools.wraps(original)
    def scale(self: GradScaler, outputs: Any) -> Any:
        scaled = original(self, outputs)
        if self.is_enabled() and _in_use:
            for tensor in [scaled] if isinstance(scaled, Tensor) else scaled:
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(_note_scaled)  # type: ignore[no-untyped-call]
        return scaled

    scale._novoscale = True  # type: ignore[attr-defined]
    return scale


def _note_scaled(_: Tensor) -> None:
    _scaled.add(torch._C._current_graph_task_id())
    Variable._execution_engine.queue_callback(_scaled.clear)


def in_nested_backward() -> bool:
    """Whether this backward pass was started by a backward function: by reentrant checkpointing."""
    inside = False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _engine_run_backward.__code__:
            inside = True
        elif inside and frame.f_code is BackwardCFunction.apply.__code__:
            return True
        frame = frame.f_back
    return False
