"""Pushes files to a repository of the Hub in one commit."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetInfo,
    HfApi,
    ModelInfo,
    RepoFile,
    get_session,
)
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils.sha import git_hash


T = TypeVar("T")

WAITS = (1, 2, 4, 8)  # seconds before each retry
LONGEST_WAIT = 60  # seconds, whatever the Hub asks for
TIMEOUT = 120  # seconds without any sign of the Hub; huggingface_hub 2.4 itself has no timeout


def make_repository(
    repo_id: str, private: bool, revision: str = "main", create_pr: bool = False, kind: str = "model"
) -> None:
    """Creates a repository and its branch if they are missing, and checks that the token may write to it.

    Args:
        kind: "model" or "dataset".

    Raises:
        HTTPError, RuntimeError: From huggingface_hub, if the Hub refuses or cannot be reached.
        ValueError: If it should be private but is public already.
    """
    api = HfApi()
    persist(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True, repo_type=kind))
    if private and not latest_commit(api, repo_id, "main", kind).private:
        raise ValueError(f"{repo_id} exists already, and is public: make it private on the Hub, or drop --private")
    if revision != "main":
        persist(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True, repo_type=kind))
    trial = [CommitOperationAdd("README.md", b"---\n---\n")]  # announced, never committed
    api.preupload_lfs_files(repo_id, trial, revision=revision, create_pr=create_pr, repo_type=kind)


def push_folder(
    folder: Path,
    repo_id: str,
    message: str,
    is_replaced: Callable[[str], bool],
    revision: str = "main",
    create_pr: bool = False,
) -> str:
    """Commits all files of a model's folder, as [`push_files`] does."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return push_files(files, repo_id, message, is_replaced, revision, create_pr)


def push_files(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    message: str,
    is_replaced: Callable[[str], bool],
    revision: str = "main",
    create_pr: bool = False,
    kind: str = "model",
    parent: str | None = None,
) -> str:
    """Commits files, by their names in the repository, and removes others for which `is_replaced` is true.

    Files are uploaded first, large ones by their hash, so that a repeated call sends only what is missing; then one commit
    makes them visible together. If the connection breaks before the answer, the new head
    shows whether the commit was made, so it is never made twice. A pull request is not retried in that case.

    Args:
        parent: The commit that the files were made for; by default the latest at the start.

    Returns:
        Address of the commit or of the pull request.

    Raises:
        HTTPError, RuntimeError: From huggingface_hub, if it cannot commit or upload.
        ValueError: If somebody else committed in the meantime.
    """
    api = HfApi()  # not upload_folder, which may split a folder into several commits
    additions = [CommitOperationAdd(name, path) for name, path in files.items()]
    head = latest_commit(api, repo_id, revision, kind)
    parent, there = parent or head.sha, [file.rfilename for file in head.siblings or ()]
    deletions = [CommitOperationDelete(name) for name in there if is_replaced(name) and name not in files]
    options: dict[str, Any] = {"revision": revision, "create_pr": create_pr, "repo_type": kind}
    api.preupload_lfs_files(repo_id, additions, free_memory=False, **options)

    def commit() -> str:
        try:
            made = api.create_commit(
                repo_id,
                [*additions, *deletions],
                commit_message=message,
                parent_commit=parent,
                **options,
            )
            return made.pr_url or made.commit_url
        except HTTPError as error:
            head = None if create_pr else latest_commit(api, repo_id, revision, kind).sha
            if head in (None, parent):
                raise
            if not _holds(api, repo_id, head, additions, deletions, kind):
                raise ValueError(
                    f"somebody else committed to {repo_id} in the meantime; nothing was committed: try again"
                ) from error
            prefix = "datasets/" if kind == "dataset" else ""
            return f"{api.endpoint}/{prefix}{repo_id}/commit/{head}"

    return commit() if create_pr else persist(commit)


def latest_commit(api: HfApi, repo_id: str, revision: str, kind: str) -> ModelInfo | DatasetInfo:
    """The latest commit of a branch, with the names of its files."""
    info: Any = api.dataset_info if kind == "dataset" else api.model_info
    return persist(lambda: info(repo_id, revision=None if revision == "main" else revision))


def persist(action: Callable[[], T]) -> T:
    """Runs an idempotent action, and retries it if the network or the server fails for a moment."""
    for wait in WAITS:
        get_session().timeout = TIMEOUT
        try:
            return action()
        except HTTPError as error:
            if not _may_pass(error):
                raise
            time.sleep(min(_retry_after(error) or wait, LONGEST_WAIT))
    return action()


def _may_pass(error: HTTPError) -> bool:
    """Whether a retry may help: after lost connections, overload and crashes, not after refusals."""
    return not isinstance(error, HfHubHTTPError) or error.response.status_code in (429, 500, 502, 503, 504)


def _retry_after(error: HTTPError) -> float | None:
    value = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(value) if value.isdigit() else None


def _holds(api: HfApi, repo_id: str, revision: str, additions: list, deletions: list, kind: str) -> bool:
    """Whether a commit has exactly the added files, by their hashes, and none of the deleted ones."""
    tree = persist(lambda: list(api.list_repo_tree(repo_id, revision=revision, recursive=True, repo_type=kind)))
    there = {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in tree if isinstance(file, RepoFile)}
    return all(there.get(add.path_in_repo) in _hashes(add) for add in additions) and not any(
        delete.path_in_repo in there for delete in deletions
    )


def _hashes(addition: CommitOperationAdd) -> tuple[str, str]:
    """The hashes of a file in git and in large file storage."""
    with addition.as_file() as file:
        return git_hash(file.read()), addition.upload_info.sha256.hex()
