"""Faults on demand, and what huggingface_hub makes of them."""

from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from httpx2 import RemoteProtocolError
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError

from folders import contents
from hub.checks import WEIGHTS, call, raises_status, sent
from hub.loopback import LoopbackHub


pytestmark = pytest.mark.hub


@pytest.mark.parametrize(("kind", "wait"), [("500", 1), ("429", 2)])
@pytest.mark.parametrize("on", ["/preupload/", "/objects/batch", ".git/lfs/"])
def test_error_in_upload(hub, repo_id, folder, api, backoff_waits, kind, wait, on):
    """The client tries again by itself, except with a commit."""
    hub.fail(kind, on=on)
    api.upload_folder(repo_id=repo_id, folder_path=folder)
    assert backoff_waits == [wait] and hub.repository(repo_id).files() == contents(folder)
    hub.fail(kind, on="/commit/")
    with raises_status(int(kind)):
        api.upload_file(repo_id=repo_id, path_or_fileobj=b"", path_in_repo="x")
    assert hub.repository(repo_id).files() == contents(folder) and sent(hub, "POST", "/commit/") == [200, int(kind)]


@pytest.mark.parametrize("kind", ["500", "429"])
def test_error_in_download(hub, uploaded, backoff_waits, kind):
    hub.fail(kind, on="/resolve/")
    assert Path(hf_hub_download(uploaded, "model.safetensors")).read_bytes() == WEIGHTS
    assert sent(hub, "HEAD", "/resolve/") == [int(kind), 200]
    hub.fail(kind, times=7, on="/resolve/")
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(uploaded, "config.json")


def test_connection_lost_in_upload(hub, repo_id, folder, api, backoff_waits):
    hub.fail("drop", times=6, on=".git/lfs/")
    with pytest.raises(RuntimeError, match="model.safetensors") as error:
        api.upload_folder(repo_id=repo_id, folder_path=folder)
    assert isinstance(error.value.__cause__, RemoteProtocolError) and backoff_waits == [1, 2, 4, 8, 8]
    assert hub.repository(repo_id).lfs_objects == {} and hub.repository(repo_id).files() == {}
    hub.fail("drop", on=".git/lfs/")
    api.upload_folder(repo_id=repo_id, folder_path=folder)
    assert hub.repository(repo_id).files() == contents(folder)


@pytest.mark.parametrize(("kind", "commits"), [("drop", 1), ("drop-after", 2)])
def test_connection_lost_in_commit(hub, repo_id, api, kind, commits):
    hub.fail(kind)
    with pytest.raises(RemoteProtocolError):
        api.upload_file(repo_id=repo_id, path_or_fileobj=b"x" * 100_000, path_in_repo="x.txt")
    assert len(hub.repository(repo_id).commits) == commits
    api.upload_file(repo_id=repo_id, path_or_fileobj=b"x" * 100_000, path_in_repo="x.txt")
    assert len(hub.repository(repo_id).commits) == 2, "after a commit that was carried out nothing is left to do"


def test_truncated_download(hub, uploaded, backoff_waits):
    hub.fail("truncate", times=6)
    with pytest.raises(RemoteProtocolError):
        hf_hub_download(uploaded, "model.safetensors")
    cache = Path(constants.HF_HUB_CACHE) / f"models--{uploaded.replace('/', '--')}"
    assert list(cache.glob("snapshots/*/*")) == []
    assert [path for path in cache.glob("blobs/*") if path.suffix != ".incomplete"] == []
    hub.fail("truncate")
    assert Path(hf_hub_download(uploaded, "model.safetensors")).read_bytes() == WEIGHTS
    assert backoff_waits == [1] * 6


def test_stop():
    other = LoopbackHub()
    connection = HTTPConnection(urlsplit(other.url).netloc, timeout=10)
    connection.request("GET", "/api/whoami-v2")
    assert connection.getresponse().read()
    other.stop()
    with pytest.raises(ConnectionError):
        connection.request("GET", "/api/whoami-v2")
        connection.getresponse()
    connection.close()
    with pytest.raises(ConnectionRefusedError):
        call(other, "GET", "/api/whoami-v2")


def test_unknown_fault(hub):
    with pytest.raises(ValueError, match="no such fault: slow"):
        hub.fail("slow")
