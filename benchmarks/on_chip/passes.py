"""The passes over the elements, each with its bandwidth, beside that of a copy and of a read."""

from __future__ import annotations

import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from benchmarks.on_chip import training
from benchmarks.on_chip.gpu import Gpu, Run
from benchmarks.on_chip.rows import Row, attempted, name_of

SHAPE = (1 << 16, 4096)  # more than any cache holds
WARM, PROFILED = 3, 4


def measure(gpu: Gpu) -> Iterator[Row]:
    """A row for each form, after those of a copy and of a read."""
    copy, read = copy_and_read(gpu)
    yield {"weights": None, "form": "a copy", "GB/s": copy}
    yield {"weights": None, "form": "a read", "GB/s": read}
    for dtype in training.DTYPES:
        for form in training.FORMS:
            row: Row = {"weights": name_of(dtype), "form": form}
            yield attempted(row, partial(passes, gpu, dtype, form, copy))


def copy_and_read(gpu: Gpu) -> tuple[float, float]:
    """GB/s of a copy, which are read and written, and of a sum."""
    source = torch.ones(SHAPE, device=gpu.device)
    target = torch.empty_like(source)
    copy = bandwidth(gpu, lambda: target.copy_(source), 2 * source.nbytes)
    return copy, bandwidth(gpu, source.sum, source.nbytes)


def bandwidth(gpu: Gpu, run: Run, moved: int) -> float:
    """GB/s of a run that moves so many bytes: the best of five."""
    run()
    return max(moved / sum(us for _, us in gpu.ran(run)) / 1e3 for _ in range(5))


def passes(gpu: Gpu, dtype: torch.dtype, form: str, copy: float) -> Row:
    """Microseconds of statistic and update of one matrix, their GB/s alone and over a copy's; and all else.

    Raises:
        RuntimeError: one of them is not found among what ran.
    """
    p = nn.Parameter(torch.empty(SHAPE, dtype=dtype, device=gpu.device).uniform_(-1, 1))
    p.grad = torch.empty_like(p).normal_(std=0.01)
    optimizer = training.optimizer([p], fused=True, **training.FORMS[form])
    for _ in range(WARM):
        optimizer.step()
    ran = gpu.ran(lambda: [optimizer.step() for _ in range(PROFILED)])
    by_name: defaultdict[str, float] = defaultdict(float)
    for name, us in ran:
        by_name[name] += us / PROFILED
    roles = kernel_roles()
    moment = sum(t.nbytes for key, t in optimizer.state[p].items() if key in ("exp_avg", "exp_avg_scale"))
    found: Row = {}
    for role, moved in (("statistic", p.nbytes), ("update", 3 * p.nbytes + 2 * moment)):
        us = sum(us for name, us in by_name.items() if roles.get(name) == role)
        if not us:
            raise RuntimeError(f"no {role} among {', '.join(sorted(by_name))}")
        speed = moved / us / 1e3
        found |= {f"{role} us": us, f"{role} GB/s": speed, f"{role}, of a copy": speed / copy}
    rest = {name: us for name, us in by_name.items() if name not in roles}
    found |= {"all else us": sum(rest.values()), "launches": len(ran) / PROFILED}
    return found | {"details": {name[:80]: us for name, us in sorted(by_name.items(), key=lambda x: -x[1])}}


def kernel_roles() -> dict[str, str]:
    """Of each Triton kernel that is told a gradient's type, which pass it is of: one with weights updates."""
    found = {}
    package = importlib.import_module("novoscale.kernels.triton")  # not at the top: it needs Triton
    for module in pkgutil.iter_modules(package.__path__):
        for name, member in vars(importlib.import_module(f"{package.__name__}.{module.name}")).items():
            arguments = getattr(member, "arg_names", ())
            if "grad_type" in arguments:
                found[name] = "update" if "param_type" in arguments else "statistic"
    return found
