"""The library of the CPU kernels: ``kernels.cpp`` and ``layers.h``, built at first use.

The C++ source knows nothing of torch: it is called with addresses, so it compiles in seconds and serves
every version of torch. The library is kept in ``$XDG_CACHE_HOME/novoscale`` (``~/.cache/novoscale``) under a
name made of all that it depends on. It chooses between the instruction sets of its kind of processor when
it is loaded, so a home folder may be shared by different machines.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.cpp")
HEADERS = [SOURCE.with_name(n) for n in ("formats.h", "layers.h", "rounding.h")]
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fopenmp",
    # Each product and each sum rounded, as the reference does.
    "-ffp-contract=off",
    # Nobody asks for floating-point exceptions; without them conditional values become vector code.
    "-fno-trapping-math",
)


class BuildError(RuntimeError):
    """This kernel cannot be built or loaded on this machine; the message says why."""


@functools.cache
def load() -> ctypes.CDLL:
    """The library; built by ``$CXX`` (``c++``) if the cache has none.

    Raises:
        BuildError: there is no compiler, it fails (``-fopenmp`` not known, for one), or its library does
            not load. A failure is not remembered: ask once.
    """
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    version = _run([*compiler, "--version"])
    identity = [
        SOURCE.read_text(),
        *(header.read_text() for header in HEADERS),
        *compiler,
        version,
        *FLAGS,
        platform.machine(),
    ]
    name = f"cpu-{hashlib.sha256(repr(identity).encode()).hexdigest()[:20]}.so"
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    try:
        if home.is_absolute():
            return _open(home / "novoscale" / name, compiler)
    except OSError:  # it cannot be written to, or nothing in it may be executed
        pass
    try:
        with tempfile.TemporaryDirectory(prefix="novoscale-") as folder:
            return _open(Path(folder, name), compiler)  # stays loaded when the file is gone
    except OSError as error:
        raise BuildError(f"novoscale's CPU kernel cannot be loaded: {error}") from error


def _open(path: Path, compiler: Sequence[str]) -> ctypes.CDLL:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Under a name of its own, then moved: several ranks may build at once, and a build that is
        # killed blocks nobody.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder, path.name)
            _run([*compiler, *FLAGS, str(SOURCE), "-o", str(built)])
            built.replace(path)
    library = ctypes.CDLL(str(path))
    address, integer = ctypes.c_void_p, ctypes.c_int64
    table = (address, integer)
    library.novoscale_sum_of_squares.argtypes = [address, *table * 2, *[address] * 3, *[integer] * 3]
    library.novoscale_largest.argtypes = [address, *table, *[address] * 7, integer, *[address] * 2]
    library.novoscale_update.argtypes = [address, *table, *[address] * 8, integer]
    library.novoscale_begin.argtypes = library.novoscale_coefficients.argtypes = [address]
    library.novoscale_average.argtypes = [address, address]
    for name in ("sum_of_squares", "largest", "update", "begin", "average", "coefficients"):
        getattr(library, f"novoscale_{name}").restype = None
    return library


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"novoscale's CPU kernel needs a C++ compiler: {error}") from error
    except subprocess.CalledProcessError as error:
        message = f"novoscale's CPU kernel: {shlex.join(command)} failed:\n{error.stderr}"
        raise BuildError(message) from error
    return done.stdout
