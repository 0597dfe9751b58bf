"""A wheel and an sdist, installed into empty environments, without and with each extra; a smoke test in each.

    make packages                         # everything: an environment for each extra, some minutes
    make packages ARGS="core cli"         # these; "core" is without an extra

What is built is the last commit, in a clone: nothing that lies about in the folder gets into it.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORE = "core"
STEP = """
import sys, torch
OF_TORCH = set(sys.modules)  # such as numpy, where it is installed
import importlib.metadata, novoscale
assert novoscale.__version__ == importlib.metadata.version("novoscale")
extras = {"deepspeed", "accelerate", "transformers", "typer", "rich", "matplotlib", "numpy"}
assert not extras & set(sys.modules) - OF_TORCH
trained = []
for fused in (False, True):  # True builds the kernel, from the sources in the package
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(300, 40))
    optimizer = novoscale.NovoGrad([weight], lr=0.01, preset="adamw", momentum_dtype="int8", fused=fused)
    for _ in range(3):
        weight.grad = torch.randn(300, 40)
        optimizer.step()
    trained.append(weight.detach())
assert torch.equal(*trained)
"""
PLAN = "from novoscale.cli import app; app(['plan', 'llama-8b', '--world', '8'])"
SMOKE = {
    CORE: STEP,
    "cli": "from novoscale.cli import app; app(['--help'])",
    "deepspeed": "import novoscale.integrations.deepspeed",
    "accelerate": "import novoscale.integrations.accelerate",
    "transformers": "import novoscale.integrations.transformers",
    "lightning": "import lightning, novoscale",
    "memory": PLAN,
    "benchmarks": "import novoscale.integrations.deepspeed, accelerate, matplotlib, psutil",
    "rivals": "import bitsandbytes, pytorch_optimizer, torchao",
    "tasks": "import peft, pysword, sacrebleu",
    "docs": "import mkdocs, mkdocstrings",
    "tests": "import hypothesis, pytest, setuptools, triton",
}


def main(names: list[str]) -> None:
    """Build, install, try; the first failure ends it."""
    unknown = [name for name in names if name not in SMOKE]
    if unknown:
        raise SystemExit(f"no extra {', '.join(unknown)}; there are: {', '.join(SMOKE)}")
    with tempfile.TemporaryDirectory() as folder:
        wheel, sdist = build(Path(folder))
        for name in names or list(SMOKE):
            python = environment(Path(folder) / name)
            smoke(python, wheel, name)
            if name == CORE:
                run(python, "-I", "-m", "pip", "uninstall", "--quiet", "--yes", "novoscale")
                smoke(python, sdist, name)


def build(folder: Path) -> tuple[Path, Path]:
    """A wheel and an sdist of the last commit; the wheel from the sdist, as pip does it."""
    run("git", "clone", "--quiet", str(ROOT), str(folder / "source"))
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, str(folder / "dist"), cwd=folder / "source")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder / "dist"))
    run(sys.executable, "-m", "pip", "wheel", *options, str(unpacked))
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel, sdist


def environment(folder: Path) -> str:
    """An empty environment's Python."""
    venv.create(folder, with_pip=True)
    return str(folder / "bin" / "python")


def smoke(python: str, package: Path, extra: str) -> None:
    """Install with what is needed, in the versions of constraints.txt, and try.

    With ``-I``, for what the tests set in PYTHONPATH would be found before the package.
    """
    what = str(package) if extra == CORE else f"{package}[{extra}]"
    options = ("--quiet", "--disable-pip-version-check", "--constraint", str(ROOT / "constraints.txt"))
    run(python, "-I", "-m", "pip", "install", *options, what)
    run(python, "-I", "-m", "pip", "check")
    run(python, "-I", "-W", "ignore", "-c", SMOKE[extra], cwd=package.parent)
    print(f"{package.name}, {extra}: works", flush=True)


def run(*command: str, cwd: str | Path | None = None) -> None:
    """Run a command, and show what it printed if it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)[:300]}\nended with code {done.returncode}\n{done.stdout}{done.stderr}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
