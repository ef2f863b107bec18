"""Fingerprints of a dataset's content, by which a resumed run knows that it reads the same images."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from datasets.table import Table
from datasets.utils.file_utils import xopen
from huggingface_hub.errors import HTTPError

from .fetching import records_of


# Images of a map-style dataset, shards of a stream, and images of each of these shards that are looked at.
NUM_ROWS, NUM_SHARDS, NUM_OF_SHARD = 32, 8, 2
# In the address of a file of the Hub, and in the cache of datasets 5.2: after the version.
HUB_COMMIT = re.compile(r"hf://datasets/[^@'\"]+@([0-9a-f]{40})/|/\d+\.\d+\.\d+/([0-9a-f]{40})/")


def fingerprint(images: Dataset | IterableDataset) -> str:
    """A hash of some of a dataset's encoded images, and of its size. It does not depend on where the dataset lies.

    It covers, of a map-style dataset, the number of rows and up to 32 rows spread evenly from the first to the last; of a
    stream, the number of shards, the first two images of up to 8 shards spread evenly, and the size of every shard whose
    file or table is on this machine. So other images, another order, and rows or local shards that are missing or cut are
    noticed; a change of a few images between those looked at is not, nor a remote shard that is cut after its second.

    Args:
        images: Result of [`~loading.load_split`].
    """
    digest = hashlib.sha256()
    if isinstance(images, Dataset):
        digest.update(f"{len(images)} rows".encode())
        records = (images[number]["image"] for number in _spread(len(images), NUM_ROWS))
    else:
        digest.update(f"{images.num_shards} shards of {_sizes_of_shards(images)}".encode())
        records = (row["image"] for row in _first_rows(images))
    for record in records:
        digest.update(hashlib.sha256(encoded(record)).digest())
    return digest.hexdigest()[:16]


def full_fingerprint(images: Dataset | IterableDataset) -> str:
    """The same, and of a map-style dataset also the size of every encoded image and every value of the other columns; of a
    stream, those of the images that are looked at.

    Args:
        images: Result of [`~loading.load_images`].
    """
    digest = hashlib.sha256(fingerprint(images).encode())
    others = [name for name in images.features or () if name != "image"]
    if isinstance(images, Dataset):
        tables: Any = images.with_format("arrow").iter(batch_size=1000)
        for table in tables:
            digest.update(repr(_encoded_sizes(table.column("image"))).encode())
            digest.update(Hasher.hash(table.select(others).to_pydict()).encode())
    elif others:
        for row in _first_rows(images):
            digest.update(Hasher.hash({name: row[name] for name in others}).encode())
    return digest.hexdigest()[:16]


def _encoded_sizes(records: pa.ChunkedArray) -> list[int | None]:
    """Bytes of encoded images, without reading them; None for files that are not on this machine."""
    compute: Any = pc  # its functions are made when it is imported
    sizes = compute.binary_length(compute.struct_field(records, "bytes")).to_pylist()
    if None not in sizes:
        return sizes
    paths = compute.struct_field(records, "path").to_pylist()
    return [
        os.path.getsize(path) if size is None and path and os.path.isfile(path) else size
        for size, path in zip(sizes, paths)
    ]


def commit_of(images: Dataset | IterableDataset) -> str | None:
    """Commit of the Hub that the files of a dataset are of, if it is known."""
    files = images.cache_files if isinstance(images, Dataset) else _arguments_of(images)
    found = HUB_COMMIT.search(repr(files))
    return found[1] or found[2] if found else None


def _spread(number: int, most: int) -> list[int]:
    """Up to `most` of the numbers from 0 on, spread evenly, with the first and the last."""
    return [int(index) for index in np.linspace(0, number - 1, min(number, most)).astype(int)]


def _first_rows(stream: IterableDataset) -> Iterator[dict]:
    for shard in _spread(stream.num_shards, NUM_SHARDS):
        yield from islice(records_of(stream.shard(stream.num_shards, shard)), NUM_OF_SHARD)


def drawn(record: dict | None, seed: int) -> int:
    """A number in [0, 2^48) that is uniform over images and seeds, by the SHA-256 of the seed and the encoded image."""
    return int.from_bytes(hashlib.sha256(f"{seed}:".encode() + encoded(record)).digest()[:6])


def encoded(record: dict | None) -> bytes:
    """The encoded image of a record; the name of its file if that cannot be read, or the image as base64 text."""
    if record is None:
        return b""
    if record.get("bytes") is not None:
        return record["bytes"]
    path = record.get("path") or ""
    try:
        with xopen(path, "rb") as file:
            return file.read()
    except (OSError, ValueError, HTTPError):  # it is missing, or the path is the image, as base64 text
        return os.path.basename(path).encode()


def _sizes_of_shards(stream: IterableDataset) -> list[int]:
    """Bytes of the files, or rows of the tables, that a stream reads, as far as they are on this machine."""
    return list(_sizes(_arguments_of(stream).values()))


def _arguments_of(stream: IterableDataset) -> dict[str, Any]:
    """What a stream reads.

    The shards of a stream are not public in datasets 5.2; without the attributes that hold them, there is nothing.
    """
    source: Any = getattr(stream, "_ex_iterable", None)
    while hasattr(source, "ex_iterable"):  # filters, selected columns, ...
        source = source.ex_iterable
    return getattr(source, "kwargs", {})


def _sizes(values: Iterable[Any]) -> Iterator[int]:
    for value in values:
        if isinstance(value, str) and os.path.isfile(value):
            yield os.path.getsize(value)
        elif isinstance(value, Dataset | Table):
            yield value.num_rows
        elif isinstance(value, list | tuple):
            yield from _sizes(value)
