import pytest


@pytest.fixture(autouse=True)
def no_run_before(fresh_accelerator):
    """Every test may be the first to run something."""
