"""Repositories of the loopback Hub, in memory: commits, branches, tags, pull requests and LFS objects."""

import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePosixPath


LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".arrow", ".png", ".pt")
LFS_SIZE = 10 * 1024 * 1024


class HubError(Exception):
    """An error answer. `code` goes out as the header X-Error-Code."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Refused(HubError):
    """The answer to a request that a correct client does not send."""


@dataclass(frozen=True)
class Operation:
    """One line of a commit: a change to one file or folder."""

    kind: str  # "file", "lfsFile", "deletedFile" or "deletedFolder"
    path: str
    content: bytes = b""
    oid: str = ""
    size: int | None = None


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass(frozen=True)
class Commit:
    """All files of a repository at one point of its history."""

    parent: str | None
    message: str
    files: dict[str, bytes]
    lfs: frozenset[str] = frozenset()  # the paths that are stored as LFS objects
    oid: str = field(default_factory=lambda: secrets.token_hex(20))
    date: str = field(default_factory=_now)

    def stored_oid(self, path: str) -> str:
        """What clients compare with their own copy: SHA-256 of an LFS file, git's blob id of a regular one."""
        return sha256(self.files[path]) if path in self.lfs else git_blob_oid(self.files[path])


class Repository:
    """A model or a dataset. A new one has one commit without files."""

    def __init__(self, repo_id: str, type: str = "model", private: bool = False):
        self.id, self.type, self.private, self.gated = repo_id, type, private, False
        self.commits = [Commit(None, "initial commit", {})]
        self.branches = {"main": self.commits[0].oid}
        self.tags: dict[str, str] = {}
        self.pull_requests: dict[str, str] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self._granted: dict[str, tuple[str, int]] = {}

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def refs(self) -> dict[str, str]:
        return {**self.branches, **self.pull_requests, **self.tags}

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return dict(self.at(revision).files)

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a pull request or a full commit id."""
        oid = self.refs.get(revision.removeprefix("refs/heads/"), revision)
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise HubError(404, f"{self.id} has no revision {revision}", "RevisionNotFound")

    def history(self, revision: str) -> list[Commit]:
        """The commit of `revision` and all before it, newest first."""
        commits = [self.at(revision)]
        while commits[-1].parent is not None:
            commits.append(self.at(commits[-1].parent))
        return commits

    def commit(
        self,
        revision: str,
        message: str,
        operations: Iterable[Operation],
        parent: str | None = None,
        pull_request: bool = False,
    ) -> tuple[Commit, str]:
        """Adds a commit to a branch or to a new pull request. Returns it with the name of what it was added to."""
        head = self.at(revision)
        if revision not in self.branches and revision not in self.pull_requests:
            raise Refused(400, f"{revision} is not a branch")
        if parent is not None and parent != head.oid:
            raise Refused(412, f"{parent} is not the head of {revision}, which is {head.oid}")
        files, lfs = dict(head.files), set(head.lfs)
        for operation in operations:
            self._apply(operation, files, lfs)
        for path in files:
            if folders := [str(folder) for folder in PurePosixPath(path).parents if str(folder) in files]:
                raise Refused(400, f"{folders[0]} cannot be both a file and a folder")

        new = Commit(head.oid, message, files, frozenset(lfs))
        self.commits.append(new)
        if pull_request:
            revision = f"refs/pr/{len(self.pull_requests) + 1}"
        refs = self.branches if revision in self.branches else self.pull_requests
        refs[revision] = new.oid
        return new, revision

    def _apply(self, operation: Operation, files: dict[str, bytes], lfs: set[str]):
        path = operation.path
        if operation.kind == "file":
            files[path] = operation.content
            lfs.discard(path)
        elif operation.kind == "lfsFile":
            if operation.oid not in self.lfs_objects:
                raise Refused(400, f"LFS object {operation.oid} of {path} was not uploaded")
            files[path] = self.lfs_objects[operation.oid]
            if operation.size is not None and operation.size != len(files[path]):
                raise Refused(400, f"{path} has {len(files[path])} bytes, not {operation.size}")
            lfs.add(path)
        else:
            deleted = [name for name in files if name == path or name.startswith(f"{path}/")]
            if operation.kind == "deletedFile":
                deleted = [name for name in deleted if name == path]
            if not deleted:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in deleted:
                del files[name]
                lfs.discard(name)

    def create_branch(self, name: str, start: str):
        if name in self.refs:
            raise HubError(409, f"{name} exists")
        self.branches[name] = self.at(start).oid

    def create_tag(self, name: str, revision: str):
        if name in self.refs:
            raise HubError(409, f"{name} exists")
        self.tags[name] = self.at(revision).oid

    def grant_upload(self, oid: str, size: int) -> str:
        """A secret that allows the upload of one LFS object, as a signed address does."""
        grant = secrets.token_hex(16)
        self._granted[grant] = (oid, size)
        return grant

    def upload(self, grant: str, oid: str, content: bytes):
        """Stores an LFS object if it is what was announced."""
        if grant not in self._granted or self._granted[grant][0] != oid:
            raise Refused(403, f"the upload of {oid} was not granted")
        size = self._granted[grant][1]
        if len(content) != size:
            raise Refused(400, f"LFS object {oid} was announced with {size} bytes and has {len(content)}")
        if sha256(content) != oid:
            raise Refused(400, f"LFS object {oid} has SHA-256 {sha256(content)}")
        self.lfs_objects[oid] = content

    def file_entry(self, commit: Commit, path: str, expand: bool = False) -> dict:
        """A file as the tree listing shows it."""
        content = commit.files[path]
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_blob_oid(content)}
        if path in commit.lfs:
            pointer = lfs_pointer(content)
            entry["oid"] = git_blob_oid(pointer)
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": len(pointer)}
        if expand:
            last = commit
            while last.parent is not None and self.at(last.parent).files.get(path) == content:
                last = self.at(last.parent)
            entry["lastCommit"] = {"id": last.oid, "title": last.message, "date": last.date}
        return entry

    def tree(self, commit: Commit, folder: str, recursive: bool, expand: bool) -> list[dict]:
        """Files and folders in `folder`; the empty name is the root."""
        prefix = f"{folder}/" if folder else ""
        files = {path for path in commit.files if path.startswith(prefix)}
        if folder and not files:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        folders = {str(parent) for path in files for parent in PurePosixPath(path).parents}
        folders = {path for path in folders if path.startswith(prefix) and path != "."}
        if not recursive:
            files = {path for path in files if "/" not in path.removeprefix(prefix)}
            folders = {path for path in folders if "/" not in path.removeprefix(prefix)}
        return [folder_entry(path) for path in sorted(folders)] + [
            self.file_entry(commit, path, expand) for path in sorted(files)
        ]


def folder_entry(path: str) -> dict:
    """A folder as the tree listing shows it. No client looks at its id."""
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_blob_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(content: bytes) -> bytes:
    """The text that git stores in place of an LFS file."""
    lines = ["version https://git-lfs.github.com/spec/v1", f"oid sha256:{sha256(content)}", f"size {len(content)}", ""]
    return "\n".join(lines).encode()


def upload_mode(path: str, size: int) -> str:
    return "lfs" if path.endswith(LFS_SUFFIXES) or size >= LFS_SIZE else "regular"
