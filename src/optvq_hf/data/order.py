"""The order in which a dataset is read: endless, with an exact position in the data, for training; once, for evaluation.

An order iterates over batches of items, each with the position in the data after it. A position is plain JSON; an order that
starts from it reads the very next item. An epoch of training reads every image once, except the last rows of a map-style
dataset that do not fill a batch.
"""

import itertools
import queue
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
from datasets import Dataset, IterableDataset

from .fetching import records_of


T = TypeVar("T")
Position = dict[str, Any]


class Item(NamedTuple):
    """One image to read.

    Attributes:
        source: Row of a map-style dataset, or the record that a stream gave.
        seed: Of its augmentation, a few integers that depend neither on the workers nor on interruptions.
    """

    source: int | dict
    seed: tuple[int, ...]


class OnceInOrder:
    """Batches of the images of a dataset or stream as they stand in it, with their numbers; the last may be smaller.

    Args:
        max_images: Read only as many: of a map-style dataset [`some_rows`], of a stream the first.
        process_index, num_processes: Read only every `num_processes`-th batch, from this one on.
    """

    def __init__(
        self,
        images: Dataset | IterableDataset,
        batch_size: int,
        max_images: int | None = None,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.images, self.batch_size, self.max_images = images, batch_size, max_images
        self.process_index, self.num_processes = process_index, num_processes

    def __iter__(self) -> Iterator[tuple[list[Item], Position]]:
        if isinstance(self.images, Dataset):
            rows = some_rows(len(self.images), self.max_images)
        else:
            rows = itertools.islice(records_of(self.images), self.max_images)
        items = (Item(row, ()) for row in rows)
        for number in itertools.count():
            batch = list(itertools.islice(items, self.batch_size))
            if not batch:
                return
            if number % self.num_processes == self.process_index:
                yield batch, {"batch": number}

    def __len__(self) -> int:
        """Number of batches; TypeError for a stream, whose length is not known."""
        num_images = len(self.images)  # pyright: ignore[reportArgumentType]
        wanted = num_images if self.max_images is None else min(num_images, self.max_images)
        batches = -(-wanted // self.batch_size)
        return -(-(batches - self.process_index) // self.num_processes)


def some_rows(num_rows: int, number: int | None) -> list[int]:
    """So many of the rows, drawn at random, always the same, in ascending order; all of them for None.

    The first rows of a sorted dataset would be those of its first classes. Fewer rows are some of more rows.
    """
    if number is None or number >= num_rows:
        return list(range(num_rows))
    return sorted(np.random.default_rng([0, num_rows]).permutation(num_rows)[:number].tolist())


class RowOrder:
    """Batches of the rows of a map-style dataset, with a new permutation in every epoch.

    The processes share one permutation row by row, so that their batches together are the batch that one process would read.

    Args:
        content: [`~fingerprint.fingerprint`] of the images, which a position in the data belongs to.

    Raises:
        ValueError: If a process's share is smaller than one batch.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
        content: str = "",
    ):
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.process_index, self.num_processes = process_index, num_processes
        self.identity = {"rows": num_rows, "seed": seed, "content": content}  # a position is valid only for this order
        self.batches_per_epoch = num_rows // (batch_size * num_processes)
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"{num_rows} images, fewer than one batch of {batch_size} for each of {num_processes} processes"
            )

    def batches(self, position: Position | None) -> Iterator[tuple[list[Item], Position]]:
        """Yields endless batches from a position (None: the beginning), of any number of processes."""
        check_same(position, self.identity)
        first_epoch, start = (position["epoch"], position["images"]) if position else (0, 0)
        together = self.batch_size * self.num_processes
        for epoch in itertools.count(first_epoch):
            permutation = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
            while start + together <= self.num_rows:
                numbers = range(start + self.process_index, start + together, self.num_processes)
                items = [Item(int(permutation[number]), (self.seed, epoch, number)) for number in numbers]
                start += together
                yield items, {"epoch": epoch, "images": start, **self.identity}
            start = 0


class StreamOrder:
    """Batches of the records of a stream: shards in a new order in every epoch, records shuffled in blocks.

    Whole blocks are read and permuted, so a position is where its block starts and how many of its records were read; a resumed
    run rereads at most one block. Every process reads shards of its own or, if their number is not divisible by that of the
    processes, its share of the records of all shards. A thread reads ahead: up to three blocks are in memory.

    Args:
        block_size: Records that are shuffled together.
        content: [`~fingerprint.fingerprint`] of the images, which a position in the data belongs to.
    """

    batches_per_epoch = None  # the length of a stream is not known

    def __init__(
        self,
        stream: IterableDataset,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
        block_size: int = 10_000,
        content: str = "",
    ):
        self.stream, self.batch_size, self.seed, self.block_size = stream, batch_size, seed, block_size
        self.process_index, self.num_processes = process_index, num_processes
        self.shares_shards = stream.num_shards % num_processes == 0
        # A position is valid only for this order.
        self.identity = {
            "shards": stream.num_shards,
            "processes": num_processes,
            "shuffle_buffer": self.block_size,
            "seed": seed,
            "content": content,
        }

    def batches(self, position: Position | None) -> Iterator[tuple[list[Item], Position]]:
        """Yields endless batches from a position (None: the beginning) of the same number of processes."""
        check_same(position, self.identity)
        items = self._items(position)
        while True:
            batch = list(itertools.islice(items, self.batch_size))
            yield [item for item, _ in batch], batch[-1][1]

    def _items(self, position: Position | None) -> Iterator[tuple[Item, Position]]:
        taken = position["taken"] if position else 0
        for block, start in _read_ahead(self._blocks(position)):
            generator = np.random.default_rng([self.seed, start["epoch"], start["block"], self.process_index])
            order = generator.permutation(len(block))
            for number in range(taken, len(block)):
                record, in_epoch = block[order[number]]
                yield Item(record, (self.seed, start["epoch"], in_epoch)), {**start, "taken": number + 1}
            taken = 0

    def _blocks(self, position: Position | None) -> Iterator[tuple[list[tuple[dict, int]], Position]]:
        """Yields blocks of records, each record with its number in the epoch, and the position at which the block starts."""
        beginning = {"block": 0, "shard": 0, "read": 0, "state": None, **self.identity}
        start = position or {"epoch": 0, **beginning}
        while True:
            block = []
            for record, read, shard, stream in self._rest_of_epoch(start):
                in_epoch = (read - 1) * self.num_processes + self.process_index if self.shares_shards else read - 1
                block.append((record, in_epoch))
                if len(block) == self.block_size:
                    yield block, start
                    here = {"block": start["block"] + 1, "shard": shard, "read": read, "state": stream.state_dict()}
                    block, start = [], {**start, **here}
            if start["block"] == 0 and not block:
                raise ValueError(
                    f"the training stream has no image for process {self.process_index} of {self.num_processes}"
                )
            if block:
                yield block, start
            start = {"epoch": start["epoch"] + 1, **beginning}

    def _rest_of_epoch(self, start: Position) -> Iterator[tuple[dict, int, int, IterableDataset]]:
        """Reads this process's records: record, records read so far, number of the shard in the epoch, its stream."""
        read, state, number_of_shards = start["read"], start["state"], self.stream.num_shards
        order = np.random.default_rng([self.seed, start["epoch"]]).permutation(number_of_shards)
        if self.shares_shards:
            order = order[self.process_index :: self.num_processes]
        for shard in range(start["shard"], len(order)):
            stream = self.stream.shard(number_of_shards, int(order[shard]))
            if state is not None:
                stream.load_state_dict(state)
                state = None
            for record in records_of(stream):
                read += 1
                if self.shares_shards or (read - 1) % self.num_processes == self.process_index:
                    yield record, read, shard, stream


def check_same(position: Position | None, identity: dict[str, Any]) -> None:
    """Raises ValueError if a position in the data is not for this order."""
    for name, value in identity.items():
        if position is None or position.get(name) == value:
            continue
        if name == "content":
            raise ValueError(
                "cannot resume at this position in the data: the training images are not those that the run has read; restore "
                "them, or start a new run with --model CHECKPOINT"
            )
        raise ValueError(
            f"cannot resume at this position in the data: it is for {name}={position.get(name)}, but the run has "
            f"{name}={value}"
        )


def _read_ahead(iterator: Iterator[T]) -> Iterator[T]:
    """Yields the same values; a thread prepares the next two in advance."""
    ready, end = queue.Queue(maxsize=1), threading.Event()

    def put(value: tuple[Any, BaseException | None]) -> bool:
        while not end.is_set():
            try:
                ready.put(value, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for value in iterator:
                if not put((value, None)):
                    return
        except BaseException as error:  # raised where the values are used
            put((None, error))

    thread = threading.Thread(target=read, daemon=True, name="optvq-stream")
    thread.start()
    try:
        while True:
            value, error = ready.get()
            if error is not None:
                raise error
            yield value
    finally:
        end.set()
        thread.join(timeout=5)
