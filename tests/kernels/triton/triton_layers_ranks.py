"""What each rank runs for the tests of Triton's pass over the layers; the elements' passes are in C++."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import checkpoint_ranks
import fixed_gradients
import missing_ranks
import sharded_models
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from novoscale import NovoGrad
from novoscale.kernels import dispatch
from novoscale.kernels.cpu import elements as cpu
from novoscale.kernels.triton import layers as triton_layers


@contextmanager
def layers_by_triton() -> Iterator[mock.Mock]:
    module = ModuleType("elements in C++, layers in Triton")
    module.Kernels, module.supports = cpu.Kernels, cpu.supports
    module.LayerKernels = triton_layers.LayerKernels
    counted = mock.patch.object(
        triton_layers.LayerKernels, "complete", autospec=True, side_effect=triton_layers.LayerKernels.complete
    )
    with mock.patch.object(dispatch, "fused", return_value=module), counted as calls:
        yield calls
    assert calls.call_count > 0


def pieces(options: dict[str, Any]) -> Any:
    """See ``checkpoint_ranks.fixed_pieces``."""
    with layers_by_triton():
        return checkpoint_ranks.fixed_pieces(options, (dist.get_world_size(),), False)


def noted(options: dict[str, Any], bad: float | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is known of a step that one rank's gradient spoils (or a veto, if it is None), and of the next."""

    def stepped() -> dict[str, Any]:
        model = fixed_gradients.FixedGradients()
        fully_shard(model)
        optimizer = NovoGrad(model.named_parameters(), lr=0.05, **{"preset": "paper", **options})
        for step in range(4):
            optimizer.zero_grad()
            model(torch.tensor(step)).backward()
            if step == 1 and dist.get_rank() == 0 and bad is not None:
                model.wide.grad.to_local()[3, 2] = bad
            optimizer.veto(torch.tensor(step == 1 and dist.get_rank() == 0) if bad is None else None)
            optimizer.step()
        return {
            "steps": optimizer.skipped_steps,
            "layers": optimizer.skipped_layers(),
            "norms": optimizer.layer_norms(),
            "weights": [sharded_models.full(p).sum() for p in model.parameters()],
        }

    with layers_by_triton():
        first = stepped()
    return first, stepped()


def missing_gradient(*args: Any) -> dict[str, Any]:
    """See ``missing_ranks.missing_gradient``."""
    with layers_by_triton():
        return missing_ranks.missing_gradient(*args)


def clipped_with_plain(*args: Any) -> tuple[float, float]:
    """See ``missing_ranks.clipped_with_plain``."""
    with layers_by_triton():
        return missing_ranks.clipped_with_plain(*args)
