"""What the plots have in common: colours, and how they are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"AdamW": "#888888", "Adafactor": "#d98032", "NovoGrad": "#1f6fb4"}


def save(figure: Any, path: Path, provenance: dict[str, Any], bottom: float = 0.02) -> None:
    """Write a figure as PNG and as SVG, with the command and versions that made its data; close it."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    versions = ", ".join(f"{k} {v}" for k, v in provenance["versions"].items() if k in ("torch", "deepspeed"))
    figure.text(
        0.995, 0.005, f"{provenance['command']}; {versions}", ha="right", va="bottom", size=6, color="#777777"
    )
    figure.tight_layout(rect=(0, bottom, 1, 1))
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150)
    plt.close(figure)
