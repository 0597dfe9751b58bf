"""DeepSpeed's pipelines: each stage has an optimizer, and a tied weight has a copy on several stages."""

import pipeline_ranks
import pytest
import torch
from kept_ranks import Kept

BF16 = {"bf16": {"enabled": True}}
BF16_OPTIMIZER = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
WRAPPERS = {
    "float32": (0, {}),
    "bf16": (0, BF16),
    "stage 1": (1, {}),
    "stage 1, bf16": (1, BF16),
    "stage 1, bf16, BF16_Optimizer": (1, BF16_OPTIMIZER),
}
# DeepSpeed looks at no gradient before it steps.
UNCHECKED = {
    "stage 1, unchecked": (1, {"zero_optimization": {"stage": 1, "compute_grad_norm": False}}),
    "stage 1, bf16, unchecked": (1, {"bf16": {"enabled": True, "check_grad_overflow": False}}),
}
EMBEDDING = "tied_modules.embedding.weight"


@pytest.fixture(scope="module")
def run_ranks():
    """Ranks that the cases here share, and no others: DeepSpeed's groups are a pipeline's from here on."""
    kept = Kept()
    yield kept.run
    kept.close()


def config(wrapper, replicas=1, accumulate=1, **options):
    stage, change = (WRAPPERS | UNCHECKED)[wrapper]
    return {
        "train_batch_size": pipeline_ranks.SAMPLES,
        "gradient_accumulation_steps": accumulate,
        "train_micro_batch_size_per_gpu": pipeline_ranks.SAMPLES // (replicas * accumulate),
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "optimizer": {
            "type": "NovoGrad",
            "params": {"lr": 0.05, "weight_decay": 0.01, "preset": "paper", **options},
        },
        **change,
    }


@pytest.mark.parametrize(
    ("wrapper", "momentum_dtype"),
    [*((wrapper, "int4") for wrapper in WRAPPERS), ("float32", "int8"), ("float32", "bfloat16")],
)
def test_copies_of_a_tied_weight_stay_the_same_and_are_those_of_one_process(
    run_ranks, wrapper, momentum_dtype
):
    options = {"momentum_dtype": momentum_dtype, "preset": "adamw"}
    ds = config(wrapper, **options)
    first, last = run_ranks(pipeline_ranks.trained, 2, ds, 2)
    assert torch.equal(first[EMBEDDING], last[EMBEDDING])
    (alone,) = run_ranks(pipeline_ranks.trained, 1, ds, 1)
    assert {**first, **last}.keys() == alone.keys()
    for name, weight in {**first, **last}.items():
        assert torch.equal(weight, alone[name]), name


@pytest.mark.parametrize("wrapper", ["float32", "stage 1"])
def test_copies_stay_the_same_with_replicas_and_accumulation(run_ranks, wrapper):
    ds = config(wrapper, replicas=2, accumulate=2, momentum_dtype="int4")
    ranks = run_ranks(pipeline_ranks.trained, 4, ds, 2)
    for rank in ranks[1:]:
        assert torch.equal(rank[EMBEDDING], ranks[0][EMBEDDING])


@pytest.mark.parametrize("wrapper", [*WRAPPERS, *UNCHECKED])
def test_an_infinity_on_one_stage_changes_nothing_on_any_stage(run_ranks, wrapper):
    assert run_ranks(pipeline_ranks.infinite_on_the_last_stage, 2, config(wrapper)) == [(False, True)] * 2


@pytest.mark.parametrize("wrapper", [wrapper for wrapper in WRAPPERS if wrapper != "bf16"])
def test_a_checkpoint_resumes_to_the_same_bits(run_ranks, wrapper, tmp_path):
    ds = config(wrapper, momentum_dtype="int4")
    assert run_ranks(pipeline_ranks.resumed, 2, ds, str(tmp_path)) == [True, True]


@pytest.mark.parametrize(
    ("wrapper", "saved", "loaded", "says"),
    [
        (
            "stage 1",
            1,
            2,
            "rank 1: global_step1 has no model-parallel rank 1: it was saved with fewer stages",
        ),
        ("stage 1", 2, 1, "is not in global_step1"),
        ("bf16", 2, 2, "DeepSpeed saves the state of BF16_Optimizer at stage 0 and cannot load it"),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded_is_one_error_on_every_stage(
    run_ranks, wrapper, saved, loaded, says, tmp_path
):
    ds = config(wrapper)
    run_ranks(pipeline_ranks.saved, saved, ds, saved, str(tmp_path))
    errors = run_ranks(pipeline_ranks.error_of_loading, loaded, ds, loaded, str(tmp_path))
    assert len(set(errors)) == 1
    assert says in errors[0]
