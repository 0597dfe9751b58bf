"""Which kernel a tensor goes to, and what is said where there is none."""

import subprocess
import warnings
from unittest import mock

import pytest
import torch
from against_reference import shard
from torch import nn

from novoscale import NovoGrad, kernels
from novoscale.kernels import dispatch
from novoscale.kernels.interface import VectorSizes
from novoscale.kernels.reference import elements as reference

needs_compiler = pytest.mark.skipif(kernels.fused("cpu") is None, reason="no C++ compiler")


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caches = (dispatch._load, dispatch._warn_once)
    if kernels.fused("cpu") is not None:
        caches += (kernels.fused("cpu").load,)
    for cache in caches:
        cache.cache_clear()
    yield
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def parameter(dtype=torch.float32, shape=(5, 4)):
    p = nn.Parameter(torch.ones(shape, dtype=dtype))
    p.grad = torch.full_like(p, 0.5)
    return p


def used(p, **options):
    """The modules that a step used."""
    optimizer = NovoGrad([p], lr=0.1, **{"preset": "paper", **options})
    optimizer.step()
    ready = next(iter(optimizer._step_tables.values()))
    return {part.module.__name__.split(".")[-1] for part in ready.kernels.parts}


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [None, True])
def test_cpu_tensors_go_to_the_cpu_kernel(dtype, fused):
    assert used(parameter(dtype), fused=fused) == {"cpu"}


@pytest.mark.parametrize("options", [{"fused": False}, {"foreach": True}])
def test_the_reference_when_it_is_asked_for(options):
    assert used(parameter(), **options) == {"reference"}


def test_what_the_fused_kernel_does_not_take_goes_to_the_reference():
    assert used(parameter(torch.float64)) == {"reference"}
    p = nn.Parameter(torch.ones(4, 5, dtype=torch.bfloat16).t())
    p.grad = torch.ones_like(p)
    assert used(p) == {"reference"}


@needs_compiler
def test_a_gradient_in_another_order_than_its_parameter_goes_to_the_fused_kernel_all_the_same():
    p = parameter()
    p.grad = torch.full((4, 5), 0.5).t()
    assert used(p, fused=True) == {"cpu"}


@needs_compiler
def test_tensors_of_one_step_may_go_to_different_kernels():
    plain, wide = parameter(), parameter(torch.float64)
    optimizer = NovoGrad([plain, wide], lr=0.1, max_grad_norm=0.1, preset="paper")
    alone = NovoGrad(
        [a := parameter(), b := parameter(torch.float64)],
        lr=0.1,
        max_grad_norm=0.1,
        fused=False,
        preset="paper",
    )
    for o in (optimizer, alone):
        for _ in range(3):
            o.step()
    assert torch.equal(plain, a)
    assert torch.equal(wide, b)


@needs_compiler
def test_all_kernels_give_the_same_bits_over_a_training():
    def train(fused):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(33, 17), nn.GELU(), nn.LayerNorm(17), nn.Linear(17, 5))
        optimizer = NovoGrad(
            model.parameters(), lr=0.05, weight_decay=0.01, max_grad_norm=0.5, fused=fused, preset="paper"
        )
        for step in range(20):
            optimizer.zero_grad()
            x = torch.randn(8, 33, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(train(True), train(False), strict=True))


def test_without_a_compiler_the_reference_serves_and_that_is_said_once(no_compiler):
    with pytest.warns(UserWarning, match="fused kernel for cpu cannot be used: .*compiler"):
        assert used(parameter()) == {"reference"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert used(parameter()) == {"reference"}


@pytest.fixture
def asked_anew():
    """Whether there is a fused kernel is asked once: here, and after the test, again."""
    caches = (dispatch._load, dispatch._warn_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@needs_compiler
@pytest.mark.parametrize(
    "error", [subprocess.CalledProcessError(1, ["gcc"]), FileNotFoundError("gcc"), AssertionError("libcuda")]
)
def test_however_a_kernel_fails_to_load_the_reference_serves(error, asked_anew, monkeypatch):
    monkeypatch.setattr(kernels.fused("cpu"), "load", mock.Mock(side_effect=error))
    dispatch._load.cache_clear()
    with pytest.warns(UserWarning, match=f"cannot be used: {type(error).__name__}: .*"):
        assert used(parameter()) == {"reference"}


def test_without_a_compiler_fused_true_is_an_error_that_says_why(no_compiler):
    with pytest.raises(RuntimeError, match=r"param group 0: `fused=True`: .*needs a C\+\+ compiler"):
        NovoGrad([parameter()], fused=True, preset="paper")


def test_fused_and_foreach_as_torch_words_it():
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        NovoGrad([parameter()], fused=True, foreach=True, preset="paper")


def test_fused_true_where_there_is_no_fused_kernel():
    with pytest.raises(RuntimeError, match=r"`fused=True` requires all the params to be .*float64 on cpu"):
        NovoGrad([parameter(torch.float64)], fused=True, preset="paper")


@needs_compiler
def test_fused_true_with_a_parameter_it_cannot_take_is_an_error_before_anything_is_changed():
    p = nn.Parameter(torch.ones(4, 5, dtype=torch.bfloat16).t())
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"`fused=True`: the fused kernel takes .*equal strides"):
        NovoGrad([p], lr=0.1, fused=True, preset="paper").step()
    assert torch.equal(p, torch.ones(5, 4))


def test_a_param_group_that_was_refused_is_not_added():
    optimizer = NovoGrad([parameter()], preset="paper")
    with pytest.raises(TypeError, match="fused must be True, False or None"):
        optimizer.add_param_group({"params": [parameter()], "fused": "yes"})
    assert len(optimizer.param_groups) == 1


def test_the_statistics_of_parts_are_put_together():
    a, b = parameter(), parameter(torch.float64)
    shards = [shard(p, p.grad, None, first=first) for first, p in enumerate((a, b))]
    device = torch.device("cpu")
    found = kernels.Kernels(shards, device, VectorSizes(2)).sum_of_squares()
    assert torch.equal(found, reference.sum_of_squares(shards, device, VectorSizes(2)))
