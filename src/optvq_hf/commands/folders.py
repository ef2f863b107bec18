"""Checks of output folders, before any work is done."""

from pathlib import Path
from tempfile import TemporaryFile


def check_writable(folder: Path) -> None:
    """Raises OSError unless a folder can be written to or, if it does not exist, be made. It leaves nothing behind."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with TemporaryFile(dir=existing) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        reason = error.strerror if existing.is_dir() else f"{existing} is not a folder"
        raise OSError(f"cannot write to {folder}: {reason}") from error
