"""torch.set_default_device: what belongs beside the parameters, or to the CPU, is not put there."""

import ast
import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._device import _device_constructors

import novoscale
from novoscale import NovoGrad

PACKAGE = Path(novoscale.__file__).parent
WINGS = [PACKAGE / w for w in ("sharding", "state", "kernels", "checkpoint", "optimizer")]
FILES = [p for folder in (*WINGS, PACKAGE.parent / "integrations") for p in folder.rglob("*.py")]
FACTORIES = {function.__name__ for function in _device_constructors()}

SHAPES = ((70, 100), (70,), (3, 5))
FORMS = {
    "plain": {},
    "int8": {"momentum_dtype": "int8"},
    "int8 by row": {"momentum_dtype": "int8", "granularity": "row", "normalize": "rms"},
    "preset adamw": {"preset": "adamw"},
    "preset adamw, int4, clipped and scaled": {
        "preset": "adamw",
        "momentum_dtype": "int4",
        "clip_threshold": 0.5,
        "scale_parameter": True,
        "max_grad_norm": 0.1,
    },
}


def trained(options):
    """Weights, norms and state after steps, a save, a load and another step."""
    generator = torch.Generator().manual_seed(0)

    def drawn(shape):
        return torch.randn(shape, generator=generator, device="cpu").bfloat16()

    params = [nn.Parameter(drawn(shape)) for shape in SHAPES]

    def steps(optimizer, count):
        for _ in range(count):
            for p in params:
                p.grad = drawn(p.shape)
            optimizer.step()
        return optimizer

    before = steps(NovoGrad(params, lr=0.1, weight_decay=0.1, **{"preset": "paper", **options}), 3)
    after = NovoGrad(params, lr=0.1, weight_decay=0.1, **{"preset": "paper", **options})
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    steps(after, 1)
    assert after.skipped_steps == 0
    return params, after.layer_norms(), [after.state[p] for p in params]


@pytest.fixture
def default_device():
    yield torch.set_default_device
    torch.set_default_device(None)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("form", FORMS)
def test_training_gives_the_same_bits(form, fused, default_device):
    options = {**FORMS[form], "fused": fused}
    expected = trained(options)
    default_device("meta")
    torch.testing.assert_close(trained(options), expected, rtol=0, atol=0)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_nothing_is_made_without_saying_on_which_device(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    silent = [
        f"line {call.lineno}: torch.{call.func.attr}"
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and (call.func.value.id, call.func.attr in FACTORIES) == ("torch", True)
        and not any(keyword.arg == "device" for keyword in call.keywords)
    ]
    assert not silent
