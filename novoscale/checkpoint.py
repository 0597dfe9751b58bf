"""State in and out of the optimizer, without loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from novoscale.layout import Layout

PER_LAYER = ("exp_avg_sq", "step")


@contextmanager
def recording(optimizer: Optimizer) -> Iterator[dict[str, Any]]:
    """Record the state dict that torch's ``load_state_dict`` takes, as the user's hooks leave it."""
    record: dict[str, Any] = {}
    handle = optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: record.update(state_dict))
    try:
        yield record
    finally:
        handle.remove()


def keep_dtypes(state: dict[str, Any], saved: Mapping[str, Any], layouts: Mapping[int, Layout]) -> None:
    """Put the saved tensors, in the dtype in which they were saved, in place of those that torch cast.

    torch casts state to the parameter's dtype before it calls ``__setstate__``.

    Args:
        state: what ``__setstate__`` was given; changed in place.
        saved: the state dict that was loaded.
        layouts: the layout of each tensor of ``param_groups``, by id.

    Raises:
        ValueError: a state that does not fit its parameter.
    """
    ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
    params = [p for group in state["param_groups"] for p in group["params"]]
    for position, (key, p) in enumerate(zip(ids, params, strict=True)):
        if key not in saved["state"]:
            continue
        layout = layouts.get(id(p))
        kept = {
            name: _fitted(position, name, value, p, layout) for name, value in saved["state"][key].items()
        }
        state["state"][p] = kept


def _fitted(position: int, name: str, value: Any, p: Tensor, layout: Layout | None) -> Any:
    if name == "step":  # other NovoGrads keep one number per parameter
        value = torch.as_tensor(value, dtype=torch.float32)
    if not isinstance(value, Tensor):
        return value
    if name == "exp_avg" and value.shape != p.shape:
        raise ValueError(
            f"exp_avg of parameter {position} has shape {tuple(value.shape)}, the parameter "
            f"{tuple(p.shape)}: the state belongs to another model or another cut of it"
        )
    if name in PER_LAYER and layout is not None:
        layers = len(layout.layers)
        if name == "step" and value.numel() == 1:
            value = value.expand(layers)
        if value.numel() != layers:
            raise ValueError(
                f"{name} of parameter {position} has {value.numel()} elements where NovoGrad keeps one per "
                f"layer, here {layers}: this is not the state of a NovoGrad, or of one whose layers are cut "
                "in another way"
            )
        value = value.reshape(layers)
    return value.to(p.device, copy=True)
