"""What runs an example of docs/quickstart.md, on a rank or in the process of the test."""

from __future__ import annotations

import os
from typing import Any


def train(code: str, folder: str) -> dict[str, Any]:
    """Run an example in a folder; which optimizer has stepped, how often, and its last loss."""
    before = os.getcwd()
    os.chdir(folder)
    names: dict[str, Any] = {}
    try:
        exec(compile(code, "docs/quickstart.md", "exec"), names)
    finally:
        os.chdir(before)
    if "trainer" in names:
        optimizer, loss = names["trainer"].optimizer, names["trainer"].state.log_history[-1]["train_loss"]
    elif "engine" in names:
        optimizer, loss = names["engine"].basic_optimizer, names["loss"].item()
    else:
        optimizer, loss = names["optimizer"], names["loss"].item() if "loss" in names else None
    optimizer = getattr(optimizer, "optimizer", optimizer)  # in Accelerate's wrapper
    return {
        "optimizer": f"{type(optimizer).__module__}.{type(optimizer).__name__}",
        "preset": [group["preset"] for group in optimizer.param_groups],
        "momentum_dtype": [group["momentum_dtype"] for group in optimizer.param_groups],
        "layers": len(optimizer.layer_norms()) if loss is not None else None,
        "loss": loss,
    }
