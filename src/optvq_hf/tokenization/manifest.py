"""What an output folder of tokens says about itself: a manifest, and a record of every finished shard until there is one.

    OUT/README.md                              the dataset card, which tells `load_dataset` the splits
    OUT/manifest.json                          model, preprocessing, and per split the source and its shards
    OUT/data/SPLIT-00000-of-00006.parquet      shards; of a stream, whose length is not known, `-of-unknown`
    OUT/.progress/SPLIT.json                   until a split is complete: the settings that its shards are made with,
    OUT/.progress/SPLIT-00000.json             and a record of each finished shard

Only this module reads and writes the JSON files.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.dataclasses import type_validator

from ..parsing import parse_json
from ..training.checkpoints import write_whole
from ..training.digests import DIGEST


MANIFEST_FILE, CARD_FILE, DATA_FOLDER, PROGRESS_FOLDER = "manifest.json", "README.md", "data", ".progress"
# Raise it whenever earlier code would misread a manifest of this code.
FORMAT = 1
# How model and images were named. What they are is told by the digest of the weights and the fingerprint of the images.
SPELLINGS = ("model.id", "model.revision", "dataset.id", "dataset.name")
T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """The record of a finished shard.

    Attributes:
        file: Name within the folder.
        images: Images of the source that it was made of.
        rows: Rows of it.
        bytes, sha256: Of the file.
        unreadable: `index` and `reason` of the images that could not be read.
    """

    file: str
    images: int
    rows: int
    bytes: int
    sha256: str
    unreadable: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        for entry in fields(self):  # people may have changed the record
            type_validator(entry.name, getattr(self, entry.name), entry.type)

    def fault(self, folder: Path, is_new: bool = False) -> str | None:
        """What is wrong with its file; None if it is what was written. Of a new one the size alone is compared."""
        path = folder / self.file
        if not path.is_file():
            return f"{self.file} is missing"
        if (size := path.stat().st_size) != self.bytes:
            return f"{self.file} has {size} bytes instead of {self.bytes}"
        if not is_new and digest_of(path) != self.sha256:
            return f"{self.file} has changed since it was written"
        return None


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenFolder:
    """One split of an output folder.

    Args:
        folder: The output folder.
        split: Name of the split.
    """

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = folder, split
        self.progress = folder / PROGRESS_FOLDER

    def name(self, number: int, num_shards: int | None) -> str:
        """Name of a shard's file within the folder."""
        total = "unknown" if num_shards is None else f"{num_shards:05}"
        return f"{DATA_FOLDER}/{self.split}-{number:05}-of-{total}.parquet"

    def begin(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Prepares the folder for shards that are made with these settings; finished shards of the same settings stay.

        Raises:
            ValueError: If it holds tokens that other settings made, or nobody knows which, and may not be overwritten.
        """
        manifest = read_manifest(self.folder) if (self.folder / MANIFEST_FILE).is_file() else None
        of_others = [name for name in (manifest or {}).get("splits", {}) if name != self.split]
        if manifest is not None and of_others and (wrong := _other_columns(manifest, of_others[0], settings)):
            raise ValueError(
                f"{self.folder} holds tokens of split {of_others[0]!r}, made with {wrong}: choose another --output-dir"
            )
        before = self._settings(manifest)
        wrong = "settings that are not recorded" if self._files() else None
        if before is not None:
            wrong = difference(before, settings)
        if wrong:
            if not overwrite:
                raise ValueError(
                    f"{self.folder} holds tokens of split {self.split!r}, made with {wrong}: choose another --output-dir, or "
                    "pass --overwrite"
                )
            self._remove(manifest)
        for folder in (self.folder / DATA_FOLDER, self.progress):  # of killed processes
            for leftover in folder.glob(f".{self.split}*.unfinished"):
                leftover.unlink()
        self.progress.mkdir(parents=True, exist_ok=True)
        (self.folder / DATA_FOLDER).mkdir(exist_ok=True)
        write_whole(self.progress / f"{self.split}.json", _json(settings))

    def _settings(self, manifest: dict | None) -> dict | None:
        """Settings of the tokens in the folder."""
        path = self.progress / f"{self.split}.json"
        if path.is_file() and (settings := _unbroken(path, dict)):
            return settings
        entry = (manifest or {}).get("splits", {}).get(self.split)
        return None if manifest is None or entry is None else {"model": manifest["model"], **entry["settings"]}

    def _files(self) -> list[Path]:
        """The files that `load_dataset` reads as this split."""
        return sorted((self.folder / DATA_FOLDER).glob(f"{self.split}-*-of-*.parquet"))

    def _remove(self, manifest: dict | None) -> None:
        """Removes the split: files first, so that what is left of a killed process still has its settings."""
        for path in self._files():
            path.unlink()
        if manifest is not None and manifest["splits"].pop(self.split, None) is not None:
            write_whole(self.folder / MANIFEST_FILE, _json(manifest))
        self._remove_records()

    def _remove_records(self) -> None:
        for path in (*self.progress.glob(f"{self.split}-*.json"), self.progress / f"{self.split}.json"):
            path.unlink(missing_ok=True)

    @cached_property
    def _before(self) -> list[Shard]:
        """Records of the split in the manifest, as this process found it."""
        manifest = read_manifest(self.folder) if (self.folder / MANIFEST_FILE).is_file() else {"splits": {}}
        return list(shards_of(manifest, self.split)) if self.split in manifest["splits"] else []

    def finished(self, number: int, num_shards: int | None, is_new: bool = False) -> Shard | None:
        """The record of a shard whose file is what was written; None for one that is to be made.

        Args:
            is_new: This run wrote or checked it: its digest is not computed again.
        """
        path = self.progress / f"{self.split}-{number:05}.json"
        shard = self._before[number] if number < len(self._before) else None
        if path.is_file():
            shard = _unbroken(path, lambda entries: Shard(**entries))
        if shard is None or shard.file != self.name(number, num_shards):
            return None
        return shard if shard.fault(self.folder, is_new) is None else None

    def record(self, number: int, shard: Shard) -> None:
        """Writes the record of a shard whose file is complete."""
        write_whole(self.progress / f"{self.split}-{number:05}.json", _json(asdict(shard)))

    def finish(self, settings: dict[str, Any], facts: dict[str, Any], shards: list[Shard], card: Any) -> dict[str, Any]:
        """Writes the manifest and the card, and removes the records, and files of the split that are none of the shards.

        Args:
            settings: As of [`begin`].
            facts: Further entries of the split.
            shards: All of them.
            card: card(manifest) returns the text of the card.

        Returns:
            The manifest.
        """
        from .. import __version__

        before = read_manifest(self.folder)["splits"] if (self.folder / MANIFEST_FILE).is_file() else {}
        unreadable = [entry for shard in shards for entry in shard.unreadable]
        entry = {
            "settings": {name: value for name, value in settings.items() if name != "model"},
            **facts,
            "images": sum(shard.images for shard in shards),
            "rows": sum(shard.rows for shard in shards),
            "num_unreadable": len(unreadable),
            "shards": [asdict(shard) for shard in shards],
        }
        manifest = {"format": FORMAT, "optvq_hf": __version__, "model": settings["model"]}
        manifest["splits"] = dict(sorted({**before, self.split: entry}.items()))
        for path in self._files():
            if f"{DATA_FOLDER}/{path.name}" not in {shard.file for shard in shards}:
                path.unlink()
        write_whole(self.folder / CARD_FILE, card(manifest))
        write_whole(self.folder / MANIFEST_FILE, _json(manifest))
        self._remove_records()
        if not any(self.progress.iterdir()):
            shutil.rmtree(self.progress)
        return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of tokens.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is broken, or has a different format.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        unfinished = (folder / PROGRESS_FOLDER).is_dir()
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST_FILE}: "
            + (
                "tokenizing has not finished, run `optvq tokenize` again"
                if unfinished
                else "`optvq tokenize` writes one"
            )
        )
    try:
        manifest = parse_json(path.read_bytes())
        if manifest.get("format") != FORMAT:
            raise ValueError(
                f"it has format {manifest.get('format')!r}, this version of optvq_hf reads format {FORMAT}"
            )
        type_validator("model", manifest.get("model"), dict[str, Any])
        for name, kind in (("id", str), (DIGEST, str), ("config", dict)):
            type_validator(f"model.{name}", manifest["model"].get(name), kind)
        type_validator("splits", manifest.get("splits"), dict[str, dict])
        for split in manifest["splits"].values():
            type_validator("shards", split.get("shards"), list[dict])
            type_validator("settings", split.get("settings"), dict)
            for shard in split["shards"]:
                Shard(**shard)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is broken: {' '.join(str(error).split())}") from error
    return manifest


def shards_of(manifest: dict[str, Any], split: str) -> Iterator[Shard]:
    """The records of a split's shards."""
    return (Shard(**entries) for entries in manifest["splits"][split]["shards"])


def difference(before: dict, now: dict, names: Iterable[str] | None = None) -> str | None:
    """The first setting that differs, for a message, but for [`SPELLINGS`]; None if all are the same.

    Args:
        names: Compare these alone.
    """
    one, other = (_flat(json.loads(_json(entries))) for entries in (before, now))  # tuples are lists in JSON
    for name in dict.fromkeys([*one, *other]):
        is_compared = name not in SPELLINGS and (names is None or name.partition(".")[0] in names)
        if is_compared and (name not in one or name not in other or one[name] != other[name]):
            shown = [
                json.dumps(entries[name]) if name in entries else "that was not recorded" for entries in (one, other)
            ]
            return f"{name} {shown[0]}, not {shown[1]}"
    return None


def _other_columns(manifest: dict, split: str, settings: dict) -> str | None:
    """What keeps `load_dataset` from reading a new split beside a finished one, as of [`difference`]: a model or columns."""
    finished = {"model": manifest["model"], **manifest["splits"][split]["settings"]}
    shared = [
        {
            "model": entries.get("model"),
            "latents": bool(entries.get("latents_of")),
            "columns": sorted(entries.get("columns") or ()),
            "flips or crops": bool(entries.get("flips") or entries.get("crops")),
        }
        for entries in (finished, settings)
    ]
    return difference(*shared)


def _flat(entries: dict, prefix: str = "") -> dict[str, Any]:
    """Entries of dicts within dicts by their full names, as `model.config.epsilon`."""
    flat = {}
    for name, value in entries.items():
        inside = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{name}.") if inside else {prefix + name: value}
    return flat


def _unbroken(path: Path, read: Callable[[dict], T]) -> T | None:
    """What is read from the entries of a JSON file; None if they are broken."""
    try:
        return read(parse_json(path.read_bytes()))
    except (TypeError, ValueError):
        return None


def _json(entries: dict) -> str:
    return json.dumps(entries, indent=1) + "\n"
