"""CUDA graphs of a step, replayed beside an optimizer that steps eagerly with the same gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.on_chip import training
from benchmarks.on_chip.gpu import Gpu, Run
from benchmarks.on_chip.rows import Row, attempted, name_of
from benchmarks.shapes import Shapes

SHAPES: Shapes = [(512, 512), (512,), (1000, 384)]
FEATURES = (384, 512, 300)  # of a small network
FORMS = (("float32", torch.float32), ("adamw, int8", torch.bfloat16))
REPLAYS = 4
LR = 0.01


class Twins:
    """Two optimizers of equal parameters, of which one is captured; ``lr`` is a tensor on the device.

    Attributes:
        lr: of both.
        params: of the one that is captured.
        captured: it.
    """

    def __init__(self, params: Sequence[nn.Parameter], form: str) -> None:
        self.lr = torch.tensor(LR, device=params[0].device)
        self.params = list(params)
        self._copies = [nn.Parameter(p.detach().clone()) for p in params]
        self.captured, self._eager = (
            training.optimizer(x, lr=self.lr, fused=True, **training.FORMS[form])
            for x in (self.params, self._copies)
        )

    def follow(self) -> None:
        """The eager one steps with the gradients that the other has used."""
        for copy, p in zip(self._copies, self.params, strict=True):
            copy.grad = _grad(p).clone()
        self._eager.step()

    def compared(self) -> Row:
        """How many elements have other bits."""
        captured, eager = map(training.snapshot, (self.captured, self._eager))
        different = training.differing(captured, eager)
        return {"differ": sum(different.values()), **training.failed(different, "eager steps")}

    def replayed(self, replay: Run) -> None:
        """Replay with one learning rate after another, the other one following."""
        for n in range(REPLAYS):
            self.lr.fill_(LR * (n + 1))
            replay()
            self.follow()


def replay(gpu: Gpu) -> Iterator[Row]:
    """The ways to capture, each with two forms."""
    for way, run in WAYS.items():
        for form, dtype in FORMS:
            row: Row = {"captured": way, "weights": name_of(dtype), "form": form, "replays": REPLAYS}
            yield attempted(row, partial(run, gpu, form, dtype))


def static_gradients(gpu: Gpu, form: str, dtype: torch.dtype) -> Row:
    """Only the step is captured; gradients are written where they are."""
    twins, replay = _static(gpu, form, dtype)
    for n in range(REPLAYS):
        for p, gradient in zip(twins.params, training.gradients(twins.params, n), strict=True):
            _grad(p).copy_(gradient)
        twins.lr.fill_(LR * (n + 1))
        replay()
        twins.follow()
    return twins.compared()


def eager_between(gpu: Gpu, form: str, dtype: torch.dtype) -> Row:
    """Between replays a step that is not captured has its gradients elsewhere."""
    twins, replay = _static(gpu, form, dtype)
    twins.replayed(replay)
    there = [_grad(p) for p in twins.params]
    for p, gradient in zip(twins.params, training.gradients(twins.params, 7), strict=True):
        p.grad = gradient
    twins.captured.step()
    twins.follow()
    for p, gradient in zip(twins.params, there, strict=True):
        p.grad = gradient
    twins.replayed(replay)
    return twins.compared()


def whole_step(gpu: Gpu, form: str, dtype: torch.dtype) -> Row:
    """Backward pass and step are captured, gradients made within: torch's recipe for whole networks."""
    torch.manual_seed(0)
    inputs, hidden, outputs = FEATURES
    layers = (nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))
    model = nn.Sequential(*layers).to(gpu.device, dtype)
    data = torch.randn(64, inputs).to(gpu.device, dtype)
    twins = Twins(list(model.parameters()), form)
    optimizer = twins.captured

    def step() -> None:
        model(data).float().square().mean().backward()
        optimizer.step()

    def warm() -> None:
        optimizer.zero_grad(set_to_none=True)
        step()
        twins.follow()

    gpu.warm(warm)
    optimizer.zero_grad(set_to_none=True)
    replay = gpu.captured(step)
    for n in range(REPLAYS):
        data.copy_(torch.randn(data.shape, generator=torch.Generator().manual_seed(n)))
        twins.lr.fill_(LR * (n + 1))
        replay()
        twins.follow()
    return twins.compared()


def _static(gpu: Gpu, form: str, dtype: torch.dtype) -> tuple[Twins, Run]:
    """After a few steps, for state, tables and kernels to be made; the step captured."""
    twins = Twins(training.parameters(SHAPES, dtype, gpu.device), form)

    def step() -> None:
        twins.captured.step()
        twins.follow()

    gpu.warm(step)
    return twins, gpu.captured(twins.captured.step)


def _grad(p: nn.Parameter) -> Tensor:
    assert p.grad is not None
    return p.grad


WAYS: dict[str, Callable[[Gpu, str, torch.dtype], Row]] = {
    "step, static gradients": static_gradients,
    "step, an eager one between": eager_between,
    "backward and step": whole_step,
}
