"""Faults, tried for real: each ends in the uninterrupted training, or in one error on every rank."""

import random
import shutil
from pathlib import Path

import fault_ranks
import pytest
import tools_ranks
import torch
from kept_ranks import run_ranks
from test_deepspeed_tools import ds
from test_latest_good import latest_good

from novoscale import NovoGrad
from novoscale.tools.local_ranks import RankError
from novoscale.tools.local_ranks import run_ranks as run_new_ranks

INT4 = {"momentum_dtype": "int4"}
TRAININGS = {
    "stage 1": (1, INT4),
    "stage 2, offload": (2, {"momentum_dtype": "int8", "preset": "adamw"}),
    "stage 3": (3, {"momentum_dtype": "int8"}),
    "FSDP2": (None, INT4),
}


def given(name):
    stage, options = TRAININGS[name]
    if stage is None:
        return {"fsdp2": {"lr": 0.05, "weight_decay": 0.1, **options}}
    zero = {"offload_optimizer": {"device": "cpu"}} if "offload" in name else {}
    return ds(stage, 2, options, **zero)


def same(ranks, others):
    pieces = ((a, b) for x, y in zip(ranks, others, strict=True) for a, b in zip(x, y, strict=True))
    return all(a[:2] == b[:2] and torch.equal(a[2], b[2]) and torch.equal(a[3], b[3]) for a, b in pieces)


@pytest.mark.parametrize("phase", ["step", "save"])
@pytest.mark.parametrize("name", TRAININGS)
def test_killed_training_goes_on_from_the_last_good_checkpoint(name, phase, tmp_path):
    """A rank is killed at a random moment of its fourth to sixth step, or of its second or third save."""
    case = given(name)
    (tmp_path / "whole").mkdir()
    whole = run_new_ranks(fault_ranks.training, 2, case, str(tmp_path / "whole"), quiet=True)
    numbers = random.Random(f"{name} {phase}")
    at = numbers.choice([3, 4, 5] if phase == "step" else [4, 6])
    longest = max(whole[0][1][phase])
    rank, delay = numbers.randrange(2), numbers.uniform(0, longest)
    folder = tmp_path / "killed"
    folder.mkdir()
    kill = (rank, phase, at, delay)
    with pytest.raises(RankError, match=f"rank {rank} of 2 died: SIGKILL"):
        run_new_ranks(fault_ranks.training, 2, case, str(folder), None, kill, timeout=60, quiet=True)
    code, good, _ = latest_good(folder)
    assert code == 0
    assert int(good.removeprefix("step")) >= {3: 2, 4: 4 if phase == "step" else 2, 5: 4, 6: 4}[at]
    resumed = run_new_ranks(fault_ranks.training, 2, case, str(folder), good, quiet=True)
    assert same([pieces for pieces, _ in resumed], [pieces for pieces, _ in whole])


@pytest.mark.parametrize("limit", [100, 150_000])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_rank_that_cannot_write_ends_saving_on_every_rank(stage, rank, limit, tmp_path):
    results = run_ranks(fault_ranks.disk_full, 2, ds(stage, 2, INT4), str(tmp_path), rank, limit, timeout=60)
    for error, latest, again in results:
        assert error == results[0][0]
        assert error.startswith(f"CheckpointError: save_checkpoint('{tmp_path}', 'step2'): rank {rank}: ")
        assert "cannot be written" in error
        assert latest == "step1"
        assert again
    assert latest_good(tmp_path)[:2] == (0, "step3")


@pytest.mark.parametrize("rank", [0, 1])
def test_distributed_checkpoint_that_cannot_be_written(rank, tmp_path):
    for error, good in run_ranks(
        fault_ranks.distributed_disk_full, 2, str(tmp_path), rank, 100_000, timeout=60
    ):
        assert f"CheckpointException ranks:dict_keys([{rank}])" in error
        assert good
    code, good, said = latest_good(tmp_path)
    assert (code, good) == (0, "step1")
    assert "step2: .metadata is missing" in said


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_checkpoint_that_is_not_complete_is_refused_on_every_rank(stage, tmp_path):
    """By itself DeepSpeed raises on the rank whose file it is: the other goes on, or waits for it."""
    case = ds(stage, 2, INT4)
    run_ranks(fault_ranks.saved_once, 2, case, str(tmp_path / "good"))
    for number, name in enumerate(sorted(file.name for file in (tmp_path / "good" / "step1").iterdir())):
        for how in ("missing", "truncated"):
            folder = shutil.copytree(tmp_path / "good", tmp_path / f"{how} {number}")
            file = folder / "step1" / name
            if how == "missing":
                file.unlink()
            else:
                file.write_bytes(file.read_bytes()[:-100])
            results = run_ranks(fault_ranks.loading_error, 2, case, str(folder), None, timeout=60)
            for error, unchanged in results:
                assert error.startswith("CheckpointError: load_checkpoint(")
                assert f"{name} is {how}" in error or "says how many ranks" in error
                assert "novoscale latest-good" in error
                assert unchanged
    for error, unchanged in run_ranks(fault_ranks.loading_error, 2, case, str(tmp_path / "good"), "step7"):
        assert error.startswith("CheckpointError")
        assert "there is no folder" in error
        assert unchanged


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("change", ["shape", "name"])
def test_checkpoint_of_another_model_is_refused_on_every_rank(stage, change, tmp_path):
    case = ds(stage, 2, INT4)
    run_ranks(fault_ranks.saved_once, 2, case, str(tmp_path))
    other = dict(fault_ranks.SHAPES)
    if change == "shape":
        other["wide"] = (310, 1300)
    else:
        other["renamed"] = other.pop("few")
    says = {
        "shape": "wide has the shape (300, 1300) in step1 and (310, 1300) here",
        "name": "renamed is not in step1",
    }
    for error, unchanged in run_ranks(fault_ranks.loading_error, 2, case, str(tmp_path), None, other):
        assert error.startswith("CheckpointError: ")
        assert says[change] in error
        assert unchanged


