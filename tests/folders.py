"""What is in folders, to compare them."""

import json
from pathlib import Path


def contents(folder: str | Path) -> dict[str, bytes]:
    """The bytes of all files, by their paths in the folder, in order."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def shards_of(tokens: Path) -> dict[str, bytes]:
    """The bytes of the shards of a folder of tokens."""
    return contents(tokens / "data")


def manifest_of(tokens: Path) -> dict:
    return json.loads((tokens / "manifest.json").read_text())
