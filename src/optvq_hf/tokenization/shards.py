"""Shards of tokens: which rows each has, how they are read and tokenized, and its file.

Shard k is made of the images k * shard_size to (k + 1) * shard_size of the source, in its order, and no batch has images of two
shards. So the bytes of a shard depend neither on workers nor on processes, nor on what was there before.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Array3D, Dataset, Features, IterableDataset, Value
from datasets.features.features import numpy_to_pyarrow_listarray
from datasets.table import embed_table_storage
from torch.utils.data import Dataset as TorchDataset

from ..data.batches import CountedBatches, read_batches
from ..data.fetching import records_of
from ..data.loading import with_media
from ..data.order import Item, Position, some_rows
from ..training.checkpoints import flush
from .manifest import Shard, TokenFolder, digest_of
from .tokenizer import OptVQTokenizer, Prepared


# How the Parquet files hold pictures, sounds and videos.
STORED = {"bytes": Value("binary"), "path": Value("string")}
# Rows of a row group of the Parquet files.
ROW_GROUP = 1000
# Arrow counts the values of a list column with 32 bits.
MOST_VALUES = 2**31 - 1


class Source:
    """The images to tokenize, with the columns to keep.

    Args:
        images: Result of [`~loading.load_images`].
        shard_size: Images per shard.
        max_images: Most images: of a map-style dataset [`some_rows`], of a stream the first.

    Attributes:
        rows: Rows of a map-style dataset that are tokenized; None for a stream.
        num_shards: None for a stream, whose length is not known.
        num_found: Shards that the latest reading has found.

    Raises:
        ValueError: If there are no images. A stream shows that only when it is read.
    """

    def __init__(self, images: Dataset | IterableDataset, shard_size: int, max_images: int | None):
        self.images, self.shard_size, self.max_images = images, shard_size, max_images
        self.rows: list[int] | None = None
        self.num_shards: int | None = None
        self.num_found = 0
        if isinstance(images, Dataset):
            self.rows = some_rows(len(images), max_images)
            self.num_shards = -(-len(self.rows) // shard_size)
            if not self.rows:
                raise ValueError("the dataset has no images to tokenize")
        features = images.features or Features()  # a stream without columns to keep may not know its types
        self.features = Features(  # kept columns are read undecoded, and written as they were
            {
                name: with_media(feature, lambda media: replace(media, decode=True))
                for name, feature in features.items()
                if name != "image"
            }
        )

    def batches(self, wanted: Callable[[int], bool], batch_size: int) -> Iterator[tuple[list[Item], Position]]:
        """Batches of the images of the wanted shards, each with its shard, its rows, and whether it ends the shard."""
        if self.rows is not None:
            self.num_found = self.num_shards or 0
            for shard in filter(wanted, range(self.num_found)):
                start, end = shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.rows))
                for first in range(start, end, batch_size):
                    rows = self.rows[first : min(first + batch_size, end)]
                    items = [Item(row, ()) for row in rows]
                    yield items, {"shard": shard, "indices": rows, "ends": first + len(rows) == end}
            return
        self.num_found = 0
        numbered = enumerate(itertools.islice(records_of(self.images), self.max_images))  # pyright: ignore[reportArgumentType]
        while first := next(numbered, None):
            shard = first[0] // self.shard_size
            self.num_found = shard + 1
            of_shard = itertools.chain([first], itertools.islice(numbered, self.shard_size - 1))
            if not wanted(shard):
                deque(of_shard, maxlen=0)
                continue
            batch = list(itertools.islice(of_shard, batch_size))
            while batch:
                following = list(itertools.islice(of_shard, batch_size))
                items = [Item(record, ()) for _, record in batch]
                yield items, {"shard": shard, "indices": [index for index, _ in batch], "ends": not following}
                batch = following


class Wanted:
    """Says which shards a process makes: every `num_processes`-th, but for those that are finished.

    Attributes:
        kept: Records of the finished shards of this process, by number; of a stream, of those that were asked for so far.
    """

    def __init__(self, folder: TokenFolder, num_shards: int | None, process_index: int = 0, num_processes: int = 1):
        self.folder, self.num_shards = folder, num_shards
        self.process_index, self.num_processes = process_index, num_processes
        self.kept: dict[int, Shard] = {}
        for shard in range(process_index, num_shards or 0, num_processes):
            self._keep(shard)

    def _keep(self, shard: int) -> None:
        finished = self.folder.finished(shard, self.num_shards)
        if finished is not None:
            self.kept[shard] = finished

    def __call__(self, shard: int) -> bool:
        if shard % self.num_processes != self.process_index:
            return False
        if self.num_shards is None:
            self._keep(shard)
        return shard not in self.kept


class TokenBatch(NamedTuple):
    """One batch as a worker reads it."""

    prepared: Prepared
    position: Position


class TokenReader(TorchDataset[TokenBatch]):
    """Reads the items of [`Source.batches`] and prepares them for the encoder; runs in the workers of a DataLoader."""

    def __init__(self, images: Dataset | IterableDataset, tokenizer: OptVQTokenizer):
        self.images, self.tokenizer = images, tokenizer

    def __getitems__(self, items_and_position: tuple[list[Item], Position]) -> TokenBatch:
        items, position = items_and_position
        sources: Any = [item.source for item in items]
        if isinstance(self.images, Dataset):
            columns = self.images[sources]
        else:
            columns = {name: [record[name] for record in sources] for name in sources[0]}
        return TokenBatch(self.tokenizer.prepare({"index": position["indices"], **columns}), position)


class ShardWriter:
    """Tokenizes images and writes their shards.

    Args:
        tokenizer: One that skips unreadable images.
        source: The images.
        folder: Where the shards go.
        batch_size: Images per batch.
        num_workers: Processes that decode and resize; 0 does it in this process.
        max_unreadable: Largest share of images that may be unreadable.

    Raises:
        ValueError: If a shard would have more codes than a file can.
    """

    def __init__(
        self,
        tokenizer: OptVQTokenizer,
        source: Source,
        folder: TokenFolder,
        batch_size: int,
        num_workers: int = 0,
        max_unreadable: float = 0.0,
    ):
        self.tokenizer, self.source, self.folder, self.batch_size = tokenizer, source, folder, batch_size
        self.num_workers, self.max_unreadable = num_workers, max_unreadable
        values, column = source.shard_size * len(tokenizer.views) * math.prod(tokenizer.value_shape()), tokenizer.column
        if values > MOST_VALUES:
            raise ValueError(
                f"a shard would have {values:,} {'codes' if column == 'codes' else 'numbers'}, more than the "
                f"{MOST_VALUES:,} of a file: lower --shard-size"
            )
        own = {"index": Value("int64"), column: Array3D(tokenizer.value_shape(), str(tokenizer.value_dtype))}
        views = {"crop": Value("int32"), "flipped": Value("bool")} if len(tokenizer.views) > 1 else {}
        self.features = Features({**own, **views, **source.features})

    def write(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, int, Shard | None]]:
        """Makes the shards whose numbers are wanted.

        Yields:
            For every batch, the shard's number, the number of images and, at the end of the shard, its record.

        Raises:
            UnreadableImageError: If too many images cannot be read.
            FileNotFoundError, ValueError: If the source fails. Shards that are finished stay.
            OSError: If a shard cannot be written; nothing of it remains.
        """
        counts = CountedBatches(self.max_unreadable, len(self.source.rows or ()))
        reader = TokenReader(self.source.images, self.tokenizer)
        self.tokenizer.value_shape()  # loads the model before the workers start
        batches: Any = _Batches(self.source, wanted, self.batch_size)
        rows: list[tuple[dict[str, list], np.ndarray]] = []
        images, unreadable = 0, []
        for prepared, position in read_batches(reader, batches, self.num_workers):
            indices = position["indices"]
            counts.count(len(indices), [reason for _, reason in prepared.unreadable])
            unreadable += [{"index": indices[number], "reason": reason} for number, reason in prepared.unreadable]
            rows.append((prepared.columns, self.tokenizer.encode(prepared.pixel_values)))
            images += len(indices)
            shard = None
            if position["ends"]:
                shard = self._write(position["shard"], images, rows, unreadable)
                images, rows, unreadable = 0, [], []
            yield position["shard"], len(indices), shard

    def _write(
        self, number: int, images: int, batches: list[tuple[dict[str, list], np.ndarray]], unreadable: list[dict]
    ) -> Shard:
        """Writes a shard's file under a temporary name, then its record, then gives the file its name."""
        columns: dict[str, Any] = {
            name: list(itertools.chain.from_iterable(columns[name] for columns, _ in batches))
            for name in self.features
            if name != self.tokenizer.column
        }
        columns[self.tokenizer.column] = np.concatenate([values for _, values in batches])
        name = self.folder.name(number, self.source.num_shards)
        path = self.folder.folder / name
        unfinished = path.with_name(f".{path.name}.unfinished")
        try:
            ordered = {name: columns[name] for name in self.features}
            write_parquet(unfinished, ordered, self.features, self.tokenizer.column)
            flush(unfinished)
            size, digest = unfinished.stat().st_size, digest_of(unfinished)
            shard = Shard(name, images, len(columns["index"]), size, digest, unreadable)
            self.folder.record(number, shard)
            unfinished.replace(path)
            flush(path.parent)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise OSError(
                f"cannot write {path}: {error.strerror or error}; finished shards are kept, run the command again"
            ) from error
        return shard


