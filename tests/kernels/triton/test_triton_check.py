"""A Triton that cannot build, compile or compute is found out before a step, which then goes on without."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from patience import patient

pytest.importorskip("triton", reason="Triton is not installed")

from novoscale.kernels.triton import check as triton_check

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# A GPU that is not there, with the real driver of Triton; a tensor on the CPU stands in for one on it.
STEP = """
import json
import warnings
import torch
from triton.backends import backends
from novoscale import NovoGrad, kernels
backends["nvidia"].driver.is_active = staticmethod(lambda: True)
kernels.FUSED_DEVICES["cpu"] = "triton"
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    optimizer = NovoGrad([p], lr=0.1, preset="paper")
    optimizer.step()
    optimizer.step()
print(json.dumps([p.tolist(), [str(w.message) for w in said if "fused kernel" in str(w.message)]]))
"""


def test_a_triton_that_works_passes():
    triton_check.check(DEVICE)


def test_a_wrong_result_is_an_error(monkeypatch):
    class NothingWritten:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    monkeypatch.setattr(triton_check, "_sum_of_squares", NothingWritten())
    with pytest.raises(RuntimeError, match=r"gives 0\.0 where 5559680 is right"):
        triton_check.check(DEVICE)


@pytest.mark.skipif(torch.version.hip is not None, reason="NVIDIA's driver beside AMD's")
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/bin/false", "CalledProcessError: .*returned non-zero exit status 1"),  # as without Python.h
        ("/no/such/compiler", "FileNotFoundError: .*/no/such/compiler"),
    ],
)
def test_a_step_goes_on_where_triton_cannot_build_its_driver(tmp_path, compiler, reason):
    folder = str(tmp_path)
    environment = {"CC": compiler, "TRITON_CACHE_DIR": folder, "TRITON_LIBCUDA_PATH": folder}
    environment = {**os.environ, "TRITON_INTERPRET": "0", **environment}
    done = subprocess.run(
        [sys.executable, "-c", STEP], env=environment, capture_output=True, text=True, timeout=patient(200)
    )
    assert done.returncode == 0, done.stderr
    weights, (warning,) = json.loads(done.stdout)
    assert weights == pytest.approx([1 - 0.1 / 3**0.5 * (1 + 1.95)] * 3)
    assert re.search(f"fused kernel for cpu cannot be used: {reason}", warning)
