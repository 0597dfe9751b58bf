"""What torch's own tests ask of an optimizer's state dict, copies and hooks.

See test_torch_optim.py.
"""

import copy
import pickle

import pytest
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch_promises import Problem, assert_same, everywhere, options_of, through_file, trained

from novoscale import NovoGrad
from novoscale.checkpoint.imported import state_dicts


@everywhere
def test_a_loaded_optimizer_goes_on_with_the_same_bits_and_leaves_the_state_dict_alone(
    options, implementation
):
    problem, optimizer = trained(options, implementation)
    resumed = problem.twin()
    again = NovoGrad(resumed.params, **{"preset": "paper", **options_of(options, implementation)})
    saved = through_file(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    again.load_state_dict(saved)
    assert_same(again.state_dict(), optimizer.state_dict())
    problem.train(optimizer)
    assert resumed.train(again).same_bits(problem)
    assert_same(again.state_dict(), optimizer.state_dict())
    assert_same(saved, kept)


@everywhere
def test_a_state_dict_of_before_the_options_were_made_loads(options, implementation):
    problem, optimizer = trained(options, implementation)
    saved = copy.deepcopy(optimizer.state_dict())
    (group,) = saved["param_groups"]
    saved["param_groups"] = [{name: group[name] for name in ("params", state_dicts.OWN)}]
    resumed = problem.twin()
    again = NovoGrad(resumed.params, **{"preset": "paper", **options_of(options, implementation)})
    again.load_state_dict(saved)
    problem.train(optimizer)
    assert resumed.train(again).same_bits(problem)


@everywhere
def test_a_count_of_steps_that_is_a_number_loads(options, implementation):
    problem, optimizer = trained(options, implementation)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = state["step"].view(-1)[0].item()
    resumed = problem.twin()
    again = NovoGrad(resumed.params, **{"preset": "paper", **options_of(options, implementation)})
    again.load_state_dict(saved)
    problem.train(optimizer)
    assert resumed.train(again).same_bits(problem)


@pytest.mark.parametrize(("from_names", "to_names"), [(True, False), (False, True), (True, True)])
def test_names_do_not_decide_what_is_loaded(from_names, to_names):
    problem = Problem()
    optimizer = NovoGrad(problem.named if from_names else problem.params, preset="paper")
    problem.train(optimizer)
    resumed = problem.twin()
    again = NovoGrad(resumed.named if to_names else resumed.params, preset="paper")
    again.load_state_dict(through_file(optimizer.state_dict()))
    assert again.param_groups[0].get("param_names") == ["weight", "bias"]
    problem.train(optimizer)
    assert resumed.train(again).same_bits(problem)


@everywhere
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_a_copy_goes_on_with_the_same_bits_and_shares_nothing(options, implementation, copied):
    problem, optimizer = trained(options, implementation)
    optimizer.param_groups[0]["theirs"] = "kept"
    other, again = copied((problem, optimizer))
    public = [{key for key in vars(each) if key[0] != "_"} for each in (optimizer, again)]
    assert public[0] == public[1]
    assert again.param_groups[0]["theirs"] == "kept"
    problem.train(optimizer)
    assert not other.same_bits(problem)
    assert other.train(again).same_bits(problem)


# ---- hooks ------------------------------------------------------------------------------------------


def test_hooks_are_called_in_order():
    problem = Problem()
    optimizer = NovoGrad(problem.params, preset="paper")
    calls = []
    note = lambda what: lambda *_: calls.append(what)  # noqa: E731
    optimizer.register_step_pre_hook(note("before the step"))
    optimizer.register_step_post_hook(note("after the step"))
    everyones = [
        register_optimizer_step_pre_hook(note("before any step")),
        register_optimizer_step_post_hook(note("after any step")),
    ]
    try:
        optimizer.step(problem.loss)
    finally:
        for handle in everyones:
            handle.remove()
    optimizer.step()
    assert calls == [
        *("before any step", "before the step", "after the step", "after any step"),
        *("before the step", "after the step"),
    ]


def test_hooks_of_the_state_dict_may_change_it():
    problem, optimizer = trained("paper", "default")
    optimizer.register_state_dict_pre_hook(lambda o: o.param_groups[0].update(lr=0.5))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "more": 1})
    optimizer.register_state_dict_post_hook(lambda _, saved: saved.update(first=True), prepend=True)
    saved = optimizer.state_dict()
    assert (saved["param_groups"][0]["lr"], saved["more"], saved["first"]) == (0.5, 1, True)

    again, calls = NovoGrad(problem.twin().params, preset="paper"), []

    def doubled(_, given):
        calls.append("second")
        given["param_groups"][0]["lr"] *= 2

    again.register_load_state_dict_pre_hook(doubled)
    again.register_load_state_dict_pre_hook(lambda *_: calls.append("first"), prepend=True)
    again.register_load_state_dict_post_hook(lambda _: calls.append("after"))
    again.load_state_dict(copy.deepcopy(saved))
    assert calls == ["first", "second", "after"]
    assert again.param_groups[0]["lr"] == 1.0
