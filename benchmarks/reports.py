"""Result files: JSON, written again with every new row, so that a run that is stopped keeps its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(file: Path, empty: Any) -> Any:
    """What an earlier run has written, to go on from; ``empty`` if there was none."""
    return json.loads(file.read_text()) if file.exists() else empty


def write(file: Path, report: Any) -> None:
    """Write a report as JSON; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace(file, json.dumps(report, indent=1) + "\n")


def replace(file: Path, text: str) -> None:
    """Give a file another text: whenever the process is stopped, the file is the old one or the new one."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)
