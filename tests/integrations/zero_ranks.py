"""What each rank runs for the tests of DeepSpeed's wrappers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import deepspeed
import fixed_gradients
import novoscale.integrations.deepspeed  # noqa: F401
import torch
from torch import nn
from training import SAMPLES, STEPS, OddModel, data, two_groups


def config(
    stage: int, world_size: int, *, accumulate: int = 1, clip: float = 0.0, **zero: Any
) -> dict[str, Any]:
    return {
        "train_batch_size": SAMPLES,
        "gradient_accumulation_steps": accumulate,
        "train_micro_batch_size_per_gpu": SAMPLES // (world_size * accumulate),
        "gradient_clipping": clip,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 200,
            "allgather_bucket_size": 200,
            **zero,
        },
        "optimizer": {"type": "NovoGrad", "params": {"lr": 0.02, "preset": "paper"}},
    }


def engine(ds: dict[str, Any], *, groups: bool = False, model: nn.Module | None = None, **kwargs: Any) -> Any:
    model = model or OddModel()
    if not {"optimizer", "model_parameters"} & kwargs.keys():
        kwargs["model_parameters"] = two_groups(model) if groups else list(model.parameters())
    return deepspeed.initialize(model=model, config=ds, **kwargs)[0]


def train(engine: Any, steps: int = STEPS, first: int = 0, dtype: torch.dtype = torch.float32) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for step in range(first, first + steps):
        x, y = (t.to(dtype) for t in data(step))
        accumulate = engine.gradient_accumulation_steps()
        for xs, ys in zip(
            x.chunk(accumulate * world)[rank::world], y.chunk(accumulate * world)[rank::world], strict=True
        ):
            engine.backward(nn.functional.mse_loss(engine(xs), ys))
            engine.step()


def weights(engine: Any) -> dict[str, Any]:
    """The whole model's parameters."""

    def full(p: Any) -> torch.Tensor:
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            return p.detach().double().clone()

    return {n: full(p).numpy() for n, p in engine.module.named_parameters()}


def trained(ds: dict[str, Any], groups: bool) -> dict[str, Any]:
    e = engine(ds, groups=groups)
    train(e)
    return weights(e)


def trained_in_recommended_groups(ds: dict[str, Any]) -> dict[str, Any]:
    from novoscale import param_groups

    model = OddModel()
    e = engine(ds, model=model, model_parameters=param_groups(model, weight_decay=0.05))
    train(e)
    return weights(e)


def trained_by(ds: dict[str, Any], route: str, clip: float = 0.0) -> tuple[str, dict[str, Any]]:
    """Train with the optimizer given to DeepSpeed by one of its three routes."""
    from benchmarks.sharding import PlainNovoGrad
    from novoscale import NovoGrad

    del ds["optimizer"]
    model = OddModel()
    if route == "callable":
        e = engine(ds, model=model, optimizer=lambda params: NovoGrad(params, lr=0.02, preset="paper"))
    elif route == "instance":
        e = engine(ds, model=model, optimizer=NovoGrad(model.named_parameters(), lr=0.02, preset="paper"))
    else:
        ds["zero_allow_untested_optimizer"] = True
        e = engine(ds, model=model, optimizer=PlainNovoGrad(model.parameters(), lr=0.02))
    train(e)
    return type(e.basic_optimizer).__name__, weights(e)


class Conditional(OddModel):
    """Frozen, unused and tied parameters, and a layer that only padding follows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm.weight.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(9))
        self.tied = nn.Linear(17, 5, bias=False)
        self.tied.weight = self.middle.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.norm(self.first(x)))
        return self.last(torch.tanh(self.middle(h) * self.gain) + 0.5 * self.tied(h) + self.offset)


def trained_conditional(ds: dict[str, Any]) -> dict[str, Any]:
    e = engine(ds, model=Conditional())
    train(e)
    return weights(e)


class Tiny(nn.Module):
    """Fewer elements than a rank's alignment: some ranks hold nothing but padding."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :3] * self.a


def trained_tiny(ds: dict[str, Any]) -> tuple[Any, list[str], int]:
    e = engine(ds, model=Tiny())
    train(e)
    state = next(iter(e.basic_optimizer.state.values()))
    return weights(e)["a"], sorted(e.basic_optimizer.layer_norms()), state["exp_avg_sq"].numel()


def small_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=5003, n_positions=96, n_embd=192, n_layer=3, n_head=3))


