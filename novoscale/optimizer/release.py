"""Steps in the backward pass: a gradient is freed as soon as it has been used.

A layer-wise optimizer needs one layer's gradient at a time. With ``release_gradients`` each parameter is
stepped when its gradient is complete, so that the gradients of a model are never there together. The training
is the one without it, to the bit, but where it says otherwise; what cannot be the same is refused.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from novoscale.optimizer import release_checks
from novoscale.optimizer.novograd import NovoGrad

# A step has its price, whatever the number of elements: so many are stepped together, in a small model a part
# of it, and a larger parameter alone.
ENOUGH = 1 << 25
PARTS = 4


def release_gradients(model: nn.Module, optimizer: Any) -> ReleasedGradients:
    """Step each parameter in the backward pass, as soon as its gradient is complete, and free the gradient.

    The training loop stays as it is: ``optimizer.step()`` and ``zero_grad()`` do nothing more to what has
    been stepped. Small parameters are stepped together, up to 32M elements (or a quarter of the model); under
    FSDP2 those of an FSDP unit, with one collective. A gradient that is not finite leaves its parameter as
    it is, and no other: see ``NovoGrad.skipped_steps``.

    Where a gradient comes in parts, as that of a parameter that several reentrant checkpoints use, it is used
    at the end of the backward pass; in a model with DTensors, that of a plain parameter at ``step()``.

    Use it after the model is on its device and wrapped (``fully_shard``, ``accelerator.prepare``). Also a
    context manager: ``with release_gradients(model, optimizer): ...``.

    Args:
        model: the model, or whatever ``nn.Module`` has all parameters of the optimizer.
        optimizer: a NovoGrad, or Accelerate's wrapper of one, whose accumulation is then followed.

    Raises:
        TypeError: another optimizer.
        ValueError: what cannot be exact: ``max_grad_norm``, DDP, FSDP1, DeepSpeed, sparse gradients; a model
            that has not all of the optimizer's parameters.
        RuntimeError: it is in use for this optimizer already.
    """
    return ReleasedGradients(model, optimizer)


class ReleasedGradients:
    """The handle of ``release_gradients``."""

    # Of the present step:
    _stepped: set[int]  # ids of the parameters that have been stepped
    _came: defaultdict[int, int]  # in how many parts gradients have come, by id
    _options: list[Any]  # of the param groups, when the first parameter was stepped
    _backward: int  # the pass whose end is awaited

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self._accelerated = getattr(optimizer, "gradient_state", None)  # Accelerate: whether it accumulates
        self._optimizer = release_checks.novograd(optimizer)
        self._optimizer.released_by(self)
        try:
            self._names = release_checks.names(model, self._optimizer)
        except (TypeError, ValueError):
            self._optimizer.released_by(None)
            raise
        self._params = list(model.parameters())
        self._of_fsdp = _fsdp_units(model)
        # Of plain parameters among DTensors nobody knows here who adds up the gradients, before step().
        sharded = any(isinstance(p, DTensor) for p in self._params)
        self._alone = {id(p) for p in self._params if sharded and not isinstance(p, DTensor)}
        self._units = self._form_units()
        self._formed = False  # by the order in which gradients come
        self._doubtful = set(map(id, tied(model)))  # parameters whose gradient may come in parts
        self._came_at_once: set[int] = set()  # those whose gradient has come in one
        self._in_parts: set[int] = set()  # those whose gradient has come in several
        self._depth = 0  # of accumulate()
        self._contents: dict[int, int] = {}  # the address of what a parameter holds, by its id
        self._lock = threading.Lock()  # there is a thread for each device
        self._begin_step()
        self._removable = [
            *map(self._watch, self.parameters()),
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
            self._optimizer.register_load_state_dict_post_hook(lambda _: self._begin_step()),
            *release_checks.at_forward(model, self._attach_again),
        ]
        release_checks.guard(self)

    def _watch(self, p: Tensor) -> Any:
        frozen = not p.requires_grad
        p.requires_grad_(True)  # else there are no hooks; it may be thawed later
        handle = p.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
        p.requires_grad_(not frozen)
        self._contents[id(p)] = p._cdata
        return handle

    def _attach_again(self) -> None:
        """Have the hooks of parameters called whose contents were swapped, as by ``model.to()``.

        ``torch.utils.swap_tensors`` leaves a parameter its hooks, and takes away what calls them.
        """
        for p in self.parameters():
            if self._contents[id(p)] != p._cdata:
                p._post_accumulate_grad_hooks = p._post_accumulate_grad_hooks
                self._contents[id(p)] = p._cdata

    # ---- for the user -----------------------------------------------------------------------------

    def remove(self) -> None:
        """Step as usual from here on."""
        for handle in self._removable:
            handle.remove()
        self._removable = []
        release_checks.unguard(self)
        self._optimizer.released_by(None)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Keep the gradients of the backward passes inside: of all micro-batches but the last."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def refuse_half_a_step(self) -> None:
        """Raise RuntimeError if some parameters have been stepped and ``step()`` was not called since."""
        if self._stepped:
            raise RuntimeError(self._half_done())

    def parameters(self) -> list[Tensor]:
        """The parameters whose gradients are released."""
        return [p for unit in dict.fromkeys(self._units.values()) for _, p in unit.members]

    def grad_norm(self) -> Tensor:
        """The Euclidean norm of the gradients that have been released in this step: 0-dim.

        Raises:
            RuntimeError: with ``norm_type=0`` it is not known.
        """
        if any(group["norm_type"] == 0 for group in self._optimizer.param_groups):
            raise RuntimeError("the norm of the gradients is not known with norm_type=0")
        squares = self._optimizer.squares_of_gradients()
        return torch.zeros((), device="cpu") if squares is None else squares.sqrt()

    def __enter__(self) -> ReleasedGradients:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._stepped:
            warnings.warn(self._half_done(), stacklevel=2)
        self.remove()

    # ---- a gradient ---------------------------------------------------------------------------------

    def _arrived(self, p: Tensor) -> None:
        """The gradient of a parameter has been added to: step it if that was all of it."""
        key = id(p)
        if key not in self._units:
            return  # it has the former contents of a parameter
        with self._lock:
            self._refuse(p)
            if self._accumulating() or key in self._alone:
                return
            self._came[key] += 1
            unit = self._units[key]
            if self._is_complete(key):
                unit.complete.add(key)
            else:
                unit.complete.discard(key)
            if key in unit.complete and unit.complete >= unit.expected:
                self._step(unit)
            elif self._backward != torch._C._current_graph_task_id():
                self._backward = torch._C._current_graph_task_id()
                Variable._execution_engine.queue_callback(self._end_of_backward)

    def _refuse(self, p: Tensor) -> None:
        """Raise RuntimeError in a backward pass that cannot be this step's; drop what it gave."""
        try:
            release_checks.refuse_scaled()
            if id(p) in self._stepped:
                raise RuntimeError(self._second_pass(id(p)))
        except RuntimeError:
            p.grad = None
            raise

    def _accumulating(self) -> bool:
        return self._depth > 0 or not getattr(self._accelerated, "sync_gradients", True)

    def _is_complete(self, key: int) -> bool:
        """Whether what has come of a parameter's gradient is known to be all of it."""
        if self._came[key] > 1:
            self._in_parts.add(key)
        if key in self._in_parts:
            return False
        if key not in self._came_at_once and release_checks.in_nested_backward():
            self._doubtful.add(key)
            _say_once()
        return key in self._came_at_once or key not in self._doubtful

    def _end_of_backward(self) -> None:
        """Step what is waiting for parameters that are not used, and, after the outermost pass, all else."""
        nested = release_checks.in_nested_backward()
        with self._lock:
            for unit in dict.fromkeys(self._units.values()):
                if not nested:
                    unit.complete |= {id(p) for _, p in unit.members} & self._came.keys()
                self._step(unit)

    def _step(self, unit: _Unit) -> None:
        by_group: defaultdict[int, list[Tensor]] = defaultdict(list)
        for index, p in unit.members:
            if id(p) in unit.complete and id(p) not in self._stepped:
                by_group[index].append(p)
        if not by_group:
            return
        if not self._options:
            self._options = release_checks.options(self._optimizer)
        stepped = [p for members in by_group.values() for p in members]
        _wait_for_offload(stepped)
        try:
            self._optimizer.step_some(by_group.items())
        except (RuntimeError, MemoryError) as error:
            if release_checks.is_out_of_memory(error):
                raise type(error)(f"{error}\n{self._half_done()}") from error
            raise
        for p in stepped:
            p.grad = None
            self._stepped.add(id(p))

    # ---- a step -------------------------------------------------------------------------------------

    def _begin_step(self, came: AbstractSet[int] = frozenset()) -> None:
        """Wait for gradients; for those that came at the last step, if that is known."""
        self._stepped, self._came, self._options, self._backward = set(), defaultdict(int), [], -1
        late = self._alone | self._in_parts | self._doubtful - self._came_at_once
        for unit in dict.fromkeys(self._units.values()):
            used = {id(p) for _, p in unit.members if p.requires_grad} - late
            unit.expected, unit.complete = used & came if came else used, set()

    def _form_units(self) -> dict[int, _Unit]:
        """The units by the ids of their members."""
        keys: dict[int, Any] = dict(self._of_fsdp)
        for number, together in enumerate(stepped_together([p for p in self._params if id(p) not in keys])):
            keys |= {id(p): (p.device, number) for p in together}
        made: dict[Any, _Unit] = {}
        units = {}
        for index, group in enumerate(self._optimizer.param_groups):
            for p in group["params"]:
                if id(p) in keys:
                    unit = units[id(p)] = made.setdefault(keys[id(p)], _Unit([]))
                    unit.members.append((index, p))
        return units

    def _before_step(self, optimizer: NovoGrad, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        release_checks.before_step(optimizer, (*arguments[1:], *named.values()), self._names, self._options)

    def _after_step(self, *_: Any) -> None:
        self._attach_again()  # of a model whose parts are called by themselves
        self._came_at_once |= {key for key, times in self._came.items() if times == 1} - self._in_parts
        if self._came and not self._formed:
            order = {key: number for number, key in enumerate(reversed(self._came))}  # the first ones last
            self._params.sort(key=lambda p: order.get(id(p), -1))
            self._units, self._formed = self._form_units(), True
        self._begin_step(self._came.keys())

    # ---- what is said -------------------------------------------------------------------------------

    def _second_pass(self, key: int) -> str:
        return (
            f"{self._names[key]}: another backward pass before step(): the gradient of the one before has "
            "been used for a step. Where a step has several backward passes (accumulation, several losses, "
            "retain_graph), do all but the last inside of `with handle.accumulate():`. Where this pass is of "
            "another network's loss, set requires_grad=False on these parameters for it. If the pass before "
            f"has failed: {self._half_done()}"
        )

    def _half_done(self) -> str:
        return (
            f"{len(self._stepped)} of {len(self._names)} parameters were stepped in the backward pass, and "
            "stay so: load a checkpoint, or call optimizer.step() to end this step as it is"
        )


@dataclass(eq=False)
class _Unit:
    """Parameters that are stepped together.

    Attributes:
        members: with the index of their param group, in the order of ``param_groups``.
        expected: ids of those whose gradients are waited for.
        complete: ids of those whose gradients are here, and complete.
    """

    members: list[tuple[int, Tensor]]
    expected: set[int] = field(default_factory=set)
    complete: set[int] = field(default_factory=set)


def stepped_together(params: Sequence[Tensor]) -> list[list[Tensor]]:
    """Which parameters are stepped together where no FSDP unit says it, each list as gradients come.

    Args:
        params: in the order of the model. Gradients are taken to come in the reverse order.
    """
    enough = min(ENOUGH, sum(p.numel() for p in params) // PARTS)
    found: list[list[Tensor]] = []
    small: list[Tensor] = []
    for p in reversed(params):
        if p.numel() >= enough:
            found.append([p])
            continue
        if small and sum(s.numel() for s in (*small, p)) > enough:
            found.append(small)
            small = []
        small.append(p)
    return [*found, small] if small else found


def _fsdp_units(model: nn.Module) -> dict[int, int]:
    """Which FSDP unit each sharded parameter belongs to: that of the nearest module around it."""
    found: dict[int, int] = {}
    for module in reversed(list(model.modules())):  # inner modules first
        if isinstance(module, FSDPModule):
            for p in module.parameters():
                if isinstance(p, DTensor):
                    # Modules that were given to fully_shard as a list share their state.
                    found.setdefault(id(p), id(module._get_fsdp_state()))
    return found


def tied(model: nn.Module) -> list[Tensor]:
    """The parameters that several modules have."""
    times: defaultdict[Tensor, int] = defaultdict(int)
    for _, p in model.named_parameters(remove_duplicate=False):
        times[p] += 1
    return [p for p, n in times.items() if n > 1]


@functools.cache
def _say_once() -> None:
    warnings.warn(
        "reentrant activation checkpointing: the first backward pass keeps the gradients, for only at its "
        "end is it known which parameters get theirs in several parts. use_reentrant=False has them released "
        "at once",
        stacklevel=2,
    )


def _wait_for_offload(params: Sequence[Tensor]) -> None:
    """FSDP2's CPUOffloadPolicy copies gradients without waiting for it, in some versions of torch."""
    if torch.cuda.is_available() and any(isinstance(p, DTensor) and p.device.type == "cpu" for p in params):
        torch.cuda.current_stream().synchronize()
