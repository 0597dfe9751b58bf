"""What is found by the name NovoGrad in ``torch.optim`` until an integration puts the optimizer there.

DeepSpeed looks there for an optimizer that its JSON names. If it found NovoGrad itself, it would give it flat
partitions, and NovoGrad would take each for a layer. If it finds nothing, it says that the name "is not a
supported DeepSpeed Optimizer", and not what to do.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

NAME = "NovoGrad"


def leave_hint() -> None:
    """Put :func:`not_registered` where an optimizer of this name is looked for, if nothing is there."""
    for name in (NAME, NAME.lower()):
        if not hasattr(torch.optim, name):
            setattr(torch.optim, name, not_registered)


def not_registered(*_: Any, **__: Any) -> NoReturn:
    """Say what makes NovoGrad known by its name.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "NovoGrad was looked for by its name, and has not been registered. For DeepSpeed: import "
        "novoscale.integrations.deepspeed before deepspeed.initialize, or start your unchanged script by "
        "python -m novoscale.run. In code of your own: novoscale.NovoGrad"
    )
