import shutil
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def runs(fresh_run):
    """Tests here run commands."""


@pytest.fixture
def folder(published_folder, tmp_path) -> Path:
    """A copy, to be changed."""
    return shutil.copytree(published_folder, tmp_path / "published")
