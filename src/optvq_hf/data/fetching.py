"""Downloads repositories of the Hub, and explains errors of the Hub in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import IterableDataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def find_folder(
    source: str, allow_patterns: list[str] | None = None, revision: str | None = None, kind: str = "model"
) -> Path:
    """The folder itself, or a local copy of the repository with this Hub id.

    Args:
        allow_patterns: Files that are needed; all by default.
        kind: "model" or "dataset".

    Raises:
        OSError: If it does not exist or cannot be reached.
        ValueError: If a revision of a folder is asked for.
    """
    if not source:  # Path("") would be the working folder
        raise FileNotFoundError("the name of a folder or Hub id is empty")
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(
                f"{source} is a folder on this machine, which has no revision {revision!r}: leave the revision out"
            )
        return Path(source)
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=allow_patterns, repo_type=kind))
    except (HTTPError, HFValidationError, OSError) as error:
        raise OSError(f"cannot load {source!r}: {explain(error, source, kind)}") from error


def explain(error: BaseException, name: str, kind: str = "model") -> str:
    """Explains an error of huggingface_hub, which other libraries may have wrapped, in one line.

    Args:
        name: Hub id or path that was asked for.
        kind: "model" or "dataset".
    """
    for cause in _causes(error):
        reason = _reason(cause, name, kind)
        if reason:
            return reason
    return " ".join(str(error).split())


@contextmanager
def dataset_errors(what: str, name: str) -> Iterator[None]:
    """Turns any error into a FileNotFoundError or ValueError of one line: files of a dataset that are broken raise all kinds.

    Args:
        what: The beginning of the line.
        name: Hub id or path that was asked for.
    """
    try:
        yield
    except (HTTPError, FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{what}: {explain(error, name, 'dataset')}") from error
    except Exception as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        reason = " ".join(str(cause).split())
        is_message = reason and not isinstance(cause, LookupError)  # that has only what was looked up
        raise ValueError(f"{what}: {reason if is_message else f'{type(cause).__name__} {reason}'.strip()}") from error


def records_of(stream: IterableDataset) -> Iterator[dict]:
    """The records of a stream.

    Raises:
        FileNotFoundError, ValueError: If a file of it is missing or broken.
    """
    with dataset_errors("cannot read the stream of images", "the dataset"):
        iterator = iter(stream)
    while True:
        with dataset_errors("cannot read the stream of images", "the dataset"):
            record = next(iterator, None)
        if record is None:
            return
        yield record


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause, seen = error, set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _reason(error: BaseException, name: str, kind: str) -> str | None:
    address = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return f"{name} is gated: ask for access at {address}, and {LOG_IN}"
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return f"the Hub needs a valid token: {LOG_IN}"
    if status == 403:
        return f"your token may not do this to {name}; it needs write access there"
    if isinstance(error, (RepositoryNotFoundError, DatasetNotFoundError)):
        other = "dataset" if kind == "model" else "model"
        if _exists(name, other):
            return f"{name} is a {other} on the Hub, not a {kind}"
        return f"there is no {kind} {name} on the Hub, or it is private and your token cannot see it ({LOG_IN})"
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no such revision on the Hub"
    if isinstance(error, OfflineModeIsEnabled) or "OfflineModeIsEnabled" in str(error):
        return f"{name} is not in the cache, and HF_HUB_OFFLINE=1 forbids requests to the Hub"
    if isinstance(error, HFValidationError):
        return f"{name} is neither a folder that exists, nor a Hub id"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{name} lacks a file: {error.response.url.path.rpartition('/')[2]}"
    if isinstance(error, HfHubHTTPError):
        return f"the Hub answered {status} about {name}: {' '.join(str(error).split())[:300]}"
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return f"{name} is not in the cache, and HF_HUB_OFFLINE=1 forbids requests to the Hub"
    if type(error).__module__.startswith("httpx"):
        return f"cannot reach the Hub at {constants.ENDPOINT}: {type(error).__name__} {error}"
    return None


def _exists(name: str, kind: str) -> bool:
    try:
        return HfApi().repo_exists(name, repo_type=kind)
    except (HTTPError, HFValidationError, OSError):
        return False
