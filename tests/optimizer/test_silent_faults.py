"""Faults that people met without a word: each is said, by name, and what only looks like one is not."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import lr_scheduler

import novoscale
from novoscale import NovoGrad
from novoscale.optimizer import tensor_checks


def parameter(*shape, dtype=torch.float32, **options):
    return nn.Parameter(torch.ones(shape, dtype=dtype), **options)


@pytest.fixture
def silent():
    """No warning comes from NovoGrad."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(NovoGrad|float16)")
        yield


# ---- nothing is trained ----------------------------------------------------------------------------------


def replaced(model):
    """As fully_shard, parallelize_module and to_empty do."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.detach().clone()))


def test_an_optimizer_without_any_gradient_says_so_once():
    model = nn.Linear(3, 2)
    optimizer = NovoGrad(model.parameters(), lr=0.1, preset="paper")
    replaced(model)
    model(torch.ones(1, 3)).sum().backward()
    with pytest.warns(UserWarning, match=r"none of its 2 parameters has a gradient.*fully_shard") as said:
        [optimizer.step() for _ in range(3)]
    assert len([w for w in said if "NovoGrad" in str(w.message)]) == 1


def test_an_untrained_optimizer_says_so_though_its_state_was_made_for_a_checkpoint():
    model = nn.Linear(3, 2)
    optimizer = NovoGrad(model.parameters(), lr=0.1, preset="paper")
    get_optimizer_state_dict(model, optimizer)  # makes a step, with gradients of zeros
    assert optimizer.state
    with pytest.warns(UserWarning, match="none of its 2 parameters has a gradient"):
        optimizer.step()


def test_parameters_that_were_left_on_the_device_meta_are_named_as_such():
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    optimizer = NovoGrad(model.parameters(), preset="paper")
    replaced(model)
    with pytest.warns(UserWarning, match=r"on the device meta.*to_empty"):
        optimizer.step()


def test_no_gradient_is_no_fault_in_frozen_groups_after_a_step_or_where_it_is_released(silent):
    frozen = NovoGrad([parameter(2, requires_grad=False)], preset="paper")
    frozen.step()
    p = parameter(2)
    optimizer = NovoGrad([p], lr=0.1, preset="paper")
    p.grad = torch.ones(2)
    optimizer.step()
    p.grad = None
    optimizer.step()
    model = nn.Linear(3, 2)
    released = NovoGrad(model.parameters(), lr=0.0, preset="paper")
    with novoscale.release_gradients(model, released):
        model(torch.ones(1, 3)).sum().backward()
        released.step()


# ---- keys of param groups --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "option"),
    [
        ("weigth_decay", "weight_decay"),
        ("weight-decay", "weight_decay"),
        ("LR", "lr"),
        ("beta", "betas"),
        ("momentum_type", "momentum_dtype"),
        ("parms", "params"),
    ],
)
def test_misspelt_keys_of_param_groups_are_refused(key, option):
    good = parameter(2)
    group = {"params": [parameter(2)], key: 0.0}
    with pytest.raises(TypeError, match=f"param group 0: NovoGrad has no option '{key}': .*'{option}'"):
        NovoGrad([group], preset="paper")
    optimizer = NovoGrad([good], preset="paper")
    with pytest.raises(TypeError, match=f"param group 1: NovoGrad has no option '{key}'"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    assert set(group) == {"params", key}  # nothing was written into it


def test_keys_misspelt_or_of_other_optimizers_say_what_to_use():
    for key, value, says in [
        ("momentum", 0.9, "betas"),
        ("learning_rate", 0.1, "use lr"),
        ("amsgrad", 1, "AMS"),
    ]:
        with pytest.raises(TypeError, match=f"param group 0: NovoGrad has no option '{key}': .*{says}"):
            NovoGrad([{"params": [parameter(2)], key: value}], preset="paper")


def test_keys_that_others_put_there_are_no_misspelt_ones():
    schedulers = "initial_lr max_lr min_lr base_lr swa_lr max_momentum base_momentum"
    timm = "lr_scale weight_decay_scale layer_decay group_name"
    megatron = "wd_mult lr_mult is_expert_parallel is_decoupled_lr default_config pre_lr_mult pre_wd_mult"
    deepspeed = "moe allreduce name params_group_id"
    own = "label tags rank used weight_decay_start lr_of_epoch is_lora loraplus_lr_ratio correct_bias"
    for key in f"{schedulers} {timm} {megatron} {deepspeed} {own}".split():
        NovoGrad([{"params": [parameter(2)], key: 0.5}], preset="paper")
    for kind in (torch.optim.AdamW, torch.optim.NAdam, torch.optim.Rprop, torch.optim.RMSprop):
        groups = copy.deepcopy(kind([parameter(2)]).param_groups)
        for group in groups:
            group.pop("momentum", None)
        NovoGrad(groups, preset="paper")


def test_a_key_that_a_schedule_put_there_stays_through_a_copy_of_the_group():
    optimizer = NovoGrad([parameter(2)], lr=0.1, preset="paper")
    lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=4)
    NovoGrad(optimizer.param_groups, preset="paper")


def test_a_group_that_was_appended_is_said_to_need_add_param_group():
    p = parameter(2)
    optimizer = NovoGrad([p], lr=0.1, preset="paper")
    optimizer.param_groups.append({"params": [parameter(2)], "lr": 0.1})
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"param group 1 .* add it with optimizer.add_param_group"):
        optimizer.step()


# ---- a preset --------------------------------------------------------------------------------------------


def test_a_preset_that_is_changed_later_is_refused():
    p, q = parameter(2, 2), parameter(2, 2)
    optimizer = NovoGrad([{"params": [p]}, {"params": [q], "preset": "adamw"}], lr=0.1, preset="paper")
    for changed in (optimizer, copy.deepcopy(optimizer)):
        (weight,) = changed.param_groups[0]["params"]
        weight.grad = torch.ones(2, 2)
        changed.param_groups[0]["preset"] = "adamw"
        with pytest.raises(
            RuntimeError, match=r"param group 0: preset was 'paper' and is 'adamw' now, .* new"
        ):
            changed.step()
        changed.param_groups[0]["preset"] = "paper"
        changed.step()
        assert not torch.equal(weight, torch.ones(2, 2))


def test_a_preset_that_is_changed_after_loading_is_refused_and_a_loaded_one_is_not():
    def made(preset):
        p = parameter(2, 2)
        p.grad = torch.ones(2, 2)
        return NovoGrad([p], lr=0.1, preset=preset, granularity="tensor")

    saved = made("adamw")
    saved.step()
    optimizer = made("paper")
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    optimizer.step()
    assert optimizer.param_groups[0]["preset"] == "adamw"
    optimizer.param_groups[0]["preset"] = "paper"
    with pytest.raises(RuntimeError, match="preset was 'adamw' and is 'paper' now"):
        optimizer.step()


# ---- float16 weights -------------------------------------------------------------------------------------


@pytest.fixture
def unsaid():
    tensor_checks._said.clear()
    yield
    tensor_checks._said.clear()


def test_float16_weights_are_said_to_lose_small_steps_once(unsaid):
    params = [parameter(2, dtype=torch.float16) for _ in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match=r"parameter 0 of .* is float16, .*bfloat16") as said:
        [NovoGrad(params, lr=1e-5, preset="paper").step() for _ in range(2)]
    assert len([w for w in said if "float16" in str(w.message)]) == 1
    assert torch.equal(params[0], torch.ones(2, dtype=torch.float16))  # they stand still


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, False), (torch.bfloat16, True)])
def test_nothing_is_said_of_float16_where_it_is_accepted(unsaid, silent, dtype, rounding):
    p = parameter(2, dtype=dtype)
    optimizer = NovoGrad([p], stochastic_rounding=rounding, preset="paper")
    p.grad = torch.ones_like(p)
    optimizer.step()


# ---- parameters that come without add_param_group --------------------------------------------------------


def grown(how, options):
    a, b, c = parameter(3, 4), parameter(5), parameter(2, 2)
    optimizer = NovoGrad([{"params": [a]}, {"params": [b]}], lr=0.1, **{"preset": "paper", **options})
    for p in (a, b):
        p.grad = torch.full_like(p, 0.3)
    optimizer.step()
    how(optimizer, c)
    for _ in range(3):
        for p in (a, b, c):
            p.grad = torch.full_like(p, 0.3)
        optimizer.step()
    return optimizer, (a, b, c)


def replace_groups(optimizer, p):  # as Lightning's BaseFinetuning when it resumes
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    optimizer.param_groups = [*groups, {**groups[0], "params": [p]}]


@pytest.mark.parametrize("options", [{}, {"preset": "adamw", "momentum_dtype": "bfloat16"}], ids=str)
def test_parameters_that_come_without_add_param_group_are_adopted(options):
    expected = grown(lambda optimizer, p: optimizer.add_param_group({"params": [p]}), options)[1]
    for how in (lambda optimizer, p: optimizer.param_groups[1]["params"].extend([p]), replace_groups):
        optimizer, params = grown(how, options)
        assert all(map(torch.equal, params, expected))
        assert len(optimizer.state_dict()["state"]) == 3


def test_a_parameter_that_comes_in_the_middle_has_its_place_from_then_on():
    optimizer, (a, b, c) = grown(
        lambda o, p: o.param_groups[0]["params"].extend([p]), {"momentum_dtype": "int8"}
    )
    numbers = {id(p): n for n, p in enumerate((a, c, b))}
    found = {key: layout.local_shards[0].parameter.number for key, layout in optimizer._layouts.items()}
    assert found == numbers


def test_what_cannot_be_stepped_is_not_adopted():
    p = parameter(4)
    optimizer = NovoGrad([p], lr=0.1, preset="paper")
    flat = parameter(4)
    flat._fsdp_flattened = True
    odd = parameter(4, dtype=torch.complex64)
    for came, says in [(flat, "is a flat parameter of FSDP1"), (odd, "dtype torch.complex64")]:
        came.grad = torch.ones_like(came)
        optimizer.param_groups[0]["params"] = [came]
        with pytest.raises(RuntimeError, match=says):
            optimizer.step()


# ---- frozen parameters -----------------------------------------------------------------------------------


def thawed(frozen_at_first, resumed=False):
    """Weights after a training in which the middle parameter has gradients from the third step on."""
    params = [parameter(70, 70, dtype=torch.bfloat16) for _ in range(3)]
    options = {"lr": 0.01, "momentum_dtype": "int8"}
    params[1].requires_grad_(not frozen_at_first)
    params[2].requires_grad_(not frozen_at_first)
    optimizer = NovoGrad(params, **{"preset": "paper", **options})
    for step in range(4):
        for number, p in enumerate(params):
            p.requires_grad_(number == 0 or step > 1 or not frozen_at_first)
            generator = torch.Generator().manual_seed(10 * step)  # the same for all: only their bits differ
            grad = torch.randn(p.shape, generator=generator).bfloat16()
            p.grad = grad if number == 0 or step > 1 else None
        optimizer.step()
        if resumed and step == 0:
            params[2].requires_grad_(True)
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = NovoGrad(params, **{"preset": "paper", **options})
            optimizer.load_state_dict(state)
    return params


def test_random_bits_of_frozen_parameters_are_those_of_their_places():
    expected = thawed(frozen_at_first=False)
    assert not torch.equal(expected[1], expected[2])
    for resumed in (False, True):
        assert all(map(torch.equal, thawed(frozen_at_first=True, resumed=resumed), expected))


@pytest.mark.parametrize("options", [{}, {"granularity": 3}, {"preset": "adamw", "fused": True}], ids=str)
def test_frozen_parameters_of_any_kind_are_accepted_and_refused_when_thawed(options):
    p = parameter(6, 3)
    frozen = [parameter(7, dtype=d, requires_grad=False) for d in (torch.uint8, torch.complex64)]
    sparse = nn.Parameter(torch.ones(2, 2).to_sparse(), requires_grad=False)
    optimizer = NovoGrad(
        [("p", p), ("codes", frozen[0]), ("z", frozen[1]), ("s", sparse)],
        lr=0.1,
        **{"preset": "paper", **options},
    )
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert len(optimizer.state) == 1
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    frozen[1].requires_grad_(True)
    frozen[1].grad = torch.ones_like(frozen[1])
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=r"z has dtype torch.complex64"):
        optimizer.step()
    assert torch.equal(p, before)
    with pytest.raises(ValueError, match=r"z has dtype torch.complex64"):
        NovoGrad([("z", frozen[1])], preset="paper")


# ---- kinds of tensors ------------------------------------------------------------------------------------


class Codes(torch.Tensor):
    """Holds two tensors, as torchao's quantised weights do."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, requires_grad=False)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, *_):
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), named=None):
        if function is torch.ops.aten.detach.default:
            return cls(arguments[0].codes, arguments[0].scale)
        raise NotImplementedError(function)


