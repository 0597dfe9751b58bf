"""The tables and plots of the tasks."""

from __future__ import annotations

from typing import Any

from rich.console import Console


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Placeholder."""


def draw(rows: list[dict[str, Any]], source: dict[str, Any], out: Any) -> None:
    """Placeholder."""