class _Batches:
    """The batches of wanted shards, for a DataLoader."""

    def __init__(self, source: Source, wanted: Callable[[int], bool], batch_size: int):
        self.source, self.wanted, self.batch_size = source, wanted, batch_size

    def __iter__(self) -> Iterator[tuple[list[Item], Position]]:
        return self.source.batches(self.wanted, self.batch_size)


def write_parquet(path: Path, columns: dict[str, Any], features: Features, own: str = "codes") -> None:
    """Writes columns as Parquet, `own` of them from a numpy array; the same columns always give the same bytes.

    The file holds the types of the columns as `datasets` reads them, and the bytes of pictures, sounds and videos as they are.
    """
    others = Features(
        {name: with_media(feature, lambda _: STORED) for name, feature in features.items() if name != own}
    )
    table = Dataset.from_dict({name: columns[name] for name in others}, features=others).data.table
    # Dataset.from_dict takes a tenth of the time of encoding small images for them.
    values = pa.ExtensionArray.from_storage(features[own](), numpy_to_pyarrow_listarray(columns[own]))
    arrays = [values if name == own else table.column(name) for name in features]
    table = embed_table_storage(pa.table(arrays, schema=features.arrow_schema))
    pq.write_table(table, path, row_group_size=ROW_GROUP, compression="zstd")
