"""Digests of weights and states after ten steps, in every preset and format: what a change may not change.

``python tests/recorded_bits.py`` records them anew in ``recorded_bits.json``, which is for a change that is
meant to change bits, and is said in CHANGELOG.md. Weights and gradients are made of integers, so that the
digests are those of any processor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fixed_gradients
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from novoscale import NovoGrad

RECORDED = Path(__file__).with_suffix(".json")
STEPS = 10
RANKS = 3
FORMATS = ("float32", "bfloat16", "int8", "int4")
OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {"preset": "paper"},
    "adamw": {"preset": "adamw"},
    "rows": {"preset": "paper", "granularity": "row", "normalize": "rms", "max_grad_norm": 10.0},
    "adamw, clipped and relative": {"preset": "adamw", "clip_threshold": 0.5, "scale_parameter": True},
}
FORMS = {
    f"{name}, {dtype}": {**of, "momentum_dtype": dtype} for name, of in OPTIONS.items() for dtype in FORMATS
}
COMMON = {"lr": 0.05, "weight_decay": 0.1}


def model() -> nn.Module:
    """The parameters of ``fixed_gradients`` with weights made of integers."""
    made = fixed_gradients.FixedGradients()
    with torch.no_grad():
        for seed, p in enumerate(made.parameters(), 1):
            numbers = (torch.arange(p.numel()) + 1) * (2654435761 * seed) % 65521
            p.copy_(((numbers - 32760) / 16384).view(p.shape))
    return made


def in_one_process(form: str, dtype: torch.dtype, fused: bool | None) -> str:
    """The digest after training in one process."""
    net = model().to(dtype)
    optimizer = NovoGrad(net.named_parameters(), **{"preset": "paper", **COMMON, **FORMS[form]}, fused=fused)
    params = [*net.parameters()]
    for step in range(STEPS):
        for p, g in zip(params, fixed_gradients.gradients(step), strict=True):
            p.grad = g.to(dtype)
        optimizer.step()
    return digest(params + _states(params, optimizer))


def as_dtensors(form: str) -> str:
    """The digest of this rank's part after training with every parameter sharded by its first dimension."""
    mesh = init_device_mesh("cpu", (RANKS,))
    names, whole = zip(*model().named_parameters(), strict=True)
    params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in whole]
    optimizer = NovoGrad(zip(names, params, strict=True), **{"preset": "paper", **COMMON, **FORMS[form]})
    for step in range(STEPS):
        for p, g in zip(params, fixed_gradients.gradients(step), strict=True):
            p.grad = distribute_tensor(g, mesh, [Shard(0)])
        optimizer.step()
    return digest(params + _states(params, optimizer))


def under_zero(form: str, stage: int) -> str:
    """The digest of this rank's partitions after training under DeepSpeed."""
    import zero_ranks

    ds = zero_ranks.config(stage, RANKS)
    ds["optimizer"]["params"] = {"preset": "paper", **COMMON, **FORMS[form]}
    engine = zero_ranks.engine(ds, model=model())
    for step in range(STEPS):
        engine.backward(engine(torch.tensor(step)))
        engine.step()
    optimizer = engine.basic_optimizer
    # Not the flat weights, whose padding is uninitialised memory under ZeRO-3.
    weights = [piece[2] for piece in fixed_gradients.pieces(optimizer)]
    return digest(weights + _states([*optimizer.state], optimizer))


def _states(params: Iterable[Tensor], optimizer: NovoGrad) -> list[Tensor]:
    states = [optimizer.state[p] for p in params]
    return [state[key] for state in states for key in sorted(state)]


def digest(tensors: Iterable[Tensor]) -> str:
    """A hash of the bits of some tensors; of DTensors, of this rank's parts."""
    found = hashlib.sha256()
    for t in tensors:
        local = t.to_local() if isinstance(t, DTensor) else t
        found.update(f"{local.dtype} {tuple(local.shape)}".encode())
        found.update(local.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def record() -> None:
    """Write the digests of the present code."""
    from novoscale.tools.local_ranks import Ranks

    found: dict[str, Any] = {"one process": {}, "DTensors": {}, "ZeRO-2": {}, "ZeRO-3": {}}
    with Ranks(RANKS) as ranks:
        for form in FORMS:
            for dtype in (torch.float32, torch.bfloat16):
                found["one process"][f"{form}, {dtype} weights"] = in_one_process(form, dtype, None)
            found["DTensors"][form] = ranks.run(as_dtensors, form)
        for stage, name in ((2, "paper"), (3, "adamw")):
            for form in (f"{name}, {dtype}" for dtype in FORMATS):
                found[f"ZeRO-{stage}"][form] = ranks.run(under_zero, form, stage)
    RECORDED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    record()
