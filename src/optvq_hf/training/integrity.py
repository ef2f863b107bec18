"""Checksums of checkpoints: of every file, and of the numbers of the state."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..parsing import parse_json


class BrokenCheckpointError(ValueError):
    """A checkpoint with a file that is missing, changed or unreadable."""


CHECKSUM = "sha256"
UNKNOWN = "0" * 64


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of every file in a folder, by name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, CHECKSUM: checksum}
        for path, checksum in zip(paths, _sha256_of_all(paths))
    }


def check_files(folder: Path, expected: dict[str, dict[str, Any]]) -> None:
    """Compares the files of a folder with their checksums; sizes first, which is quick.

    Raises:
        BrokenCheckpointError: If a file is missing or different.
    """
    for name, file in expected.items():
        path = folder / name
        if not path.is_file():
            raise BrokenCheckpointError(f"checkpoint {folder} is broken: {name} is missing")
        if (size := path.stat().st_size) != file["bytes"]:
            raise BrokenCheckpointError(
                f"checkpoint {folder} is broken: {name} has {size} bytes instead of {file['bytes']}"
            )
    for (name, file), found in zip(expected.items(), _sha256_of_all([folder / name for name in expected])):
        if found != file[CHECKSUM]:
            raise BrokenCheckpointError(f"checkpoint {folder} is broken: {name} has changed since it was written")


def sealed(entries: dict[str, Any]) -> str:
    """Entries as JSON text that holds its own SHA-256, computed while the text has zeros in its place."""
    text = json.dumps({CHECKSUM: UNKNOWN, **entries}, indent=1)
    return text.replace(UNKNOWN, hashlib.sha256(text.encode()).hexdigest(), 1)


def unseal(sealed_text: bytes) -> tuple[dict[str, Any], bool]:
    """The entries of a text that [`sealed`] made, and whether it holds a checksum: earlier formats have none.

    Raises:
        ValueError: If the text is not JSON, or has changed since it was sealed.
    """
    text = sealed_text.decode()
    entries = parse_json(text)
    checksum = entries.pop(CHECKSUM, None)
    if checksum is None:
        return entries, False
    if hashlib.sha256(text.replace(str(checksum), UNKNOWN, 1).encode()).hexdigest() != checksum:
        raise ValueError("it has changed since it was written")
    return entries, True


def _sha256_of_all(paths: list[Path]) -> list[str]:
    """SHA-256 of files, several at a time: Python's other threads run meanwhile."""

    def of(path: Path) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        return list(pool.map(of, paths))
