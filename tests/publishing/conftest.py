import shutil
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def no_run_before(fresh_accelerator):
    """Every test may be the first to run something."""


@pytest.fixture
def folder(published_folder, tmp_path) -> Path:
    """A copy, to be changed."""
    return shutil.copytree(published_folder, tmp_path / "published")
