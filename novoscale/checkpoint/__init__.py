"""State in and out: state dicts, resharding, formats, integrity."""

from __future__ import annotations

from typing import Any

import torch


# Defined here, for its name in this module is in every checkpoint that was saved under a wrapper.
class FlatState(dict[str, Any]):
    """The state of a wrapper's flat tensor in a state dict.

    Attributes:
        STATE: key of the state of its fragments.
        LAYOUT: key of what the fragments are of: see ``reshard.record``.

    Raises:
        RuntimeError: asked for another key, as by DeepSpeed's ``ds_to_universal``, which takes every state
            for one of Adam's.
    """

    STATE, LAYOUT = "novograd", "layout"

    def __missing__(self, key: str) -> Any:
        raise RuntimeError(
            f"{key}: this is a checkpoint of NovoGrad, whose second moments are of layers: convert it with "
            "`novoscale to-universal IN OUT`, which does for it what ds_to_universal does for Adam"
        )


torch.serialization.add_safe_globals([FlatState])
