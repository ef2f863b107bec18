"""Strict reading of request bodies: whatever is not as documented is refused."""

import base64
import binascii
import json
import re
from types import NoneType
from urllib.parse import parse_qs

from hub.repositories import Operation, Refused


SHA256 = re.compile("[0-9a-f]{64}")
REPOSITORY_TYPES = ("model", "dataset")

REPOSITORY = {"name": str, "organization": (str, NoneType)}
CREATION = {"type": str, "visibility": str}
SETTINGS = {"visibility": str, "gated": (str, bool)}
UPLOAD_PLAN = {"path": str, "sample": str, "size": int}
LFS_BATCH = {"operation": str, "transfers": list, "objects": list, "hash_algo": str}
COMMIT_LINES = {
    "header": ({"summary": str, "description": str}, {"parentCommit": str}),
    "file": ({"path": str, "content": str, "encoding": str}, {}),
    "lfsFile": ({"path": str, "algo": str, "oid": str}, {"size": int}),
    "deletedFile": ({"path": str}, {}),
    "deletedFolder": ({"path": str}, {}),
}


def read_json(body: bytes, required: dict, optional: dict | None = None) -> dict:
    """A JSON object with exactly the keys of `required`, and possibly those of `optional`."""
    try:
        value = json.loads(body)
    except ValueError:
        raise Refused(400, f"the body is not JSON: {body[:80]!r}") from None
    return check(value, required, optional or {})


def check(value, required: dict, optional: dict | None = None) -> dict:
    types = {**required, **(optional or {})}
    if type(value) is not dict:
        raise Refused(400, f"an object is expected, not {value!r:.80}")
    if missing := required.keys() - value.keys():
        raise Refused(400, f"missing keys: {', '.join(sorted(missing))}")
    if unknown := value.keys() - types.keys():
        raise Refused(400, f"unknown keys: {', '.join(sorted(unknown))}")
    for key, content in value.items():
        # type() and not isinstance(): true is no number.
        allowed = types[key] if isinstance(types[key], tuple) else (types[key],)
        if type(content) not in allowed:
            raise Refused(400, f"{key} has the wrong type: {content!r:.80}")
    return value


def check_choice(name: str, value, choices: tuple):
    if value not in choices:
        raise Refused(400, f"{name} is {value!r:.80} and must be one of {choices}")


def check_path(path: str) -> str:
    parts = path.split("/")
    if not path or any(part in ("", ".", "..", ".git") for part in parts):
        raise Refused(400, f"not a path in a repository: {path!r}")
    return path


def check_lfs_object(oid: str, size: int | None):
    if not SHA256.fullmatch(oid):
        raise Refused(400, f"not a SHA-256: {oid!r:.80}")
    if size is not None and size < 0:
        raise Refused(400, f"a size cannot be {size}")


def decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(400, f"not base64: {text!r:.80}") from None


def read_repository(body: bytes, optional: dict) -> dict:
    """The body that creates or deletes a repository."""
    value = read_json(body, REPOSITORY, {"type": str, **optional})
    check_choice("type", value.setdefault("type", "model"), REPOSITORY_TYPES)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}", value["name"]):
        raise Refused(400, f"not a name of a repository: {value['name']!r}")
    return value


def read_upload_plan(body: bytes) -> list[dict]:
    """The files of a preupload request."""
    files = read_json(body, {"files": list})["files"]
    for file in files:
        check(file, UPLOAD_PLAN)
        check_path(file["path"])
        if len(decode_base64(file["sample"])) != min(file["size"], 512):
            raise Refused(400, f"the sample of {file['path']} is not the first 512 bytes")
    return files


def read_lfs_batch(body: bytes) -> tuple[list[dict], str | None]:
    """The objects of an LFS batch request, and the branch they are meant for."""
    value = read_json(body, LFS_BATCH, {"ref": dict})
    check_choice("operation", value["operation"], ("upload",))
    check_choice("hash_algo", value["hash_algo"], ("sha256",))
    if "basic" not in value["transfers"]:
        raise Refused(400, "only the transfer basic is supported")
    for item in value["objects"]:
        check(item, {"oid": str, "size": int})
        check_lfs_object(item["oid"], item["size"])
    return value["objects"], check(value["ref"], {"name": str})["name"] if "ref" in value else None


def read_commit(body: bytes) -> tuple[str, str | None, list[Operation]]:
    """Message, expected parent and operations of a commit in NDJSON."""
    lines = [read_json(line, {"key": str, "value": dict}) for line in body.splitlines()]
    for line in lines:
        check_choice("key", line["key"], tuple(COMMIT_LINES))
        check(line["value"], *COMMIT_LINES[line["key"]])
    if [index for index, line in enumerate(lines) if line["key"] == "header"] != [0]:
        raise Refused(400, "the first line of a commit, and no other, is the header")
    if len(lines) == 1:
        raise Refused(400, "the commit changes nothing")
    header = lines[0]["value"]
    if not header["summary"]:
        raise Refused(400, "the commit has no message")
    return header["summary"], header.get("parentCommit"), [_operation(**line) for line in lines[1:]]


def _operation(key: str, value: dict) -> Operation:
    if key == "file":
        check_choice("encoding", value["encoding"], ("base64",))
        return Operation(key, check_path(value["path"]), content=decode_base64(value["content"]))
    if key == "lfsFile":
        check_choice("algo", value["algo"], ("sha256",))
        check_lfs_object(value["oid"], value.get("size"))
        return Operation(key, check_path(value["path"]), oid=value["oid"], size=value.get("size"))
    return Operation(key, check_path(value["path"].removesuffix("/")))


def read_paths(body: bytes) -> tuple[list[str], bool]:
    """The paths of a paths-info request, which is a form, and whether it asks for their last commits."""
    try:
        form = parse_qs(body.decode(), keep_blank_values=True, strict_parsing=True)
    except ValueError:
        raise Refused(400, f"the body is not a form: {body[:80]!r}") from None
    if form.keys() - {"paths", "expand"}:
        raise Refused(400, f"unknown keys: {', '.join(sorted(form))}")
    expand = form.get("expand", ["false"])[0].lower()
    check_choice("expand", expand, ("true", "false"))
    return form.get("paths", []), expand == "true"
