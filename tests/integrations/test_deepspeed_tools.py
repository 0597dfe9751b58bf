"""DeepSpeed's calls for an optimizer's state: answered, or refused on every rank."""

import fixed_gradients
import pytest
import tools_ranks
import torch
from kept_ranks import run_ranks
from zero_ranks import config

from novoscale import NovoGrad

OPTIONS = {
    "float32": {},
    "bfloat16": {"momentum_dtype": "bfloat16"},
    "int8": {"momentum_dtype": "int8", "granularity": "row", "normalize": "rms"},
    "int4": {"momentum_dtype": "int4", "preset": "adamw"},
}
BF16_OPTIMIZER = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


def ds(stage, world_size, options, more=None, **zero):
    made = {**config(stage, world_size, **zero), **(more or {})}
    made["optimizer"]["params"] = {"lr": 0.05, "weight_decay": 0.1, "preset": "paper", **options}
    return made


WRAPPERS = [
    (1, {}, None, False),
    (2, {}, None, True),
    (2, {"offload_optimizer": {"device": "cpu"}}, None, False),
    (2, {"round_robin_gradients": True}, None, False),
    (3, {}, None, True),
    (3, {"sub_group_size": 5000, "offload_optimizer": {"device": "cpu"}}, None, False),
    (1, {}, BF16_OPTIMIZER, True),
]


