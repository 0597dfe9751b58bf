"""DeepSpeed's pipelines: each stage has an optimizer, and a tied weight has a copy on several stages."""

import pipeline_ranks
import pytest
import torch
from kept_ranks import run_ranks

BF16 = {"bf16": {"enabled": True}}
BF16_OPTIMIZER = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
WRAPPERS = {
    "float32": (0, {}),
    "bf16": (0, BF16),
    "stage 1": (1, {}),
    "stage 1, bf16": (1, BF16),
    "stage 1, bf16, BF16_Optimizer": (1, BF16_OPTIMIZER),
}
EMBEDDING = "tied_modules.embedding.weight"


def config(wrapper, replicas=1, accumulate=1, **options):
    stage, change = WRAPPERS[wrapper]
    return {
        "train_batch_size": pipeline_ranks.SAMPLES,
        "gradient_accumulation_steps": accumulate,
        "train_micro_batch_size_per_gpu": pipeline_ranks.SAMPLES // (replicas * accumulate),
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "NovoGrad", "params": {"lr": 0.05, "weight_decay": 0.01, **options}},
        **change,
    }


@pytest.mark.parametrize(
    ("wrapper", "momentum_dtype"),
    [*((wrapper, "int4") for wrapper in WRAPPERS), ("float32", "int8"), ("float32", "bfloat16")],
)
def test_copies_of_a_tied_weight_stay_the_same_and_are_those_of_one_process(wrapper, momentum_dtype):
    options = {"momentum_dtype": momentum_dtype, "preset": "adamw"}
    ds = config(wrapper, **options)
    first, last = run_ranks(pipeline_ranks.trained, 2, ds, 2)
    assert torch.equal(first[EMBEDDING], last[EMBEDDING])
    (alone,) = run_ranks(pipeline_ranks.trained, 1, ds, 1)
    assert {**first, **last}.keys() == alone.keys()
    for name, weight in {**first, **last}.items():
        assert torch.equal(weight, alone[name]), name


@pytest.mark.parametrize("wrapper", ["float32", "stage 1"])
def test_copies_stay_the_same_with_replicas_and_accumulation(wrapper):
    ds = config(wrapper, replicas=2, accumulate=2, momentum_dtype="int4")
    ranks = run_ranks(pipeline_ranks.trained, 4, ds, 2)
    for rank in ranks[1:]:
        assert torch.equal(rank[EMBEDDING], ranks[0][EMBEDDING])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_an_infinity_on_one_stage_changes_nothing_on_any_stage(wrapper):
    assert run_ranks(pipeline_ranks.infinite_on_the_last_stage, 2, config(wrapper)) == [(False, True)] * 2
