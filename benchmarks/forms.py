"""NovoGrad's formats, granularities and presets under every wrapper: the same bits, and the same training.

A part of ``make sharding``. ``novoscale verify`` finds bits and training on 3 ranks; it has no configuration
for meshes of two dimensions, on which the tests' ranks compare the bits.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "tests"))
sys.path.append(str(Path(__file__).parent.parent / "tests" / "distributed"))
sys.path.append(str(Path(__file__).parent.parent / "tests" / "sharding"))

import checkpoint_ranks
import fixed_gradients
import sharded_block_ranks

from benchmarks import tables
from novoscale.tools.local_ranks import run_ranks
from novoscale.verify import verify

LR = 0.003
RANKS = 3
FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"momentum_dtype": "bfloat16"},
    "int8": {"momentum_dtype": "int8"},
    "int4": {"momentum_dtype": "int4"},
    "rows": {"granularity": "row", "normalize": "rms"},
    "rows, int8": {"granularity": "row", "normalize": "rms", "momentum_dtype": "int8"},
    "preset adamw": {"preset": "adamw"},
    "preset adamw, int8": {"preset": "adamw", "momentum_dtype": "int8"},
    "preset adamw, int4": {"preset": "adamw", "momentum_dtype": "int4"},
    "preset adamw, clip_threshold, scale_parameter, int8": {
        "preset": "adamw",
        "momentum_dtype": "int8",
        "clip_threshold": 0.5,
        "scale_parameter": True,
    },
}
MESHES: dict[str, tuple[int, ...]] = {
    "HSDP, 2 x 2": (2, 2),
    "tensor parallel, 3": (1, 3),
    "FSDP2 + tensor parallel, 2 x 2": (2, 2),
}


def measured(form: str, config: str | dict[str, Any]) -> dict[str, Any]:
    """Both findings of ``verify`` for a form of NovoGrad under a configuration."""
    verdict = verify(
        config,
        ranks=RANKS,
        optimizer="novoscale:NovoGrad",
        options={"lr": LR, "preset": "paper", **FORMS[form]},
    )
    assert verdict.bits is not None
    name, worst = verdict.training.worst
    return {
        "passed": verdict.passed,
        "different": sum(verdict.bits.different.values()),
        "elements": verdict.bits.elements,
        "worst": worst,
        "where": name,
        "bound": verdict.training.bound,
        "rule": verdict.training.rule,
    }


def measured_on_a_mesh(form: str, mesh: str) -> dict[str, Any]:
    """How many parameters have other bits, of weights or moments, than in one process with its gradients."""
    options = {"lr": 0.05, "weight_decay": 0.1, **FORMS[form]}
    shape = MESHES[mesh]
    world = math.prod(shape)
    if mesh.startswith("HSDP"):
        ranks = run_ranks(checkpoint_ranks.fixed_pieces, world, options, shape, False)
        different = fixed_gradients.differing(ranks, fixed_gradients.unsharded(options))
    else:
        found = run_ranks(sharded_block_ranks.under_tensor_parallelism, world, options, shape[0])
        different = set().union(*found)
    return {"passed": not different, "different": len(different)}


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table: a row for each form, a column for each wrapper."""
    wrappers = list(dict.fromkeys(row["configuration"] for row in rows))
    lines = []
    for form in dict.fromkeys(row["form"] for row in rows):
        found = {row["configuration"]: row for row in rows if row["form"] == form}
        lines.append([form, *(_cell(found[w]) for w in wrappers)])
    return tables.markdown(["", *wrappers], lines, align="l" * (1 + len(wrappers)))


def _cell(row: dict[str, Any]) -> str:
    bits = "=" if row["different"] == 0 else f"{row['different']:,} differ"
    return bits if "worst" not in row else f"{bits} {row['worst']:.1e} of {row['bound']:.1e}"
