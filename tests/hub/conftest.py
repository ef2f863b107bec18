import shutil
from pathlib import Path
from secrets import token_hex
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

from hub.checks import WEIGHTS
from optvq_hf.commands import publish, train
from optvq_hf.publishing import commits as publishing_hub
from training.runs import flags


@pytest.fixture(autouse=True)
def runs(fresh_run):
    """Tests here run commands."""


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


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A short run, with what `optvq train` leaves."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train.main(flags(folder, max_steps=5, save_every=0, ema_decay=0, eval_split="test[:40]"))
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy, to be changed."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def waits(backoff_waits, monkeypatch):
    monkeypatch.setattr(publishing_hub, "time", SimpleNamespace(sleep=backoff_waits.append))
    return backoff_waits


@pytest.fixture
def published(hub, alice, run):
    """A repository with the model, of a name of its own."""
    repo_id = f"alice/{token_hex(6)}"
    publish.main([str(run), repo_id])
    return repo_id


@pytest.fixture
def bob_reads(hub):
    """Within it, bob is logged in."""
    patch = pytest.MonkeyPatch()

    class Login:
        def __enter__(self):
            patch.setenv("HF_TOKEN", hub.add_user("bob"))

        def __exit__(self, *_):
            patch.undo()

    return Login()
