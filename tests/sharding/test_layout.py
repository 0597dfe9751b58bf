"""Any sharding of any set of layers over any number of ranks gives the unsharded sums and update."""

import itertools
import math
import threading
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings

from novoscale import NovoGrad, kernels
from novoscale.kernels.interface import VectorSizes
from novoscale.kernels.reference import elements as reference
from novoscale.sharding import collectives
from novoscale.sharding.layers import LayoutError, Parameter, describe
from novoscale.sharding.layout import Fragment, Span, unsharded
from novoscale.sharding.partition import partition
from novoscale.sharding.plan import PlacedLayout, Plan
from novoscale.state import momentum


class ThreadGroup:
    """Stands for a process group whose ranks are threads of this process."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size, timeout=20)
        self.parts = {}
        self.calls = 0

    def all_reduce(self, tensor, op):
        self.parts[threading.get_ident()] = tensor.clone()
        if self.barrier.wait() == 0:
            stacked = torch.stack(list(self.parts.values()))
            self.result = stacked.sum(0) if op == dist.ReduceOp.SUM else stacked.amax(0)
            self.parts = {}
            self.calls += 1
        self.barrier.wait()
        tensor.copy_(self.result)
        self.barrier.wait()


def on_ranks(size, function):
    """function(rank, group) on as many threads; the results in the order of the ranks."""
    group, results, errors = ThreadGroup(size), [None] * size, []

    def work(rank):
        try:
            results[rank] = function(rank, group)
        except BaseException as error:
            errors.append(error)
            group.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    with mock.patch.multiple(
        collectives.dist,
        all_reduce=lambda t, op, group: group.all_reduce(t, op),
        get_backend_config=lambda _: "cpu:threads",
    ):
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    if errors:
        raise errors[0]
    return results, group


@st.composite
def shardings(draw):
    """Layers, their order and gaps in a flat buffer, and the boundaries of the ranks in it."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    gaps = draw(st.lists(st.integers(0, 3), min_size=len(sizes), max_size=len(sizes)))
    order = draw(st.permutations(range(len(sizes))))
    starts, end = {}, 0
    for layer in order:
        starts[layer] = end + gaps[layer]
        end = starts[layer] + sizes[layer]
    world = draw(st.integers(1, 5))
    total = end + draw(st.integers(0, 60))  # tail padding: some ranks may hold nothing else
    bounds = [
        0,
        *sorted(draw(st.lists(st.integers(0, total), min_size=world - 1, max_size=world - 1))),
        total,
    ]
    return sizes, [starts[i] for i in range(len(sizes))], bounds, draw(st.integers(0, 2**31))


def pieces_of(sizes, starts, bounds):
    pieces = []
    for low, high in itertools.pairwise(bounds):
        held = [
            (max(s, low), min(s + n, high), i, s) for i, (s, n) in enumerate(zip(starts, sizes, strict=True))
        ]
        pieces.append([Fragment(a - low, b - low, i, a - s) for a, b, i, s in held if a < b])
    return pieces


def step(param, grad, exp_avg, lay, norm_type=2):
    """What NovoGrad.step does with one tensor, without its options."""
    op = dist.ReduceOp.SUM if norm_type == 2 else dist.ReduceOp.MAX
    made = Plan([PlacedLayout(lay, 0, op)], torch.device("cpu"))
    (stored,) = momentum.stored(lay, "float32")
    pieces = momentum.pieces(lay, stored, 0)
    shard = kernels.Shard(param, grad, exp_avg, None, pieces, norm_type, 0, True, True, False)
    statistic = reference.sum_of_squares([shard], made.device, VectorSizes(made.layers))
    finite, _ = made.complete(statistic)
    scale = 1 / (statistic.sqrt() + 1e-8)
    active = finite & (statistic > 0)
    tenth, zero = torch.full_like(scale, 0.1), torch.zeros_like(scale)
    each = torch.stack((scale, tenth, zero, zero), dim=1)
    options = scale.new_tensor([[0.9, 1.0, 0.1, 0.0]])
    reference.update([shard], kernels.Coefficients(each, options, active, zero.int()))
    return dict(zip(made.names(), statistic.tolist(), strict=True)), bool(finite)


