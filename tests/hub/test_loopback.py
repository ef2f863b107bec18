"""The loopback Hub does what the clients of the real one expect."""

import hashlib
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import datasets
import pytest
import torch
from huggingface_hub import CommitOperationDelete, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModel

from folders import contents
from hub.checks import WEIGHTS, raises_status, sent
from optvq_hf import OptVQConfig, OptVQModel


pytestmark = pytest.mark.hub


def test_create_and_delete(hub, alice, api):
    url = api.create_repo("alice/created", private=True)
    assert (url.repo_id, url.repo_type, str(url)) == ("alice/created", "model", f"{hub.url}/alice/created")
    assert hub.repository("alice/created").private
    with raises_status(409):
        api.create_repo("alice/created")
    assert api.create_repo("alice/created", exist_ok=True) == url
    api.update_repo_settings("alice/created", private=False)
    assert not hub.repository("alice/created").private
    assert api.create_repo("alice/created", repo_type="dataset") == f"{hub.url}/datasets/alice/created"
    api.delete_repo("alice/created")
    with pytest.raises(KeyError):
        hub.repository("alice/created")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("alice/created")
    assert hub.repository("alice/created", type="dataset").files() == {}


def test_upload_in_one_commit(hub, repo_id, folder, api):
    info = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="first")
    repository = hub.repository(repo_id)
    assert repository.files() == contents(folder)
    assert [commit.message for commit in repository.commits] == ["initial commit", "first"]
    assert repository.refs == {"main": info.oid}
    assert repository.commits[-1].lfs == {"model.safetensors"}
    assert len(sent(hub, "PUT", ".git/lfs/")) == 1
    api.upload_folder(repo_id=repo_id, folder_path=folder)
    assert len(repository.commits) == 2, "nothing has changed"
    api.upload_file(repo_id=repo_id, path_or_fileobj=WEIGHTS, path_in_repo="copy.safetensors")
    assert len(repository.commits) == 3
    assert len(sent(hub, "PUT", ".git/lfs/")) == 1, "the object was there already"


def test_deletions(hub, uploaded, api):
    operations = [CommitOperationDelete("sub/"), CommitOperationDelete("config.json")]
    api.create_commit(uploaded, operations, commit_message="delete")
    assert list(hub.repository(uploaded).files()) == ["model.safetensors"]
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        api.delete_file("config.json", uploaded)