def bytes_of_gpt2(ds: dict[str, Any]) -> tuple[int, int]:
    """Of optimizer state: on this rank, and of a NovoGrad in one process."""
    from novoscale import NovoGrad
    from novoscale.memory import optimizer_state_bytes

    model = small_gpt2()
    unsharded = NovoGrad(model.parameters(), **{"preset": "paper", **ds["optimizer"]["params"]})
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    unsharded.step()
    whole = optimizer_state_bytes(unsharded).total
    return optimizer_state_bytes(engine(ds, model=small_gpt2()).basic_optimizer).total, whole


def state_bytes(ds: dict[str, Any], groups: bool) -> tuple[int, int, int]:
    """Bytes held before the first step, bytes held after it, and layers that this rank has."""
    from novoscale.memory import optimizer_state_bytes

    e = engine(ds, groups=groups)
    before = optimizer_state_bytes(e.basic_optimizer).total
    train(e, 1)
    layers = sum(s["exp_avg_sq"].numel() for s in e.basic_optimizer.state.values())
    return before, optimizer_state_bytes(e.basic_optimizer).total, layers


def nan_on_one_rank(ds: dict[str, Any], bf16: bool) -> dict[str, Any]:
    """Two good steps, one with a NaN in one gradient of the last group on the last rank, one good step."""
    import copy

    model = OddModel()
    if bf16:
        model = model.bfloat16()
    e = engine(ds, groups=True, model=model)
    dtype = torch.bfloat16 if bf16 else torch.float32
    train(e, 2, dtype=dtype)
    snapshot = lambda: copy.deepcopy((weights(e), [dict(s) for s in e.basic_optimizer.state.values()]))  # noqa: E731
    before = snapshot()
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    poison = e.module.last.bias.register_hook(lambda g: g * float("nan")) if last else None
    train(e, 1, first=2, dtype=dtype)
    after = snapshot()
    if poison is not None:
        poison.remove()
    train(e, 1, first=3, dtype=dtype)
    same = lambda a, b: all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)  # noqa: E731
    return {
        "weights unchanged": same(before[0], after[0]),
        "state unchanged": all(same(a, b) for a, b in zip(before[1], after[1], strict=True)),
        "goes on": not same(after[0], weights(e)),
        "finite": all(bool(torch.isfinite(torch.as_tensor(w)).all()) for w in weights(e).values()),
        "skipped": e.basic_optimizer.skipped_steps,
        "layers": e.basic_optimizer.skipped_layers(),
    }


def resumed(ds: dict[str, Any], folder: str) -> bool:
    """Whether three steps, a checkpoint and three steps give the bits of six steps."""
    e = engine(ds, groups=True)
    train(e, 3)
    e.save_checkpoint(folder)
    train(e, 3, first=3)
    other = engine(ds, groups=True)
    other.load_checkpoint(folder)
    train(other, 3, first=3)
    a, b = weights(e), weights(other)
    return all((a[n] == b[n]).all() for n in a)


def fixed_resumed(ds: dict[str, Any], folder: str) -> bool:
    """The same of weights and first moments, with parameters that are large enough for every format."""

    def step(engine: Any, steps: range) -> None:
        for index in steps:
            engine.backward(engine(torch.tensor(index)))
            engine.step()

    e = engine(ds, model=fixed_gradients.FixedGradients())
    step(e, range(3))
    e.save_checkpoint(folder)
    step(e, range(3, 5))
    other = engine(ds, model=fixed_gradients.FixedGradients())
    other.load_checkpoint(folder)
    step(other, range(3, 5))
    return all(
        a[:2] == b[:2] and torch.equal(a[2], b[2]) and torch.equal(a[3], b[3])
        for a, b in zip(*(fixed_gradients.pieces(x.basic_optimizer) for x in (e, other)), strict=True)
    )