@settings(max_examples=150, deadline=None)
@given(shardings(), st.sampled_from([torch.float32, torch.float64]), st.sampled_from([0, 2]))
def test_any_cut_gives_the_uncut_sums_and_update(sharding, dtype, norm_type):
    sizes, starts, bounds, seed = sharding
    generator = torch.Generator().manual_seed(seed)
    flat = lambda: torch.randn(bounds[-1], generator=generator).to(dtype)  # noqa: E731
    # Gradients are multiples of 1/8: their squares add up without rounding, in any order.
    params, moments, grads = flat(), flat(), (flat() * 8).round() / 8
    layers = [Parameter(f"l{i}", n) for i, n in enumerate(sizes)]
    pieces = pieces_of(sizes, starts, bounds)

    whole_p, whole_m = params.clone(), moments.clone()
    everything = [Fragment(s, s + n, i) for i, (s, n) in enumerate(zip(starts, sizes, strict=True))]
    unsharded = partition(layers, [everything], rank=0, numel=bounds[-1])
    expected, _ = step(whole_p, grads, whole_m, unsharded, norm_type)

    def rank_step(rank, group):
        low, high = bounds[rank : rank + 2]
        p, m = params[low:high].clone(), moments[low:high].clone()
        lay = partition(layers, pieces, rank=rank, numel=high - low, process_group=group)
        sums, finite = step(p, grads[low:high].clone(), m, lay, norm_type)
        return p, m, sums, finite

    results, group = on_ranks(len(pieces), rank_step)
    assert torch.equal(torch.cat([r[0] for r in results]), whole_p)
    assert torch.equal(torch.cat([r[1] for r in results]), whole_m)
    for (_, _, sums, finite), held in zip(results, pieces, strict=True):
        assert finite
        assert set(sums) == {f"l{s.parameter}" for s in held}
        assert all(sums[name] == expected[name] for name in sums)
    assert group.calls == (2 if len(pieces) > 1 else 0)  # the ranks' agreement on the layers, and the step


@settings(max_examples=60, deadline=None)
@given(shardings(), st.data())
def test_sums_of_any_gradients_differ_by_float64_rounding_only(sharding, data):
    sizes, starts, bounds, seed = sharding
    generator = torch.Generator().manual_seed(seed)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    grads = torch.randn(bounds[-1], generator=generator).to(dtype)
    layers = [Parameter(f"l{i}", n) for i, n in enumerate(sizes)]
    pieces = pieces_of(sizes, starts, bounds)

    def sums(rank, group):
        low, high = bounds[rank : rank + 2]
        lay = partition(layers, pieces, rank=rank, numel=high - low, process_group=group)
        zeros = torch.zeros(high - low)
        return step(zeros, grads[low:high], zeros.clone(), lay)[0]

    for held in on_ranks(len(pieces), sums)[0]:
        for name, value in held.items():
            i = int(name[1:])
            exact = grads[starts[i] : starts[i] + sizes[i]].double().square().sum().item()
            assert value == pytest.approx(exact, rel=40 * 2**-53)


@settings(max_examples=40, deadline=None)
@given(shardings(), st.data(), st.sampled_from([0, 2]), st.sampled_from([float("nan"), float("inf")]))
def test_one_nonfinite_element_stops_every_rank(sharding, data, norm_type, value):
    sizes, starts, bounds, _ = sharding
    layer = data.draw(st.integers(0, len(sizes) - 1))
    where = starts[layer] + data.draw(st.integers(0, sizes[layer] - 1))
    grads = torch.ones(bounds[-1])
    grads[where] = value
    layers = [Parameter(f"l{i}", n) for i, n in enumerate(sizes)]
    pieces = pieces_of(sizes, starts, bounds)

    def rank_step(rank, group):
        low, high = bounds[rank : rank + 2]
        lay = partition(layers, pieces, rank=rank, numel=high - low, process_group=group)
        p, m = torch.ones(high - low), torch.ones(high - low)
        finite = step(p, grads[low:high].clone(), m, lay, norm_type)[1]
        return finite, p, m

    for finite, p, m in on_ranks(len(pieces), rank_step)[0]:
        assert not finite
        assert torch.equal(p, torch.ones_like(p))
        assert torch.equal(m, torch.ones_like(m))


def test_ranks_with_different_layers_are_told_so_before_anything_is_added_up():
    def build(rank, group):
        layers = [Parameter("a", 4), Parameter("b", 2)] if rank else [Parameter("a", 4), Parameter("c", 2)]
        pieces = [[Fragment(0, 3, 0)], [Fragment(0, 1, 0, 3), Fragment(1, 3, 1)]]
        lay = partition(layers, pieces, rank=rank, numel=3, process_group=group)
        with pytest.raises(LayoutError, match="the ranks have different layers"):
            Plan([PlacedLayout(lay, 0)], torch.device("cpu"))
        return True

    assert on_ranks(2, build)[0] == [True, True]


def test_only_cut_layers_take_part_in_the_collective():
    layers = [Parameter("a", 4), Parameter("b", 6), Parameter("c", 2)]
    pieces = [[Fragment(0, 4, 0), Fragment(4, 6, 1)], [Fragment(0, 4, 1, 2), Fragment(4, 6, 2)]]
    first, second = (partition(layers, pieces, rank=r, numel=6) for r in (0, 1))
    assert [held.parameter.name for held in first.local_shards] == ["a", "b"]
    assert [held.parameter.name for held in second.local_shards] == ["b", "c"]
    assert first.reductions[0].spans == (Span(1, 1),)
    assert second.reductions[0].spans == (Span(0, 1),)
    assert second.fragments == (Fragment(0, 4, 0, 2), Fragment(4, 6, 1, 0))


