"""A training under ZeRO goes on, on another number of ranks, as if it had not been interrupted."""

import re
import shutil

import fixed_gradients
import pytest
import torch
import universal_ranks
from kept_ranks import run_ranks
from typer.testing import CliRunner
from zero_ranks import config

from novoscale.checkpoint.deepspeed import to_state_dict, to_universal
from novoscale.checkpoint.errors import CheckpointError
from novoscale.cli import app

UNIVERSAL = {"checkpoint": {"load_universal": True}}
FORMS = [
    {},
    {"momentum_dtype": "bfloat16", "granularity": "row", "normalize": "rms"},
    {"momentum_dtype": "int8", "preset": "adamw", "clip_threshold": 0.5, "scale_parameter": True},
    {"momentum_dtype": "int4", "preset": "adamw"},
    {"momentum_dtype": "int8", "bias_correction": True},
]


def with_options(ds, options, **more):
    ds["optimizer"]["params"] = {"lr": 0.05, "weight_decay": 0.1, "preset": "paper", **options}
    return ds | more


def resume(folder, first, second, options, *, stages=(2, 2), bfloat16=False, groups=False, zero=(), **more):
    """What the ranks hold after the second half, on another number of ranks than the first."""
    zero = dict(zero)
    ds = with_options(config(stages[0], first, **zero), options, **more)
    run_ranks(universal_ranks.saved, first, ds, str(folder / "saved"), bfloat16, groups)
    to_universal(folder / "saved" / "half", folder / "universal" / "half")
    ds = with_options(config(stages[1], second, **zero), options, **UNIVERSAL, **more)
    return run_ranks(universal_ranks.resumed, second, ds, str(folder / "universal"), bfloat16, groups)


def assert_uninterrupted(found, options, dtype=torch.float32, master=None):
    expected = fixed_gradients.unsharded({"lr": 0.05, "weight_decay": 0.1, **options}, dtype, master=master)
    assert not any(isinstance(rank, str) for rank in found), found
    assert fixed_gradients.differing([pieces for pieces, _ in found], expected) == set()


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize(
    ("stage", "first", "second"), [(1, 3, 2), (2, 1, 4), (2, 4, 3), (3, 2, 3), (3, 3, 1)]
)
def test_it_goes_on_to_the_same_bits_on_another_number_of_ranks(stage, first, second, options, tmp_path):
    found = resume(tmp_path, first, second, options, stages=(stage, stage))
    assert_uninterrupted(found, options)


INT8 = FORMS[2]


@pytest.mark.parametrize("stages", [(1, 2), (2, 1)], ids=str)
def test_from_stage_1_to_2_and_back(stages, tmp_path):
    assert_uninterrupted(resume(tmp_path, 2, 3, INT8, stages=stages), INT8)


@pytest.mark.parametrize("stages", [(3, 2), (1, 3)], ids=str)
def test_to_and_from_stage_3_which_adam_cannot(stages, tmp_path):
    assert_uninterrupted(resume(tmp_path, 2, 3, INT8, stages=stages), INT8)


@pytest.mark.parametrize("stages", [(2, 2), (3, 3), (2, 3), (3, 1)], ids=str)
def test_frozen_tied_and_unused_parameters_and_buffers_are_there_again(stages, tmp_path):
    ds = [with_options(config(stage, 1), INT8) for stage in stages]
    train = universal_ranks.trained_with_frozen
    (expected,) = run_ranks(train, 1, ds[0], str(tmp_path / "whole"), 0, 0, 6)
    run_ranks(train, 1, ds[0], str(tmp_path / "saved"), 0, 0, 3)
    to_universal(tmp_path / "saved" / "half", tmp_path / "universal" / "half")
    (found,) = run_ranks(train, 1, ds[1] | UNIVERSAL, str(tmp_path / "universal"), 1, 3, 3)
    exact = stages[0] == stages[1]  # stage 3 adds up some gradients in another order
    tolerance = 0 if exact else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_own_converter_says_what_to_use_and_writes_nothing(stage, tmp_path):
    run_ranks(universal_ranks.saved, 2, with_options(config(stage, 2), INT8), str(tmp_path))
    target = tmp_path / "universal"
    (said,) = run_ranks(universal_ranks.to_universal_by_deepspeed, 1, str(tmp_path / "half"), str(target))
    assert "novoscale to-universal IN OUT" in said
    assert not target.exists()


