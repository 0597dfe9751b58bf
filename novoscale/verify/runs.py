"""What every run of ``verify`` shares: the model, its batches, its optimizer; and the run in one process."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from novoscale.verify.config import Setup, VerifyError, load


def builtin_model() -> tuple[nn.Module, Callable[[int, int], dict[str, Tensor]]]:
    """A small language model with odd shapes, and random tokens that repeat with a pattern."""
    torch.manual_seed(0)
    model = _Small()

    def batch(step: int, samples: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(0, 61, (samples, 1), generator=generator)
        strides = torch.randint(1, 5, (samples, 1), generator=generator)
        return {"tokens": (starts + strides * torch.arange(13)) % 61}

    return model, batch


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # Matrices of more than 4096 elements: 8-bit optimizers keep smaller ones in float32.
        self.embedding = nn.Embedding(61, 70)
        self.norm1 = nn.LayerNorm(70)
        # No bias: the gradient of the keys' is zero but for rounding, which Adam would divide by itself.
        self.qkv = nn.Linear(70, 210, bias=False)
        self.proj = nn.Linear(70, 70)
        self.norm2 = nn.LayerNorm(70)
        self.up = nn.Linear(70, 143)
        self.down = nn.Linear(143, 70)
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(70, 61, bias=False)
        with torch.no_grad():  # biases and gains away from 0 and 1, so that a deviation of them counts
            for p in self.parameters():
                p.add_(0.02 * torch.randn_like(p))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens[:, :-1])
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.proj(scaled_dot_product_attention(q, k, v, is_causal=True))
        x = x + self.gain * self.down(gelu(self.up(self.norm2(x))))
        return cross_entropy(self.head(x).flatten(0, 1).float(), tokens[:, 1:].flatten())


def make_model(setup: Setup) -> tuple[nn.Module, Callable[[int], list[dict[str, Tensor]]]]:
    """The model, where and in what ``setup`` says, without dropout; a step's micro-batches, of all ranks."""
    model, batch = load(setup.model)()

    def micro_batches(step: int) -> list[dict[str, Tensor]]:
        full = {k: v.to(setup.device) for k, v in batch(step, setup.samples).items()}
        parts = setup.ranks * setup.accumulate
        return [{k: v.chunk(parts)[i] for k, v in full.items()} for i in range(parts)]

    return model.to(setup.device, setup.dtype).eval(), micro_batches


def check_model(setup: Setup) -> None:
    """Find out whether the ranks and the one process can have the same model and the same data.

    Raises:
        VerifyError: the function that makes the model fails, or gives another one at the next call, or one
            without parameters to train; or ``batch`` fails, gives other data, or not as many rows as it was
            asked for.
    """
    try:
        (model, batch), (again, _) = load(setup.model)(), load(setup.model)()
        first, second = batch(0, setup.samples), batch(0, setup.samples)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error} ({where.filename}, line {where.lineno})"
        raise VerifyError(f"{setup.model} cannot be called: {what}") from error
    what = f"the model of {setup.model}"
    for (name, p), other in zip(model.named_parameters(), again.parameters(), strict=True):
        if not torch.equal(p, other):
            raise VerifyError(f"{what} has another {name} at the next call: set the seed in the function")
    if not any(p.requires_grad for p in model.parameters()):
        raise VerifyError(f"{what} has no parameter that requires a gradient: there is nothing to train")
    asked = f"batch(0, {setup.samples}) of {setup.model}"
    for key, value in first.items():
        if not isinstance(value, Tensor) or value.shape[:1] != (setup.samples,):
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise VerifyError(
                f"{asked} gave {key!r} as {got}: a tensor of {setup.samples} rows is needed, which "
                f"{setup.ranks} ranks share"
            )
        if not torch.equal(value, second[key]):
            raise VerifyError(f"{asked} gave other {key!r} at the next call: draw them by the step's number")