def test_layouts_of_one_process_group_share_a_collective():
    layers = [Parameter("a", 2)]
    pieces = [[Fragment(0, 1, 0)], [Fragment(0, 1, 0, 1)]]
    group, other = object(), object()
    shards = [partition(layers, pieces, rank=0, numel=1, process_group=g) for g in (group, group, other)]
    ranks = mock.patch.object(collectives, "ranks_of", return_value=[0])
    with mock.patch.object(Plan, "_agree"), ranks:
        assert Plan([PlacedLayout(s, i) for i, s in enumerate(shards)], torch.device("cpu")).collectives == 2
    assert Plan([PlacedLayout(unsharded(Parameter("p", 5)), 0)], torch.device("cpu")).collectives == 0


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ([[Fragment(0, 3, 0)], []], "parameter a: its 4 elements are not held exactly once"),
        (
            [[Fragment(0, 3, 0)], [Fragment(0, 2, 0, 2)]],
            "parameter a: its 4 elements are not held exactly once",
        ),
        ([[Fragment(0, 2, 0), Fragment(1, 3, 0, 2)], []], "overlap"),
        ([[Fragment(2, 6, 0)], []], "ends at element 6 of a tensor of 4"),
        ([[Fragment(0, 0, 0)], [Fragment(0, 4, 0)]], "empty"),
    ],
)
def test_pieces_that_do_not_make_up_the_layers_are_refused(pieces, says):
    with pytest.raises(LayoutError, match=says):
        partition([Parameter("a", 4)], pieces, rank=0, numel=4)


@st.composite
def matrices(draw):
    """Shapes of parameters one after another in a flat tensor, and where it is sharded."""
    dimension = st.integers(1, 6)
    shapes = draw(st.lists(st.lists(dimension, min_size=0, max_size=4).map(tuple), min_size=1, max_size=5))
    numel = sum(math.prod(shape) for shape in shapes)
    ranks = draw(st.integers(1, 4))
    bounds = sorted(draw(st.lists(st.integers(0, numel), min_size=ranks - 1, max_size=ranks - 1)))
    return shapes, [0, *bounds, numel], draw(st.integers(0, 2**31))


OPTIONS = st.fixed_dictionaries(
    {
        "init_zero": st.booleans(),
        "bias_correction": st.booleans(),
        "clip_threshold": st.sampled_from([None, 0.5]),
        "scale_parameter": st.booleans(),
        "momentum_dtype": st.sampled_from(["float32", "bfloat16"]),
    }
)


RANK_WITHOUT_ANYTHING = (
    ([()], [0, 0, 1], 0),
    {"init_zero": False, "bias_correction": False, "clip_threshold": None}
    | {"scale_parameter": False, "momentum_dtype": "float32"},
)


@settings(max_examples=100, deadline=None)
@example(*RANK_WITHOUT_ANYTHING)
@given(matrices(), OPTIONS)
def test_any_cut_of_factored_parameters_is_the_uncut_training(case, options):
    shapes, bounds, seed = case
    parameters = [describe(f"p{i}", shape, "factored", i) for i, shape in enumerate(shapes)]
    sizes = [p.numel for p in parameters]
    starts = list(itertools.accumulate(sizes, initial=0))[:-1]
    weights, *grads = torch.randn(4, bounds[-1], generator=torch.Generator().manual_seed(seed))
    grads[0][: bounds[-1] // 2] = 0  # on some ranks all of it

    def train(flat, layout, gradients):
        optimizer = NovoGrad([flat], lr=0.1, preset="adamw", weight_decay=0.1, **options)
        optimizer.bind("a wrapper", [(0, flat, layout)])
        for grad in gradients:
            flat.grad = grad.clone()
            optimizer.step()
        return flat.detach()

    everything = [Fragment(s, s + n, i) for i, (s, n) in enumerate(zip(starts, sizes, strict=True))]
    unsharded = partition(parameters, [everything], rank=0, numel=bounds[-1])
    expected = train(weights.clone(), unsharded, grads)
    pieces = pieces_of(sizes, starts, bounds)

    def rank_step(rank, group):
        low, high = bounds[rank : rank + 2]
        layout = partition(parameters, pieces, rank=rank, numel=high - low, process_group=group)
        return train(weights[low:high].clone(), layout, [g[low:high] for g in grads])

    found = torch.cat(on_ranks(len(pieces), rank_step)[0])
    # Sums of float64 in another order: one second moment in float32 may differ in its last bit.
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert (found == expected).float().mean() > 0.9
