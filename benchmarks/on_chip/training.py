"""Small trainings of every form, of which all bits are looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shapes import Shapes
from novoscale import NovoGrad

FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"momentum_dtype": "bfloat16"},
    "int8": {"momentum_dtype": "int8"},
    "int4": {"momentum_dtype": "int4"},
    "int8, rows": {"momentum_dtype": "int8", "granularity": "row", "normalize": "rms"},
    "adamw": {"preset": "adamw"},
    "adamw, int8": {"preset": "adamw", "momentum_dtype": "int8"},
    "adamw, int4": {"preset": "adamw", "momentum_dtype": "int4"},
}
DTYPES = (torch.float32, torch.bfloat16)


def parameters(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
    """Uniform in -1..1, the same on every device, with gradients."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.empty(shape).uniform_(-1, 1, generator=generator) for shape in shapes]
    params = [nn.Parameter(tensor.to(device, dtype)) for tensor in drawn]
    for p, gradient in zip(params, gradients(params, 0), strict=True):
        p.grad = gradient
    return params


def gradients(params: Sequence[Tensor], step: int) -> list[Tensor]:
    """Normal, of 0.01, the same on every device; of bfloat16 parameters bfloat16."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [(0.01 * torch.randn(p.shape, generator=generator)).to(p.device, p.dtype) for p in params]


def optimizer(params: Sequence[Tensor], **options: Any) -> NovoGrad:
    """With options that everything is in play with."""
    return NovoGrad(params, **{"preset": "paper", "lr": 0.01, "weight_decay": 0.1, **options})


def snapshot(optimizer: NovoGrad) -> dict[str, list[Tensor]]:
    """Copies of the weights and of each kind of state, on the CPU."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    found = {"weights": [p.detach().cpu().clone() for p in params]}
    for p in params:
        for key, value in optimizer.state[p].items():
            found.setdefault(key, []).append(value.cpu().clone())
    return found


def differing(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> dict[str, int]:
    """Of each kind how many elements have other bits, if any have."""
    counts = {
        key: sum(int((_bits(a) != _bits(b)).sum()) for a, b in zip(found[key], expected[key], strict=True))
        for key in expected
    }
    return {key: count for key, count in counts.items() if count}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def failed(different: dict[str, int], than: str) -> dict[str, str]:
    """What a row says where bits differ."""
    if not different:
        return {}
    return {"failed": f"other bits than {than}: {', '.join(f'{n} of {k}' for k, n in different.items())}"}
