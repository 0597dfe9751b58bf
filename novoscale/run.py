"""Run a script that must not be changed, with NovoGrad registered with DeepSpeed.

accelerate launch --config_file config.yaml -m novoscale.run train.py --its-options
torchrun --nproc-per-node 2 -m novoscale.run train.py
deepspeed --module novoscale.run train.py
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Register NovoGrad, then run the script named by the first argument as ``__main__``."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        what = f"{sys.argv[1]}: there is no such file. " if len(sys.argv) > 1 else ""
        sys.exit(f"{what}Usage: python -m novoscale.run SCRIPT.py [ARGUMENTS ...]")
    importlib.import_module("novoscale.integrations.deepspeed")
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