def test_another_number_of_ranks_without_conversion_is_refused(tmp_path):
    run_ranks(universal_ranks.saved, 2, with_options(config(2, 2), INT8), str(tmp_path))
    for found in run_ranks(universal_ranks.resumed, 3, with_options(config(2, 3), INT8), str(tmp_path)):
        assert "world size" in found  # DeepSpeed's own message
        assert "changed" not in found


@pytest.mark.parametrize("fsdp", [False, True], ids=["one process", "FSDP2"])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_state_dict_goes_on_without_deepspeed_and_comes_back(options, fsdp, tmp_path):
    options = {"lr": 0.05, "weight_decay": 0.1, **options}
    run_ranks(universal_ranks.saved, 3, with_options(config(3, 3), options), str(tmp_path))
    path = tmp_path / "half.pt"
    to_state_dict(tmp_path / "half", path)
    world = 2 if fsdp else 1
    assert_uninterrupted(
        run_ranks(universal_ranks.resumed_from_state_dict, world, str(path), options, fsdp), options
    )
    to_universal(path, tmp_path / "universal" / "half")
    ds = with_options(config(2, 2), options, **UNIVERSAL)
    assert_uninterrupted(run_ranks(universal_ranks.resumed, 2, ds, str(tmp_path / "universal")), options)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_training_under_fsdp2_goes_on_under_zero(options, tmp_path):
    options = {"lr": 0.05, "weight_decay": 0.1, **options}
    path = tmp_path / "half.pt"
    run_ranks(universal_ranks.saved_under_fsdp2, 3, str(path), options)
    to_universal(path, tmp_path / "universal" / "half")
    ds = with_options(config(3, 2), options, **UNIVERSAL)
    assert_uninterrupted(run_ranks(universal_ranks.resumed, 2, ds, str(tmp_path / "universal")), options)


def converted(tmp_path, options=INT8, stage=2):
    run_ranks(universal_ranks.saved, 2, with_options(config(stage, 2), options), str(tmp_path / "saved"))
    to_universal(tmp_path / "saved" / "half", tmp_path / "universal" / "half")
    return tmp_path / "universal"


@pytest.mark.parametrize("stage", [2, 3])
def test_another_format_layers_or_model_is_refused_by_name_and_nothing_is_changed(stage, tmp_path):
    folder = converted(tmp_path, {"momentum_dtype": "float32"}, stage)
    for options, says in (
        ({"momentum_dtype": "int8"}, "wide: the first moment .* allow_lossy_load=True"),
        ({"granularity": "row"}, "of wide has 1 elements .*granularity"),
    ):
        ds = with_options(config(stage, 3), options, **UNIVERSAL)
        for found in run_ranks(universal_ranks.resumed, 3, ds, str(folder)):
            assert re.search(says, found), found
            assert "changed" not in found
    shutil.rmtree(folder / "half" / "zero" / "wide")
    ds = with_options(config(stage, 1), {}, **UNIVERSAL)
    (found,) = run_ranks(universal_ranks.resumed, 1, ds, str(folder))
    assert "wide: the checkpoint" in found
    assert "changed" not in found


def adams(tmp_path, stage):
    """A universal checkpoint of an AdamW, by DeepSpeed's own converter."""
    run_ranks(universal_ranks.adam_saved, 2, config(stage, 2), str(tmp_path / "saved"))
    source, target = tmp_path / "saved" / "half", tmp_path / "universal" / "half"
    with pytest.raises(CheckpointError, match=r"exp_avg_sq.* is not NovoGrad's: convert it with DeepSpeed's"):
        to_universal(source, tmp_path / "no")
    (said,) = run_ranks(universal_ranks.to_universal_by_deepspeed, 1, str(source), str(target))
    assert said == "converted"
    (target.parent / "latest_universal").write_text("half")
    return target.parent


