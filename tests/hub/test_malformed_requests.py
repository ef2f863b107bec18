"""The loopback Hub refuses what a correct client does not send, and changes nothing then."""

import base64
import hashlib
import json

import pytest

from hub.checks import WEIGHTS, call


pytestmark = pytest.mark.hub


def announce(hub, repo_id, token, content) -> tuple[str, str]:
    """Asks for the upload of an LFS object: its id and the path to upload to."""
    oid = hashlib.sha256(content).hexdigest()
    batch = {"operation": "upload", "transfers": ["basic"], "hash_algo": "sha256"}
    batch["objects"] = [{"oid": oid, "size": len(content)}]
    status, answer = call(hub, "POST", f"/{repo_id}.git/info/lfs/objects/batch", batch, token)
    assert status == 200
    return oid, answer["objects"][0]["actions"]["upload"]["href"].removeprefix(hub.url)


def test_damaged_lfs_object(hub, repo_id, alice):
    oid, path = announce(hub, repo_id, alice, b"right")
    for method_path, body in [(path, b"wrong"), (path, b"right, but longer"), (path.split("?")[0], b"right")]:
        assert call(hub, "PUT", method_path, body)[0] in (400, 403)
    assert hub.repository(repo_id).lfs_objects == {} and len(hub.refused) == 3
    assert call(hub, "PUT", path, b"right")[0] == 200
    assert hub.repository(repo_id).lfs_objects == {oid: b"right"}
    hub.refused.clear()


def line(key, **value) -> bytes:
    return json.dumps({"key": key, "value": value}).encode() + b"\n"


HEADER = line("header", summary="a commit", description="")
FILE = line("file", path="a.txt", content=base64.b64encode(b"a").decode(), encoding="base64")
STORED = {"algo": "sha256", "oid": hashlib.sha256(WEIGHTS).hexdigest()}
MALFORMED = {
    "empty": b"",
    "not JSON": HEADER + FILE + b"{",
    "not an object": HEADER + FILE + b"[]",
    "no header": FILE,
    "late header": FILE + HEADER,
    "two headers": HEADER + HEADER + FILE,
    "header only": HEADER,
    "no message": line("header", summary="", description="") + FILE,
    "unknown header": line("header", summary="a", description="", author="b") + FILE,
    "unknown key": HEADER + FILE + line("copyFile", path="b"),
    "missing key": HEADER + FILE + line("file", path="b", encoding="base64"),
    "wrong type": HEADER + FILE + line("deletedFile", path=1),
    "bad base64": HEADER + FILE + line("file", path="b", content="?", encoding="base64"),
    "encoding": HEADER + FILE + line("file", path="b", content="", encoding="utf-8"),
    "path": HEADER + FILE + line("file", path="../b", content="", encoding="base64"),
    "file and folder": HEADER + FILE + line("file", path="a.txt/b", content="", encoding="base64"),
    "never uploaded": HEADER + FILE + line("lfsFile", path="b", algo="sha256", oid="0" * 64, size=1),
    "not a SHA-256": HEADER + FILE + line("lfsFile", path="b", algo="sha256", oid="0", size=1),
    "size": HEADER + FILE + line("lfsFile", path="b", size=1, **STORED),
    "algorithm": HEADER + FILE + line("lfsFile", path="b", size=len(WEIGHTS), **{**STORED, "algo": "md5"}),
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
def test_malformed_commit(hub, uploaded, alice, body):
    commits = list(hub.repository(uploaded).commits)
    status, answer = call(hub, "POST", f"/api/models/{uploaded}/commit/main", body, alice)
    assert status == 400 and answer["error"] in hub.refused[0] and len(hub.refused) == 1
    assert hub.repository(uploaded).commits == commits
    hub.refused.clear()


def test_correct_commit(hub, uploaded, alice):
    """The lines that the malformed commits consist of are right by themselves."""
    body = HEADER + FILE + line("lfsFile", path="b", size=len(WEIGHTS), **STORED) + line("deletedFolder", path="sub/")
    assert call(hub, "POST", f"/api/models/{uploaded}/commit/main", body, alice)[0] == 200
    files = hub.repository(uploaded).files()
    assert files == {"a.txt": b"a", "b": WEIGHTS, "config.json": b"{}", "model.safetensors": WEIGHTS}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/api/unknown", b"", 404),
        ("PATCH", "/api/models/{id}", b"", 404),
        ("POST", "/api/repos/create", {"name": "x"}, 400),
        ("POST", "/api/repos/create", {"name": "x", "organization": None, "color": 1}, 400),
        ("POST", "/api/repos/create", {"name": "x", "organization": None, "type": "space"}, 400),
        ("PUT", "/api/models/{id}/settings", {"visibility": "secret"}, 400),
        ("POST", "/api/models/{id}/branch/b", {"start": "main"}, 400),
        ("POST", "/api/models/{id}/tag/main", b"tag", 400),
        ("POST", "/api/models/{id}/preupload/main", {"files": [{"path": "a", "sample": "", "size": 5}]}, 400),
        ("POST", "/api/models/{id}/paths-info/main", b"path=a", 400),
        ("POST", "/{id}.git/info/lfs/objects/batch", {"operation": "upload"}, 400),
        ("POST", "/api/validate-yaml", {"content": "a"}, 400),
    ],
)
def test_refused(hub, uploaded, alice, method, path, body, status):
    known = list(hub.repositories)
    answer = call(hub, method, path.format(id=uploaded), body, alice)
    assert answer[0] == status and "error" in answer[1]
    assert len(hub.refused) == 1 and hub.refused[0].startswith(f"{method} {path.format(id=uploaded)}: ")
    assert list(hub.repositories) == known and list(hub.repository(uploaded).refs) == ["main"]
    hub.refused.clear()
