import pytest


@pytest.fixture(scope="session", autouse=True)
def operation(deepspeed_operation):
    """Every test of this folder starts DeepSpeed."""