def unsharded(options, bfloat16):
    """exp_avg and exp_avg_sq by elements of a training in one process, after three steps."""
    model = fixed_gradients.FixedGradients()
    model = model.bfloat16().float() if bfloat16 else model
    optimizer = NovoGrad(
        model.named_parameters(), lr=0.05, weight_decay=0.1, **{"preset": "paper", **options}
    )
    for step in range(3):
        optimizer.zero_grad()
        model(torch.tensor(step)).backward()
        optimizer.step()
    moments = {name: m for name, _, _, m in fixed_gradients.pieces(optimizer)}
    squares = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        if "exp_avg_sq_row" in state:
            r, c = state["exp_avg_sq_row"].double(), state["exp_avg_sq_col"].double()
            squares[name] = (r[:, None] * c / r.mean()).float()
            continue
        v = state["exp_avg_sq"].view(-1, *[1] * (p.ndim - 1))
        rms = optimizer.param_groups[0]["normalize"] == "rms"
        squares[name] = (v / (p.numel() // v.numel()) if rms else v).expand(p.shape)
    return moments, squares


@pytest.mark.parametrize(("stage", "zero", "more", "groups"), WRAPPERS, ids=str)
@pytest.mark.parametrize("momentum_dtype", OPTIONS)
def test_full_states_are_those_of_one_process(momentum_dtype, stage, zero, more, groups):
    options = OPTIONS[momentum_dtype]
    moments, squares = unsharded(options, more is not None)
    ranks = run_ranks(tools_ranks.states, 3, ds(stage, 3, options, more, **zero), groups)
    for exp_avg, exp_avg_sq, _ in ranks:
        for name, shape in fixed_gradients.SHAPES.items():
            assert exp_avg[name].dtype == exp_avg_sq[name].dtype == torch.float32
            assert exp_avg[name].shape == exp_avg_sq[name].shape == shape
            if not groups:  # which change the parameters' numbers, and so the random bits
                assert torch.equal(exp_avg[name].view(-1), moments[name].float())
            assert torch.allclose(exp_avg_sq[name], squares[name], rtol=1e-6, atol=0)
        assert all(torch.equal(exp_avg[n], ranks[0][0][n]) for n in exp_avg)


@pytest.mark.parametrize(("stage", "zero", "more", "groups"), WRAPPERS, ids=str)
@pytest.mark.parametrize("momentum_dtype", OPTIONS)
def test_moments_are_set_through_the_format(momentum_dtype, stage, zero, more, groups):
    """The codes are the nearest, and pieces of a block have one scale: as of unsharded parameters."""
    options = OPTIONS[momentum_dtype]
    ranks = run_ranks(tools_ranks.moments_set, 3, ds(stage, 3, options, more, **zero), groups)
    for name, shape in fixed_gradients.SHAPES.items():
        p = torch.nn.Parameter(torch.zeros(shape))
        one = NovoGrad([p], allow_lossy_load=True, **{"preset": "paper", **options})
        saved = NovoGrad([p], preset="paper")
        saved.state[p] = {"exp_avg": tools_ranks.new_moments(shape)}
        one.load_state_dict({**one.state_dict(), "state": saved.state_dict()["state"]})
        (piece,) = fixed_gradients.pieces(one)
        for exp_avg, _ in ranks:
            assert torch.equal(exp_avg[name].view(-1), piece[3].float())


@pytest.mark.parametrize(("stage", "zero", "more", "groups"), WRAPPERS, ids=str)
@pytest.mark.parametrize("momentum_dtype", OPTIONS)
def test_what_was_read_can_be_written_back(momentum_dtype, stage, zero, more, groups):
    if momentum_dtype in ("float32", "bfloat16"):
        case = ds(stage, 3, OPTIONS[momentum_dtype], more, **zero)
        assert all(run_ranks(tools_ranks.exchanged, 3, case, groups, "exp_avg"))
    case = ds(stage, 3, OPTIONS[momentum_dtype], more, **zero)
    assert all(run_ranks(tools_ranks.exchanged, 3, case, groups, "exp_avg_sq"))


@pytest.mark.parametrize("momentum_dtype", OPTIONS)
def test_local_states_are_parts_of_the_full_ones(momentum_dtype):
    keys = ["exp_avg", "exp_avg_sq"] if momentum_dtype != "int4" else ["exp_avg"]
    for key in keys:
        for found, expected in run_ranks(tools_ranks.local_states, 3, ds(3, 3, OPTIONS[momentum_dtype]), key):
            assert all(torch.equal(found[n], expected[n]) for n in fixed_gradients.SHAPES)


@pytest.mark.parametrize("momentum_dtype", OPTIONS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_local_moments_are_set_or_refused_on_every_rank(world_size, momentum_dtype):
    case = ds(3, world_size, OPTIONS[momentum_dtype])
    first, *others = run_ranks(tools_ranks.local_moments_set, world_size, case)
    assert all(other == first for other in others)
    refused = {n for n, result in first.items() if isinstance(result, str)}
    blocks = momentum_dtype in ("int8", "int4")
    sharding = {"vector", "few", "wide"} | ({"blocks"} if world_size == 3 else set())
    assert refused == ({n for n in sharding if _sharding(n, world_size)} if blocks else set())
    assert all("safe_set_full_optimizer_state" in first[n] and n in first[n] for n in refused)
    assert all(result is True for n, result in first.items() if n not in refused)


def _sharding(name, world_size):
    numel = torch.Size(fixed_gradients.SHAPES[name]).numel()
    return numel >= 4096 and -(-numel // world_size) % 128 > 0


@pytest.mark.parametrize("momentum_dtype", OPTIONS)
@pytest.mark.parametrize("stage", [1, 3])
def test_second_moments_of_layers_are_set(stage, momentum_dtype):
    for found in run_ranks(tools_ranks.second_moments_set, 2, ds(stage, 2, OPTIONS[momentum_dtype]), 0.25):
        assert all(torch.allclose(v, torch.tensor(0.25), rtol=1e-6) for v in found.values())


@pytest.mark.parametrize(("stage", "zero", "more", "groups"), WRAPPERS, ids=str)
@pytest.mark.parametrize("momentum_dtype", ["float32", "int4"])
def test_what_cannot_be_answered_is_refused_on_every_rank(momentum_dtype, stage, zero, more, groups):
    says = {
        "step": "no 'step' of a NovoGrad",
        "shape": "9 elements, where 12480 are set",
        "nan": "not finite",
        "negative": "negative",
        "uneven": "allow_lossy_load",
        "keys": "Make the same calls",
        "parameters": "Make the same calls",
        "local v": "safe_set_full_optimizer_state",
    }
    results = run_ranks(
        tools_ranks.refusals, 3, ds(stage, 3, OPTIONS[momentum_dtype], more, **zero), groups, timeout=60
    )
    for rank, found in enumerate(results):
        assert found.pop("unchanged") == "True"
        for call, error in found.items():
            assert error.startswith("ValueError: "), (call, error)
            of = "blocks" if (call, rank) == ("parameters", 1) else "wide"
            assert f"ValueError: {of}: " in error
            assert says[call] in error or (call in ("shape", "nan") and "another rank" in error), (
                call,
                error,
            )
        assert says["shape"] in results[1]["shape"]


def test_no_first_moment():
    for error in run_ranks(tools_ranks.without_first_moment, 2, ds(2, 2, {"betas": [0.0, 0.5]})):
        assert error == "ValueError: wide: there is no exp_avg: betas[0] is 0, and no first moment is kept"


@pytest.mark.parametrize("stage", [1, 3])
def test_model_that_adam_takes_over_has_adams_state(stage):
    assert all(all(found) for found in run_ranks(tools_ranks.taken_over, 2, ds(stage, 2, {})))


@pytest.mark.parametrize("momentum_dtype", ["float32", "int4"])
@pytest.mark.parametrize(
    ("stage", "zero"),
    [(1, {}), (2, {}), (2, {"offload_optimizer": {"device": "cpu"}}), (3, {}), (3, {"sub_group_size": 5000})],
    ids=str,
)
def test_states_that_were_moved_away_and_back(stage, zero, momentum_dtype):
    assert all(run_ranks(tools_ranks.moved_away, 2, ds(stage, 2, OPTIONS[momentum_dtype], **zero)))


@pytest.mark.parametrize("momentum_dtype", ["float32", "int4"])
@pytest.mark.parametrize(
    ("stage", "how"),
    [
        (1, {"load_module_only": True}),
        (2, {"load_module_only": True}),  # under stage 3 DeepSpeed loads nothing then, with any optimizer
        (1, {"load_optimizer_states": False}),
        (2, {"load_optimizer_states": False}),
        (3, {"load_optimizer_states": False}),
    ],
    ids=str,
)
def test_weights_alone_are_loaded(stage, how, momentum_dtype, tmp_path):
    case = ds(stage, 2, OPTIONS[momentum_dtype])
    assert all(run_ranks(tools_ranks.weights_alone_loaded, 2, case, str(tmp_path), how))


@pytest.mark.parametrize("momentum_dtype", ["float32", "int4"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_of_a_checkpoint_by_zero_to_fp32(stage, momentum_dtype, tmp_path):
    case = ds(stage, 2, OPTIONS[momentum_dtype])
    for found, expected in run_ranks(tools_ranks.consolidated, 2, case, str(tmp_path)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], expected[n]) for n in expected)