def full_state(ds: dict[str, Any]) -> dict[str, Any]:
    """exp_avg of every parameter, by DeepSpeed's own call."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    e = engine(ds, groups=True)
    train(e, 3)
    whole = weights(e)
    return {
        n: (
            safe_get_full_optimizer_state(p, "exp_avg").numpy(),
            safe_get_full_fp32_param(p).numpy(),
            whole[n],
        )
        for n, p in e.module.named_parameters()
    }


def collectives_of_a_step(ds: dict[str, Any]) -> list[int]:
    """Elements of each all-reduce that NovoGrad makes in one step."""
    from unittest import mock

    from novoscale.sharding import collectives

    e = engine(ds, groups=True)
    train(e, 1)
    sizes = []
    original = collectives.dist.all_reduce

    def counted(tensor: torch.Tensor, **kwargs: Any) -> None:
        if tensor.dtype == torch.float64:
            sizes.append(tensor.numel())
        original(tensor, **kwargs)

    with mock.patch.object(collectives.dist, "all_reduce", counted):
        train(e, 1, first=1)
    return sizes


def error_of(ds: dict[str, Any], **kwargs: Any) -> str:
    """The error with which DeepSpeed's initialisation ends, and whether the model is still as it was."""
    model = OddModel()
    if ds.get("bf16"):
        model = model.bfloat16()
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    try:
        if kwargs.pop("client", False):
            from novoscale import NovoGrad

            ds.pop("optimizer")
            kwargs["optimizer"] = NovoGrad(
                model.parameters(), **{"preset": "paper", **kwargs.pop("options", {})}
            )
        for name, value in kwargs.pop("mark", {}).items():
            setattr(model.middle.weight, name, value)
        engine(ds, model=model, **kwargs)
    except Exception as error:
        unchanged = all(
            p.data_ptr() == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters()
        )
        return f"{type(error).__name__}: {error}{'' if unchanged else ' (the model was changed)'}"
    return "no error"


def tensor_parallel_error(ds: dict[str, Any]) -> str:
    return error_of(ds, mark={"tensor_model_parallel": True})


def max_grad_norm_error(ds: dict[str, Any]) -> str:
    return error_of(ds, client=True, options={"max_grad_norm": 1.0})


def bf16_trained(ds: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The float32 master weights, and the same from a NovoGrad in one process given the same gradients.

    The gradients are what DeepSpeed hands to its optimizer: recorded, and put together from the ranks.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    from novoscale import NovoGrad

    e = engine(ds, model=OddModel().bfloat16())
    copies = {n: safe_get_full_fp32_param(p).clone().requires_grad_() for n, p in e.module.named_parameters()}
    single = NovoGrad(copies.values(), lr=0.02, preset="paper")
    flats = []
    e.basic_optimizer.register_step_pre_hook(
        lambda o, *_: flats.append(o.param_groups[0]["params"][0].grad.clone())
    )
    for step in range(5):
        train(e, 1, first=step, dtype=torch.bfloat16)
        gathered = [torch.empty_like(flats[-1]) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(gathered, flats[-1])
        flat = torch.cat(gathered)
        for p in copies.values():
            p.grad, flat = flat[: p.numel()].view(p.shape).clone(), flat[p.numel() :]
        single.step()
    master = {n: safe_get_full_fp32_param(p).numpy() for n, p in e.module.named_parameters()}
    return master, {n: p.detach().numpy() for n, p in copies.items()}


def _equal_data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = (t.float() for t in data(step))
    return x, y


def trained_on_equal_data(ds: dict[str, Any]) -> dict[str, Any]:
    e = engine(ds)
    for step in range(STEPS):
        x, y = _equal_data(step)
        e.backward(nn.functional.mse_loss(e(x), y))
        e.step()
    return weights(e)


def unsharded_on_equal_data() -> dict[str, Any]:
    from novoscale import NovoGrad

    model = OddModel()
    optimizer = NovoGrad(model.parameters(), lr=0.02, preset="paper")
    for step in range(STEPS):
        x, y = _equal_data(step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return {n: p.detach().double().numpy() for n, p in model.named_parameters()}


def fixed_pieces(ds: dict[str, Any], bfloat16: bool, frozen: Sequence[str] = ()) -> Any:
    """What this rank holds after steps with gradients that do not depend on the weights."""
    model = fixed_gradients.FixedGradients(frozen=frozen)
    e = engine(ds, model=model.bfloat16() if bfloat16 else model)
    for step in range(fixed_gradients.STEPS):
        e.backward(e(torch.tensor(step)))
        e.step()
    return fixed_gradients.pieces(e.basic_optimizer)


def dies_in_the_second_step(ds: dict[str, Any]) -> None:
    import os

    e = engine(ds)
    train(e, 1)
    if torch.distributed.get_rank() == 1:
        os._exit(3)
    train(e, 1, first=1)


def different_layers() -> None:
    """Two ranks whose parameters have other names: the same sizes, so that only the layers tell."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from novoscale import NovoGrad

    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    p.grad = torch.ones_like(p)
    NovoGrad([(f"of rank {torch.distributed.get_rank()}", p)], lr=0.1, preset="paper").step()