class Unflattened(Codes):
    """The same, but does not say so."""

    __tensor_flatten__ = __tensor_unflatten__ = None


class Named(torch.Tensor):
    """Has its own elements."""


@pytest.mark.parametrize("kind", [Codes, Unflattened])
def test_a_kind_of_tensor_without_elements_of_its_own_is_refused_by_name(kind):
    weight = nn.Parameter(kind(torch.ones(4, 2, dtype=torch.int8), torch.ones(())))
    with pytest.raises(ValueError, match=f"weight is a {kind.__name__}, a kind of tensor"):
        NovoGrad([("weight", weight)], preset="paper")
    optimizer = NovoGrad([("p", parameter(2))], preset="paper")
    with pytest.raises(ValueError, match=f"weight is a {kind.__name__}, a kind of tensor"):
        optimizer.add_param_group({"params": [("weight", weight)]})
    assert not optimizer.state
    NovoGrad([("weight", weight.requires_grad_(False))], preset="paper")  # which it need not read


def test_a_kind_of_tensor_with_elements_of_its_own_is_stepped():
    weight = nn.Parameter(torch.ones(4, 2).as_subclass(Named))
    assert type(weight) is Named
    plain = parameter(4, 2)
    for p in (weight, plain):
        optimizer = NovoGrad([p], lr=0.1, preset="paper")
        p.grad = torch.ones(4, 2)
        optimizer.step()
    assert torch.equal(weight.as_subclass(torch.Tensor), plain)


