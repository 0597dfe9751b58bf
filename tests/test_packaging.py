"""What is installed: from a wheel, an sdist and an editable install, and with it ``integrations/``."""

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import packages
import pytest
from patience import patient

import novoscale

ROOT = Path(__file__).parent.parent
FILES = (
    "import novoscale, novoscale.integrations.deepspeed as i; print(novoscale.__file__); print(i.__file__)"
)


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installs_with_its_integrations(kind, tmp_path):
    def run(*command):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=patient(240)
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
        package, integrations = site / "novoscale", site / "novoscale" / "integrations"
    else:
        run(*pip, "install", *options, "--editable", str(ROOT))
        package, integrations = ROOT / "novoscale", ROOT / "integrations"
    expected = [package / "__init__.py", integrations / "deepspeed" / "__init__.py"]
    found = run(python, "-W", "ignore", "-c", FILES).splitlines()[-2:]
    assert [Path(f) for f in found] == expected
    # The core needs torch alone.
    core = "import sys, novoscale; print({'deepspeed', 'accelerate', 'transformers'} & set(sys.modules))"
    assert run(python, "-c", core).strip() == "set()"


def test_a_wheel_and_an_sdist_train_in_an_empty_environment_with_torch_alone(capsys):
    packages.main([packages.CORE])
    assert capsys.readouterr().out.splitlines() == [
        f"novoscale-{novoscale.__version__}-py3-none-any.whl, core: works",
        f"novoscale-{novoscale.__version__}.tar.gz, core: works",
    ]


def test_a_wheel_has_every_file_of_the_package(tmp_path):
    wheel, _ = packages.build(tmp_path)
    with ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not name.endswith("/") and ".dist-info/" not in name}
    listed = subprocess.run(
        ["git", "ls-files", "novoscale", "integrations"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    moved = {name.replace("integrations/", "novoscale/integrations/", 1) for name in listed}
    assert packed == {name for name in moved if not name.endswith(".md")}


def test_every_extra_has_a_smoke_test_and_every_place_the_same_version():
    extras = importlib.metadata.metadata("novoscale").get_all("Provides-Extra")
    assert set(packages.SMOKE) == {packages.CORE, *extras}
    assert f"\nversion: {novoscale.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {novoscale.__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_the_command_line_needs_its_own_extra_only():
    others = "psutil,matplotlib,numpy,transformers,accelerate,deepspeed,pydantic,yaml"
    # What is None there cannot be imported.
    hidden = f"import sys; sys.modules.update(dict.fromkeys({others!r}.split(',')))"
    code = f"{hidden}; from novoscale.cli import app; app(['--help'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=patient(120)
    )
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("verify", "doctor", "plan", "memory", "to-universal"))


def test_an_extra_that_there_is_not_is_named():
    with pytest.raises(SystemExit, match="no extra nothing; there are: core, cli"):
        packages.main(["nothing"])
