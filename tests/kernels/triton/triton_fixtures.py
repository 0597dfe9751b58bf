"""Fixtures of the tests of the Triton kernels: a plugin, because on a chip they run without conftest.py."""

import numpy as np
import pytest
from triton.runtime import interpreter
from triton_cases import CUDA

from novoscale.kernels.triton import elements as kernels
from novoscale.kernels.triton import factored as triton_factored
from novoscale.kernels.triton import statistic as triton_statistic
from novoscale.kernels.triton import update as triton_update


@pytest.fixture
def small(monkeypatch):
    """Chunks and tiles so small that small tensors have several."""
    monkeypatch.setattr(kernels, "CHUNK", 512)
    monkeypatch.setattr(kernels, "TILE", 256)


@pytest.fixture
def true_hints(monkeypatch):
    """What the kernels promise the compiler of their numbers, which the interpreter would not look at."""
    if CUDA:
        return

    def check(handle, name, values):
        number = values[-1]
        groups = handle.data.astype(np.int64).reshape(-1, min(number, handle.data.size))
        first = groups[:, :1]
        true = {
            "tt.divisibility": first % number == 0,
            "tt.contiguity": groups == first + np.arange(groups.shape[1]),
            "tt.constancy": groups == first,
        }
        assert true[name].all(), name

    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", check)


@pytest.fixture
def waves(small, monkeypatch):
    """Parts of panels and room for partials so small that small tensors have several."""
    monkeypatch.setattr(triton_factored, "SIDE", 256)
    monkeypatch.setattr(triton_factored, "PARTIALS", 1500)


class Recorded:
    """A kernel that notes the options of its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches, self.programs = kernel, [], []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launches.append(options)
            self.programs.append(grid[0])
            return self.kernel[grid](*args, **options)

        return launch


@pytest.fixture
def recorded(monkeypatch):
    found = {}
    for module, names in (
        (triton_statistic, ("chunk_statistic", "rows_statistic", "layer_statistic")),
        (triton_update, ("update",)),
        (triton_factored, ("strip_statistic", "panel_statistic")),
    ):
        for name in names:
            found[name] = Recorded(getattr(module, name))
            monkeypatch.setattr(module, name, found[name])
    return found
