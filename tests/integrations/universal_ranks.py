"""What each rank runs for the tests of DeepSpeed's checkpoints on another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fixed_gradients
import torch
from zero_ranks import engine

HALF = fixed_gradients.STEPS // 2


def model(bfloat16: bool) -> torch.nn.Module:
    made = fixed_gradients.FixedGradients()
    return made.bfloat16() if bfloat16 else made


def parameters(model: torch.nn.Module, groups: bool) -> list[Any]:
    """All in one param group, or in two with other decays."""
    found = list(model.parameters())
    if not groups:
        return found
    matrices, others = ([p for p in found if (p.ndim > 1) == wanted] for wanted in (True, False))
    return [{"params": matrices}, {"params": others, "weight_decay": 0.0}]


def saved(ds: dict[str, Any], folder: str, bfloat16: bool = False, groups: bool = False) -> None:
    """Train half of the steps and save."""
    made = model(bfloat16)
    e = engine(ds, model=made, model_parameters=parameters(made, groups))
    for step in range(HALF):
        e.backward(e(torch.tensor(step)))
        e.step()
    e.save_checkpoint(folder, tag="half")


def resumed(ds: dict[str, Any], folder: str, bfloat16: bool = False, groups: bool = False) -> Any:
    """Load, train the other half, and return what this rank holds, or the error."""
    made = model(bfloat16)
    e = engine(ds, model=made, model_parameters=parameters(made, groups))
    before = [t.clone() for t in tensors_of(e)]
    try:
        e.load_checkpoint(folder, tag="half" if "checkpoint" not in ds else None)
    except Exception as error:
        unchanged = all(torch.equal(a, b) for a, b in zip(before, tensors_of(e), strict=True))
        return f"{type(error).__name__}: {error}{'' if unchanged else ' (something was changed)'}"
    decays = [group["weight_decay"] for group in e.basic_optimizer.param_groups]
    for step in range(HALF, fixed_gradients.STEPS):
        e.backward(e(torch.tensor(step)))
        e.step()
    return fixed_gradients.pieces(e.basic_optimizer), decays


def tensors_of(e: Any) -> list[torch.Tensor]:
    states = e.basic_optimizer.state.values()
    return [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]


class Frozen(torch.nn.Module):
    """A frozen parameter, a buffer, a tied and an unused parameter: random, other ones in each training."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(9, 90)
        self.still = torch.nn.Linear(90, 90).requires_grad_(False)
        self.norm = torch.nn.BatchNorm1d(90, track_running_stats=True)
        self.last = torch.nn.Linear(90, 9, bias=False)
        self.unused = torch.nn.Parameter(torch.randn(7))
        self.again = torch.nn.Linear(9, 90, bias=False)
        self.again.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.norm(self.still(self.first(x)) + self.again(x)))
        return out.square().mean()


def trained_with_frozen(ds: dict[str, Any], folder: str, seed: int, first: int, steps: int) -> dict[str, Any]:
    """Train on data that all ranks share; load before if ``first``, else save after. The model at the end."""
    import deepspeed

    torch.manual_seed(seed)
    made = Frozen()
    e = engine(ds, model=made)
    if first:
        e.load_checkpoint(folder)
    for step in range(first, first + steps):
        x = torch.randn(8, 9, generator=torch.Generator().manual_seed(step))
        e.backward(e(x))
        e.step()
    if not first:
        e.save_checkpoint(folder, tag="half")
    found = {}
    for name, p in [*made.named_parameters(), *made.named_buffers()]:
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            found[name] = p.detach().clone()
    return found


def to_universal_by_deepspeed(source: str, target: str) -> str:
    """What DeepSpeed's own converter says."""
    import argparse

    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=source,
        output_folder=target,
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        ds_to_universal.main(arguments)
    except RuntimeError as error:
        return str(error)
    return "converted"


def adam_saved(ds: dict[str, Any], folder: str) -> None:
    ds["optimizer"] = {"type": "AdamW", "params": {"lr": 0.05, "torch_adam": True}}
    saved(ds, folder)


def resumed_from_state_dict(path: str, options: dict[str, Any], fsdp: bool) -> Any:
    """Go on in one process, or under FSDP2, with what to-state-dict has written."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from novoscale import NovoGrad

    found = torch.load(path, weights_only=True)
    made = fixed_gradients.FixedGradients()
    made.load_state_dict(found["model"])
    if fsdp:
        fully_shard(made, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    optimizer = NovoGrad(made.named_parameters(), **{"preset": "paper", **options})
    set_optimizer_state_dict(
        made, optimizer, found["optimizer"], options=StateDictOptions(full_state_dict=True)
    )
    for step in range(HALF, fixed_gradients.STEPS):
        optimizer.zero_grad()
        made(torch.tensor(step)).backward()
        optimizer.step()
    return fixed_gradients.pieces(optimizer), [g["weight_decay"] for g in optimizer.param_groups]


def saved_under_fsdp2(path: str, options: dict[str, Any]) -> None:
    """Train half of the steps under FSDP2 and save all of it as one file."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from novoscale import NovoGrad

    made = fixed_gradients.FixedGradients()
    fully_shard(made, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    optimizer = NovoGrad(made.named_parameters(), **{"preset": "paper", **options})
    for step in range(HALF):
        optimizer.zero_grad()
        made(torch.tensor(step)).backward()
        optimizer.step()
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, state = get_state_dict(made, optimizer, options=whole)
    if torch.distributed.get_rank() == 0:
        torch.save({"model": model, "optimizer": state}, path)


def taken_over(universal: Path, options: dict[str, Any]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weights and first moments after the other half in one process, from an Adam's universal checkpoint."""
    from novoscale import NovoGrad
    from novoscale.checkpoint.imported import from_adam, state_dicts

    made = fixed_gradients.FixedGradients()
    optimizer = NovoGrad(made.named_parameters(), **{"preset": "paper", **options})
    (group,) = optimizer.param_groups
    saved = torch.load(universal / "zero" / "optimizer_state.pt", weights_only=False)
    adam = {"step": HALF, **saved["param_groups"][0]}
    states = {}
    for index, (name, p) in enumerate(made.named_parameters()):
        found = {}
        for key in ("fp32", "exp_avg", "exp_avg_sq"):
            tensor = torch.load(universal / "zero" / name / f"{key}.pt", weights_only=False)
            found[key] = (tensor["param"] if isinstance(tensor, dict) else tensor).view(p.shape)
        p.data.copy_(found.pop("fp32"))
        states[index] = from_adam.novograd_state(name, {**found, "step": HALF}, adam, group, p.detach())
    held = optimizer.state_dict()
    optimizer.load_state_dict({**held, "state": states})
    for option, value in state_dicts.options_from_adam({"params": [], **adam}, group).items():
        if option != "params":
            optimizer.param_groups[0][option] = value
    for step in range(HALF, fixed_gradients.STEPS):
        optimizer.zero_grad()
        made(torch.tensor(step)).backward()
        optimizer.step()
    return {name: (w, m) for name, _, w, m in fixed_gradients.pieces(optimizer)}