# ---- what is given in place of parameters ----------------------------------------------------------------


def used_up(model):
    params = model.parameters()
    list(params)
    return params


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (lambda model: model, TypeError, r"given a module \(Sequential\): .*model.parameters\(\)"),
        (lambda model: model.state_dict(), TypeError, "given a dict: give it a list of param groups"),
        (lambda model: model.parameters, TypeError, r"given a function: call it, parameters\(\)"),
        (used_up, ValueError, "NovoGrad: an empty parameter list: .*taken already"),
        (lambda model: [{"params": used_up(model)}], ValueError, "param group 0: an empty parameter list"),
        (
            lambda model: nn.LazyLinear(3).parameters(),
            ValueError,
            "parameter 0 .* no shape yet.*Call the model",
        ),
    ],
    ids=["module", "dict", "function", "used up", "used up, in a group", "lazy"],
)
def test_given_in_place_of_parameters_it_says_what_to_give(given, error, says):
    with pytest.raises(error, match=says):
        NovoGrad(given(nn.Sequential(nn.Linear(3, 2))), preset="paper")


def test_given_parameters_in_place_of_a_model_it_says_so():
    model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"param_groups needs the model, .* got a generator"):
        novoscale.param_groups(model.parameters())
    optimizer = NovoGrad(model.parameters(), preset="paper")
    with pytest.raises(TypeError, match="release_gradients needs the model, and got a generator"):
        novoscale.release_gradients(model.parameters(), optimizer)
    novoscale.release_gradients(model, optimizer).remove()


# ---- messages --------------------------------------------------------------------------------------------


def test_an_unknown_option_has_the_nearest_or_else_the_list():
    with pytest.raises(TypeError) as near:
        NovoGrad([parameter(2)], beta=0.9, preset="paper")
    assert str(near.value) == "NovoGrad has no option 'beta': did you mean 'betas'?"
    with pytest.raises(TypeError, match=r"its options are lr, preset, betas, .*fused$"):
        NovoGrad([parameter(2)], xyz=1, preset="paper")


def test_fsdp1_is_refused_in_two_short_sentences():
    p = parameter(4)
    optimizer = NovoGrad([("p", p)], preset="paper")
    p._fsdp_flattened, p.grad = True, torch.ones(4)
    with pytest.raises(RuntimeError, match=r"p is a flat parameter of FSDP1.*use FSDP2") as refused:
        optimizer.step()
    assert len(str(refused.value).split()) < 35