@pytest.mark.parametrize(("saved", "here"), [(0, 1), (1, 0), (1, 3), (3, 2), (3, 0)])
def test_checkpoint_of_another_stage_is_refused_on_every_rank(saved, here, tmp_path):
    """By itself DeepSpeed raises errors that do not say so."""
    run_ranks(fault_ranks.saved_once, 2, ds(saved, 2, INT4), str(tmp_path))
    for error, unchanged in run_ranks(fault_ranks.loading_error, 2, ds(here, 2, INT4), str(tmp_path), None):
        assert f"saved under stage {saved} of ZeRO, and this training is of stage {here}" in error
        assert unchanged


@pytest.mark.parametrize("micro", [0, 1, 2])
@pytest.mark.parametrize(("stage", "rank"), [(1, 0), (2, 2), (3, 1)])
def test_nan_on_one_rank_in_any_micro_batch_changes_nothing(stage, rank, micro):
    case = ds(stage, 3, INT4, gradient_accumulation_steps=None) | {}
    case["zero_optimization"].pop("gradient_accumulation_steps")
    case |= {"train_batch_size": 9, "gradient_accumulation_steps": 3, "train_micro_batch_size_per_gpu": 1}
    for found in run_ranks(fault_ranks.nan_in_a_micro_batch, 3, case, rank, micro):
        assert found == [True, True]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", 0.1),
        ("betas", [0.5, 0.9]),
        ("weight_decay", 0.3),
        ("momentum_dtype", "int8"),
        ("seed", 3),
        ("granularity", "row"),
        ("preset", "adamw"),
        ("norm_type", 0),
    ],
)
@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_with_other_options_are_told_so(stage, option, value):
    results = run_ranks(fault_ranks.options_differ, 2, ds(stage, 2, INT4), option, value, timeout=60)
    if option in ("granularity", "preset", "norm_type"):
        assert all("Error: the ranks have different" in error for error in results)
        return
    for error in results:
        assert error.startswith(
            f"ValueError: the ranks have different options of NovoGrad; this rank has {option}="
        )
    assert results[0] != results[1]


# ---- nothing is unpickled that need not be -----------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"preset": "adamw"}, {"granularity": "row"}], ids=str)
@pytest.mark.parametrize("momentum_dtype", ["float32", "bfloat16", "int8", "int4"])
def test_state_dict_loads_with_weights_only(momentum_dtype, options, tmp_path):
    p = torch.nn.Parameter(torch.randn(70, 130))
    optimizer = NovoGrad([("p", p)], momentum_dtype=momentum_dtype, **{"preset": "paper", **options})
    p.grad = torch.randn_like(p)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    other = NovoGrad([("p", p)], momentum_dtype=momentum_dtype, **{"preset": "paper", **options})
    other.load_state_dict(loaded)
    for key, value in optimizer.state[p].items():
        assert torch.equal(other.state[p][key], value)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_optimizer_state_of_deepspeed_is_tensors_and_plain_values(stage, tmp_path):
    """What NovoGrad adds to DeepSpeed's files; they themselves are unpickled by DeepSpeed."""
    for found in run_ranks(fault_ranks.kinds_of_state, 2, ds(stage, 2, INT4)):
        assert set(found) <= {"Tensor", "dict", "list", "tuple", "str", "int", "float", "bool", "NoneType"}


def test_distributed_checkpoint_loads_with_weights_only(tmp_path):
    """Its tensors; .metadata is a pickle of torch's own, and is read by torch."""
    run_ranks(tools_ranks.saved_distributed, 2, str(tmp_path), 1)
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(tmp_path / "step1", tmp_path / "one.pt")
    loaded = torch.load(tmp_path / "one.pt", weights_only=True)
    assert {"model", "optimizer"} == set(loaded)
    assert Path(tmp_path / "one.pt").stat().st_size > 0
