import gc
import os
import sys
from pathlib import Path

# Before anything imports DeepSpeed, and for every rank that a test starts. Tests of distribution run on
# the CPU with gloo also where there is a GPU.
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"
# pytest has put the folders of pyproject.toml's `pythonpath` first.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [
        *(
            folder
            for folder in sys.path
            if Path(folder).is_relative_to(Path(__file__).parent.parent) and ".venv" not in folder
        ),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
)

import pytest
import torch  # after OMP_NUM_THREADS

# Before anything imports Triton: without a GPU its kernels are run by its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from novoscale.tools import deepspeed_operation as operation

# Not torch's, which is one for all environments: they would make each other build again and again.
os.environ.setdefault(operation.FOLDER, str(operation.own_folder()))


@pytest.fixture(scope="session")
def deepspeed_operation():
    """What every process group of DeepSpeed builds or loads, built before any rank asks for it."""
    operation.build()


# Files of a few tests that take long: xdist would give them out last, and one core would wait for another.
LONG = ("test_triton_compiled", "test_packaging", "test_chip", "test_demo", "test_tasks", "test_run")


def pytest_collection_modifyitems(items):
    """The files that take long come first; the Makefile keeps xdist from ordering them anew."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_collection_finish():
    """What was imported is no garbage: a test that collects it need not look at all of torch, 50 times."""
    gc.collect()
    gc.freeze()
