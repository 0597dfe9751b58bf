"""The rows of docs/sharding.md for meshes and parallel models: measured, or why not."""

import pytest

from benchmarks import sharding


@pytest.mark.usefixtures("deepspeed_operation")
@pytest.mark.parametrize(
    "name", ["ZeroRedundancyOptimizer", "tensor parallel, sequence parallel", "stage 1, fp16"]
)
def test_a_parallel_model_is_measured_against_its_bound(name):
    row = sharding.measure_parallel(name, 2)
    assert 0 < row["worst"] <= row["bound"] == 2e-5
    assert row["passed"]


def test_a_mesh_that_does_not_fit_the_ranks_says_what_it_needs():
    assert sharding.measure_parallel("HSDP, 2 x 2", 3) == {
        "worst": None,
        "bound": 2e-5,
        "why": "needs 4 ranks",
    }


def test_the_table_has_a_row_for_each_configuration_and_optimizer():
    found = {"worst": 1e-7, "bound": 2e-5}
    report = {
        "rows": [{"configuration": "stage 1", "ranks": n, **found} for n in (2, 3, 4)],
        "parallel": [{"configuration": "HSDP", "ranks": n, **found} for n in (2, 3, 4)],
        "forms": [
            {"form": "int8", "configuration": "stage 1", "different": 0, **found},
            {"form": "int8", "configuration": "HSDP", "different": 7},
        ],
        "others": [{"optimizer": "CAME", "worst": None, "why": "not installed"}],
    }
    table = sharding.markdown(report)
    assert "| stage 1 | 1.0e-07 | 1.0e-07 | 1.0e-07 | 2.0e-05 |" in table
    assert "| HSDP | 1.0e-07 |" in table
    assert "| int8 | = 1.0e-07 of 2.0e-05 | 7 differ |" in table
    assert "| CAME | not installed |" in table
