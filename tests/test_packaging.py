"""``integrations/`` is ``novoscale.integrations``, from a wheel and from an editable install."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = (
    "import novoscale, novoscale.integrations.deepspeed as i; print(novoscale.__file__); print(i.__file__)"
)


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installs_with_its_integrations(kind, tmp_path):
    def run(*command):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "venv", "--without-pip", "venv")
    # torch and DeepSpeed from here; the environment's own novoscale is an editable install, which is found
    # through a .pth file, and those are not read in a folder that is itself added by one.
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "outer.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = str(tmp_path / "venv" / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    if kind == "wheel":
        run("git", "clone", "--quiet", str(ROOT), "source")  # building leaves files in the source folder
        run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", "dist", "./source")
        run(*pip, "install", *options, *map(str, (tmp_path / "dist").glob("novoscale-*.whl")))
        expected = [site / "novoscale" / "__init__.py", site / "novoscale" / "integrations" / "deepspeed.py"]
    else:
        run(*pip, "install", *options, "--editable", str(ROOT))
        expected = [ROOT / "novoscale" / "__init__.py", ROOT / "integrations" / "deepspeed.py"]
    found = run(python, "-W", "ignore", "-c", FILES).splitlines()[-2:]
    assert [Path(f) for f in found] == expected
    # The core needs torch alone.
    core = "import sys, novoscale; print({'deepspeed', 'accelerate', 'transformers'} & set(sys.modules))"
    assert run(python, "-c", core).strip() == "set()"
