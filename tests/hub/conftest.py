from pathlib import Path
from secrets import token_hex

import pytest
from huggingface_hub import HfApi

from hub.checks import WEIGHTS


@pytest.fixture
def api() -> HfApi:
    return HfApi()


@pytest.fixture
def folder(tmp_path) -> Path:
    """One file that goes to LFS and two that do not."""
    path = tmp_path / "folder"
    (path / "sub").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "sub" / "notes.txt").write_text("notes")
    (path / "model.safetensors").write_bytes(WEIGHTS)
    return path


@pytest.fixture
def repo_id(alice, api) -> str:
    """A new model repository of alice."""
    return api.create_repo(f"alice/{token_hex(4)}").repo_id


@pytest.fixture
def uploaded(repo_id, folder, api) -> str:
    """The same with the folder in it."""
    api.upload_folder(repo_id=repo_id, folder_path=folder)
    return repo_id


@pytest.fixture
def bob(hub) -> str:
    return hub.add_user("bob")