def make_optimizer(setup: Setup, params: Any) -> torch.optim.Optimizer:
    """The optimizer that is put to the test."""
    made: torch.optim.Optimizer = load(setup.optimizer)(params, **setup.options)
    return made


def loss_of(model: Callable[..., Any], batch: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The loss of a micro-batch; floating-point entries are cast to ``dtype``."""
    out = model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()})
    loss: Tensor = out if isinstance(out, Tensor) else out.loss
    return loss


def one_process(setup: Setup, rounding: int | None = None) -> dict[str, Tensor]:
    """Train in one process: the same micro-batches, gradients averaged and weights updated in float64.

    With bfloat16 the gradients are those of a bfloat16 model, as on the ranks; with float32, of a float64
    one. Weights that are bfloat16 on the ranks are so here. An optimizer that cannot update float64 weights
    updates float32 ones.

    Args:
        setup: of the sharded run.
        rounding: the gradients are those of a model in the ranks' dtype, at weights that are off by one unit
            in the last place at most, drawn by this number: rounded as those of the ranks might be.
    """
    if setup.weights != torch.float32:
        return _one_process(setup, rounding, setup.weights)
    try:
        return _one_process(setup, rounding, torch.float64)
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError):
        return _one_process(setup, rounding, torch.float32)


def _one_process(setup: Setup, rounding: int | None, master_dtype: torch.dtype) -> dict[str, Tensor]:
    model, micro_batches = make_model(setup)
    precise = setup.dtype == torch.float32 and rounding is None
    dtype = torch.float64 if precise else setup.dtype
    model = model.to(dtype)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masters = {name: nn.Parameter(p.detach().to(master_dtype)) for name, p in named.items()}
    optimizer = make_optimizer(setup, list(masters.values()))
    generator = torch.Generator().manual_seed(rounding or 0)
    for step in range(setup.steps):
        sums: dict[str, Tensor] = {}  # none for a parameter without a gradient
        if rounding is not None:
            _round_otherwise(named.values(), generator)
        batches = micro_batches(step)
        for batch in batches:
            model.zero_grad()
            loss_of(model, batch, dtype).backward()  # type: ignore[no-untyped-call]
            for name, p in named.items():
                if p.grad is not None:
                    sums[name] = sums.get(name, 0) + p.grad.double() / len(batches)
        for name, master in masters.items():
            master.grad = sums[name].to(master_dtype) if name in sums else None
        if setup.clip:
            nn.utils.clip_grad_norm_(masters.values(), setup.clip)
        optimizer.step()
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(masters[name])
    return {name: p.detach().cpu() for name, p in named.items()}


@torch.no_grad()
def _round_otherwise(weights: Iterable[Tensor], generator: torch.Generator) -> None:
    """Move each weight by one unit in the last place, up or down, or leave it."""
    for weight in weights:
        units = torch.randint(-1, 2, weight.shape, generator=generator).to(weight.device)
        weight.mul_(1 + torch.finfo(weight.dtype).eps * units)


def shard(model: nn.Module, kind: str, **fsdp2: Any) -> nn.Module:
    """The model under "ddp" or "fsdp2" (with options of ``fully_shard``), or as it is under "none".

    As is usual, FSDP2 makes a unit of each block of layers (see ``fsdp2_blocks``), and one of the rest.
    """
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        device = next(model.parameters()).device.type
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        for unit in (*fsdp2_blocks(model), model):
            fully_shard(unit, mesh=mesh, **fsdp2)
    return model


def fsdp2_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of layers, each a unit of FSDP2: the modules of every outermost ``nn.ModuleList``."""
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else fsdp2_blocks(child)


def gathered(weight: Tensor) -> Tensor:
    """A weight, gathered from all ranks if it is a DTensor."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def of_this_rank(setup: Setup, batches: list[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """This rank's micro-batches of a step."""
    yield from batches[dist.get_rank() :: setup.ranks]
