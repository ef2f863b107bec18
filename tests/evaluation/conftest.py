import pytest


@pytest.fixture(autouse=True)
def runs(fresh_run):
    """Tests here run commands."""
