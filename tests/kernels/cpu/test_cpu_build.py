"""The library of the CPU kernel: built at first use, by several processes at once, or a clear message."""

import multiprocessing
import sys
from pathlib import Path

import pytest
import torch

from novoscale.kernels.cpu import build

try:
    build.load()
except build.BuildError as error:
    pytest.skip(f"no CPU kernel here: {error}", allow_module_level=True)


def _load(monkeypatch, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    return build.load.__wrapped__()


@pytest.mark.parametrize(("compiler", "message"), [("/bin/false", "failed"), ("/no/compiler", "needs a C")])
def test_without_a_compiler_the_message_says_so(tmp_path, monkeypatch, compiler, message):
    with pytest.raises(build.BuildError, match=message):
        _load(monkeypatch, CXX=compiler, XDG_CACHE_HOME=tmp_path)


def test_what_the_compiler_says_is_in_the_message_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-fnonsense"))
    with pytest.raises(build.BuildError, match="nonsense"):
        _load(monkeypatch, XDG_CACHE_HOME=tmp_path)
    assert not list((tmp_path / "novoscale").iterdir())


@pytest.fixture
def quick(monkeypatch):
    """A build that takes a second: the code is not run."""
    monkeypatch.setattr(build, "FLAGS", tuple(flag.replace("-O3", "-O0") for flag in build.FLAGS))


@pytest.mark.parametrize("home", ["/proc", "relative"])
def test_without_a_home_that_can_be_written_to(quick, tmp_path, monkeypatch, home):
    monkeypatch.chdir(tmp_path)
    assert _load(monkeypatch, XDG_CACHE_HOME=home).novoscale_update
    assert not list(tmp_path.iterdir())


def test_two_processes_may_build_at_once(quick, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fork = multiprocessing.get_context("fork")  # neither has to import torch
    both = [fork.Process(target=build.load.__wrapped__) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    (library,) = (tmp_path / "novoscale").iterdir()
    assert library.suffix == ".so"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_threads_are_torchs():
    torch.ones(1_000_000).sum()
    maps = Path("/proc/self/maps").read_text().split()
    assert len({Path(word).resolve() for word in maps if "libgomp" in word}) == 1