@pytest.mark.parametrize("stage", [2, 3])
def test_adams_universal_checkpoint_is_refused_and_nothing_is_changed(stage, tmp_path):
    folder = adams(tmp_path, stage)
    ds = with_options(config(stage, 3), INT8, **UNIVERSAL)
    for found in run_ranks(universal_ranks.resumed, 3, ds, str(folder)):
        assert re.search(r"wide: .* not of a NovoGrad \(it has exp_avg.pt, .*allow_lossy_load=True", found), (
            found
        )
        assert "changed" not in found


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("options", [{"preset": "adamw"}, INT8], ids=str)
def test_adams_universal_checkpoint_is_taken_over_as_in_one_process(options, stage, tmp_path):
    options = {"lr": 0.05, "weight_decay": 0.1, **options, "allow_lossy_load": True}
    folder = adams(tmp_path, stage)
    ds = with_options(config(stage, 3), options, **UNIVERSAL)
    found = run_ranks(universal_ranks.resumed, 3, ds, str(folder))
    assert not any(isinstance(rank, str) for rank in found), found
    expected = universal_ranks.taken_over(folder / "half", options)
    for name, position, weights, moments in (piece for pieces, _ in found for piece in pieces):
        for mine, its in zip((weights, moments), expected[name], strict=True):
            its = its[position : position + len(mine)]
            # The sums over a layer are added up in another order.
            tolerance = 1e-5 if options.get("momentum_dtype") is None else 0.02
            torch.testing.assert_close(mine, its, rtol=tolerance, atol=tolerance)


def test_what_cannot_be_converted_is_named_and_nothing_is_written(tmp_path):
    run_ranks(universal_ranks.saved, 3, with_options(config(2, 3), INT8), str(tmp_path))
    source, target = tmp_path / "half", tmp_path / "universal"
    (target).mkdir()
    with pytest.raises(CheckpointError, match="it is there already"):
        to_universal(source, target)
    target.rmdir()
    with pytest.raises(CheckpointError, match=f"not the folder of a checkpoint's tag.* latest is {source}"):
        to_universal(tmp_path, target)
    with pytest.raises(CheckpointError, match="nosuch: there is no such folder"):
        to_universal(tmp_path / "nosuch", target)
    path = source / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(
        CheckpointError, match=r"zero_pp_rank_1_mp_rank_00_optim_states.pt: it cannot be read"
    ):
        to_universal(source, target)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"the files of the ranks \[1\] are missing"):
        to_universal(source, target)
    (tmp_path / "x.pt").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r'x.pt: a file with "model" and "optimizer" is needed'):
        to_universal(tmp_path / "x.pt", target)
    assert not target.exists()


def test_the_commands(tmp_path):
    run_ranks(universal_ranks.saved, 2, with_options(config(2, 2), INT8), str(tmp_path))
    run = CliRunner().invoke
    for command, name in (("to-universal", "universal"), ("to-state-dict", "half.pt")):
        done = run(app, [command, str(tmp_path / "half"), str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        assert (tmp_path / name).exists()
        done = run(app, [command, str(tmp_path / "half"), str(tmp_path / name)])
        assert done.exit_code == 2
        assert "it is there already" in done.output


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    "zero",
    [
        {"offload_optimizer": {"device": "cpu"}},
        {"round_robin_gradients": True},
        {"sub_group_size": 5000},
    ],
    ids=str,
)
def test_with_offload_round_robin_and_sub_groups(stage, zero, tmp_path):
    assert_uninterrupted(resume(tmp_path, 3, 2, INT8, stages=(stage, stage), zero=zero), INT8)


def test_under_the_bf16_optimizer(tmp_path):
    more = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    found = resume(tmp_path, 3, 2, INT8, stages=(1, 1), bfloat16=True, **more)
    assert_uninterrupted(found, INT8, torch.bfloat16, master=torch.float32)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_param_groups_keep_their_options(stage, tmp_path):
    found = resume(tmp_path, 2, 3, INT8, stages=(stage, stage), groups=True)
    assert not any(isinstance(rank, str) for rank in found), found
    assert [decays for _, decays in found] == [[0.1, 0.0]] * 3
