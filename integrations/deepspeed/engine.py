"""Methods of DeepSpeed's engine that do something else, or more, where its optimizer is a NovoGrad."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from novoscale import NovoGrad


def extend(name: str, own: Callable[..., Any]) -> None:
    """Have a method of the engine answered by ``own`` if its optimizer is a NovoGrad. Idempotent.

    Args:
        name: of the method.
        own: is given the method, bound to the engine, the engine, and the arguments of the call.
    """
    original = getattr(DeepSpeedEngine, name)
    if hasattr(original, "_novoscale"):
        return

    @functools.wraps(original)
    def extended(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(self, "basic_optimizer", None), NovoGrad):
            return own(functools.partial(original, self), self, *args, **kwargs)
        return original(self, *args, **kwargs)

    extended._novoscale = True  # type: ignore[attr-defined]
    setattr(DeepSpeedEngine, name, extended)