def test_download(hub, uploaded, folder, api):
    assert contents(snapshot_download(uploaded)) == contents(folder)
    first = api.model_info(uploaded).sha
    api.upload_file(repo_id=uploaded, path_or_fileobj=b'{"new": 1}', path_in_repo="config.json")
    assert Path(hf_hub_download(uploaded, "config.json")).read_bytes() == b'{"new": 1}'
    assert Path(hf_hub_download(uploaded, "config.json", revision=first)).read_bytes() == b"{}"
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(uploaded, "missing.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(uploaded, "config.json", revision="missing")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("alice/missing", "config.json")


def test_listings(hub, uploaded, folder, api):
    entries = {entry.path: entry for entry in api.list_repo_tree(uploaded, recursive=True, expand=True)}
    assert entries.keys() == contents(folder).keys() | {"sub"}
    assert entries["model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert entries["config.json"].last_commit.oid == hub.repository(uploaded).commits[-1].oid
    assert [entry.path for entry in api.list_repo_tree(uploaded, "sub")] == ["sub/notes.txt"]
    assert sorted(api.list_repo_files(uploaded)) == sorted(contents(folder))
    assert [entry.path for entry in api.get_paths_info(uploaded, ["sub", "missing", "config.json"])] == [
        "sub",
        "config.json",
    ]
    sizes = {sibling.rfilename: sibling.size for sibling in api.model_info(uploaded, files_metadata=True).siblings}
    assert sizes == {path: len(content) for path, content in contents(folder).items()}
    assert [commit.title for commit in api.list_repo_commits(uploaded)] == [
        "Upload folder using huggingface_hub",
        "initial commit",
    ]


@pytest.mark.parametrize(
    ("wanted", "status", "part"),
    [
        ("bytes=0-9", 206, WEIGHTS[:10]),
        ("bytes=102390-", 206, WEIGHTS[102390:]),
        ("bytes=-7", 206, WEIGHTS[-7:]),
        ("bytes=10-999999", 206, WEIGHTS[10:]),
        ("bytes=102400-", 416, b""),
    ],
)
def test_range(hub, uploaded, wanted, status, part):
    connection = HTTPConnection(urlsplit(hub.url).netloc, timeout=10)
    connection.request("GET", f"/{uploaded}/resolve/main/model.safetensors", headers={"Range": wanted})
    response = connection.getresponse()
    assert (response.status, response.read()) == (status, part)
    assert response.headers["Content-Range"].endswith("/102400")
    connection.close()


def test_branches_and_tags(hub, uploaded, folder, api):
    first = api.model_info(uploaded).sha
    api.create_branch(uploaded, branch="feature/x", revision=first)
    with raises_status(409):
        api.create_branch(uploaded, branch="feature/x")
    api.create_tag(uploaded, tag="v1", tag_message="release")
    api.upload_file(repo_id=uploaded, path_or_fileobj=b"x", path_in_repo="new.txt", revision="feature/x")
    repository = hub.repository(uploaded)
    assert repository.refs == {"main": first, "feature/x": repository.commits[-1].oid, "v1": first}
    assert repository.files("feature/x").keys() - repository.files().keys() == {"new.txt"}
    assert contents(snapshot_download(uploaded, revision="v1")) == contents(folder)
    refs = api.list_repo_refs(uploaded)
    assert [ref.name for ref in refs.branches] == ["main", "feature/x"] and [ref.name for ref in refs.tags] == ["v1"]
    api.delete_branch(uploaded, branch="feature/x")
    api.delete_tag(uploaded, tag="v1")
    assert repository.refs == {"main": first}
    with pytest.raises(RevisionNotFoundError):
        api.create_branch(uploaded, branch="y", revision="missing")
    assert "y" not in repository.refs


def test_pull_request(hub, uploaded, api, bob):
    """Everybody who sees a repository may propose changes to it."""
    repository = hub.repository(uploaded)
    before = repository.files()
    info = api.upload_file(
        repo_id=uploaded, path_or_fileobj=b"weights", path_in_repo="b.bin", create_pr=True, token=bob
    )
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    assert repository.files() == before and repository.files("refs/pr/1") == {**before, "b.bin": b"weights"}
    api.upload_file(repo_id=uploaded, path_or_fileobj=b"2", path_in_repo="c.txt", revision="refs/pr/1", token=bob)
    assert repository.files("refs/pr/1").keys() == {*before, "b.bin", "c.txt"}
    assert Path(hf_hub_download(uploaded, "c.txt", revision="refs/pr/1")).read_bytes() == b"2"
    assert api.upload_file(repo_id=uploaded, path_or_fileobj=b"3", path_in_repo="d", create_pr=True).pr_num == 2


def test_private(hub, uploaded, api, bob):
    hub.repository(uploaded).private = True
    for token in (bob, False):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(uploaded, token=token)
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(uploaded, "config.json", token=token)
        with pytest.raises(RepositoryNotFoundError):
            api.upload_file(repo_id=uploaded, path_or_fileobj=b"", path_in_repo="x", token=token)
    assert api.model_info(uploaded).private


def test_gated(hub, uploaded, api, bob):
    hub.repository(uploaded).gated = True
    for token in (bob, False):
        assert api.model_info(uploaded, token=token).gated == "auto"
        with pytest.raises(GatedRepoError):
            hf_hub_download(uploaded, "config.json", token=token)
    assert sent(hub, "HEAD", "/resolve/") == [403, 401]
    assert Path(hf_hub_download(uploaded, "config.json")).read_bytes() == b"{}"


def test_tokens(hub, uploaded, api, bob):
    reader = hub.add_user("alice", write=False)
    commits = list(hub.repository(uploaded).commits)
    assert api.whoami(bob)["name"] == "bob" and api.whoami(reader)["auth"]["accessToken"]["role"] == "read"
    assert api.model_info(uploaded, token=False).id == uploaded
    for token, status in [("hf_wrong", 401), (False, 401), (bob, 403), (reader, 403)]:
        with raises_status(status):
            api.upload_file(repo_id=uploaded, path_or_fileobj=b"", path_in_repo="x", token=token)
        with raises_status(status):
            api.create_repo("alice/other", token=token)
        with raises_status(status):
            api.create_branch(uploaded, branch="x", token=token)
        with raises_status(status):
            api.delete_repo(uploaded, token=token)
    with raises_status(401):
        api.model_info(uploaded, token="hf_wrong")
    with raises_status(401):
        api.whoami("hf_wrong")
    assert hub.repository(uploaded).commits == commits and list(hub.repository(uploaded).refs) == ["main"]


def test_stale_parent(hub, uploaded, api):
    stale = hub.repository(uploaded).commits[0].oid
    before = hub.repository(uploaded).files()
    with raises_status(412):
        api.upload_file(repo_id=uploaded, path_or_fileobj=b"", path_in_repo="x", parent_commit=stale)
    assert hub.repository(uploaded).files() == before
    (refused,) = hub.refused
    assert "412" in refused and stale in refused
    hub.refused.clear()


def test_dataset(hub, alice):
    rows = {"label": list(range(40)), "text": [f"row {index}" for index in range(40)]}
    dataset = datasets.Dataset.from_dict(rows)
    dataset.push_to_hub("alice/rows", num_shards=4)
    repository = hub.repository("alice/rows", type="dataset")
    assert len([path for path in repository.files() if path.endswith(".parquet")]) == 4
    assert datasets.load_dataset("alice/rows", split="train").to_dict() == rows
    streamed = datasets.load_dataset("alice/rows", split="train", streaming=True)
    assert streamed.num_shards == 4 and list(streamed) == list(dataset)
    assert 206 in sent(hub, "GET", "/resolve/")


def test_model(hub, alice):
    torch.manual_seed(0)
    sizes = {"image_size": 32, "codebook_size": 128, "codebook_dim": 8, "num_codebook_heads": 2}
    model = OptVQModel(OptVQConfig(backbone="plain_cnn", **sizes)).eval()
    model.push_to_hub("alice/tokenizer", private=True)
    assert {"config.json", "model.safetensors"} <= hub.repository("alice/tokenizer").files().keys()
    loaded = AutoModel.from_pretrained("alice/tokenizer")
    assert type(loaded) is OptVQModel
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
