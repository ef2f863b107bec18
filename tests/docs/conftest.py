from pathlib import Path

import pytest
from PIL import Image


REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def runs(fresh_run):
    """Tests here run commands."""


@pytest.fixture
def workplace(tmp_path, trained_folder, monkeypatch) -> Path:
    """A folder as the reader's: a trained quickstart, a picture, images, and the models and pictures of the checkout."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(trained_folder)
    Image.new("RGB", (50, 40), (200, 100, 0)).save(tmp_path / "picture.png")
    (tmp_path / "path" / "to" / "images").mkdir(parents=True)
    for number in range(20):
        Image.new("RGB", (40, 36), (number * 10, 0, 50)).save(tmp_path / "path" / "to" / "images" / f"{number}.png")
    (tmp_path / "docs").mkdir()
    for name in ("model_cards", "docs/images"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path
