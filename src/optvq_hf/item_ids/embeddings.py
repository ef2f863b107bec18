"""Embeddings of items: read in batches from any source, checked, and kept in one float32 file that processes share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from ..data.fetching import dataset_errors
from ..data.loading import load_columns
from .arguments import EmbeddingArguments


pc: Any = pyarrow.compute  # makes its functions at import, where type checkers do not see them
# Rows that are read, and given ids, together.
BLOCK_ROWS = 8192
# What the largest number of all embeddings may be, so that squares keep their precision in float32.
SMALLEST, LARGEST = 1e-12, 1e12


@dataclass
class Embeddings:
    """Embeddings in the order of their keys, which does not depend on the order of the source.

    Args:
        path: File of (N, dim) float32 in the order of the source.
        dim: Their width.
        order: (N,) int64, the rows of the file in the order of the keys.
    """

    path: Path
    dim: int
    order: np.ndarray

    def __len__(self) -> int:
        return len(self.order)

    @cached_property
    def _rows(self) -> np.ndarray:
        return np.memmap(self.path, np.float32, "r", shape=(len(self.order), self.dim))

    def take(self, positions: slice | np.ndarray) -> torch.Tensor:
        """Embeddings (n, dim) float32 at these positions among the sorted keys."""
        return torch.from_numpy(np.asarray(self._rows[self.order[positions]]))

    @property
    def num_blocks(self) -> int:
        return -(-len(self) // BLOCK_ROWS)

    def block(self, number: int) -> torch.Tensor:
        """The embeddings of a block of [`BLOCK_ROWS`] keys."""
        return self.take(slice(number * BLOCK_ROWS, (number + 1) * BLOCK_ROWS))


def read_embeddings(arguments: EmbeddingArguments, path: Path) -> tuple[pa.Array, Embeddings]:
    """Copies the embeddings of a source to a file, in batches; returns the sorted keys and the embeddings.

    Args:
        path: The file, which is written.

    Raises:
        FileNotFoundError: For a source that does not exist or cannot be reached.
        ValueError: For a missing column, rows of unequal width, NaN, numbers that are too large or small, keys that come twice,
            or no rows.
    """
    all_keys, first, width, largest = [], 0, None, 0.0
    no_rows = f"dataset {arguments.dataset!r} has no rows"
    with open(path, "wb") as file, _said_if_empty(no_rows), tqdm(desc="reading", unit="row", disable=None) as bar:
        for keys, vectors in _batches(arguments):
            width = width or vectors.shape[1]
            if vectors.shape[1] != width:
                raise ValueError(f"row {first} has {vectors.shape[1]} numbers, the rows before it {width}")
            with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite
                vectors = np.ascontiguousarray(vectors, dtype=np.float32)
            wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
            if len(wrong):
                raise ValueError(
                    f"the embedding of row {first + wrong[0]} (key {keys[int(wrong[0])].as_py()!r}) has NaN, infinite or "
                    "missing numbers, or some beyond float32: repair or remove such rows"
                )
            largest = max(largest, float(np.abs(vectors).max(initial=0)))
            vectors.tofile(file)
            all_keys.append(keys)
            first += len(keys)
            bar.update(len(keys))
    if width is None:
        raise ValueError(no_rows)
    if largest > LARGEST or 0 < largest < SMALLEST:
        raise ValueError(
            f"the largest number of the embeddings is {largest:.1e}, and must be between {SMALLEST:.0e} and {LARGEST:.0e}: "
            "multiply all of them by the same number"
        )
    keys = pa.chunked_array(all_keys)
    order = pc.sort_indices(keys)
    keys = keys.take(order).combine_chunks()
    again = pc.index(pc.equal(keys[1:], keys[:-1]), True).as_py()
    if again >= 0:
        raise ValueError(f"key {keys[again].as_py()!r} comes twice: every item needs a key of its own")
    return keys, Embeddings(path, width, np.asarray(order, dtype=np.int64))


@contextmanager
def _said_if_empty(message: str) -> Iterator[None]:
    """Says that a Parquet file has no rows, where datasets 5.2 says that pyarrow got a batch size of 0."""
    try:
        yield
    except ValueError as error:
        if "BatchSize must be greater than 0" not in str(error):
            raise
        raise ValueError(message) from error


def _batches(arguments: EmbeddingArguments) -> Iterator[tuple[pa.Array, np.ndarray]]:
    """Keys (n,), int64 or large_string, and embeddings (n, width) of any numbers."""
    if arguments.is_array:
        return _of_array(Path(arguments.dataset or ""))
    if arguments.is_tensors:
        return _of_tensors(Path(arguments.dataset or ""), arguments)
    return _of_dataset(arguments)


def _of_array(path: Path) -> Iterator[tuple[pa.Array, np.ndarray]]:
    array = _mapped(path)
    _check_numbers(array.shape, array.dtype.kind in "fiu", f"{path} has {array.dtype}, shape {array.shape}")
    for start in range(0, len(array), BLOCK_ROWS):
        rows = array[start : start + BLOCK_ROWS]
        yield pa.array(np.arange(start, start + len(rows))), rows


def _mapped(path: Path) -> np.ndarray:
    try:
        with suppress(ValueError):  # of no rows, which cannot be mapped, and of what is no array of numbers
            return np.load(path, mmap_mode="r", allow_pickle=False)
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy file of numbers: {' '.join(str(error).split())}") from error


def _of_tensors(path: Path, arguments: EmbeddingArguments) -> Iterator[tuple[pa.Array, np.ndarray]]:
    names = {"embedding": arguments.embedding_column or "", "key": arguments.key_column or ""}
    try:
        file = safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is no .safetensors file: {error}") from error
    with file:
        for name in names.values():
            if name not in file.keys():  # noqa: SIM118
                raise ValueError(f"{path} has no tensor {name!r}; its tensors are {sorted(file.keys())}")
        vectors, keys = (file.get_slice(name) for name in names.values())
        shapes = vectors.get_shape(), keys.get_shape()
        kind = vectors.get_dtype()
        is_number = kind[0] in "FIU" or kind == "BF16"
        _check_numbers(shapes[0], is_number, f"tensor {names['embedding']!r} has {kind}, shape {tuple(shapes[0])}")
        if shapes[1] != shapes[0][:1] or keys.get_dtype()[0] not in "IU":
            raise ValueError(
                f"tensor {names['key']!r} has {keys.get_dtype()}, shape {tuple(shapes[1])}, keys must be "
                f"{shapes[0][0]} integers"
            )
        for start in range(0, shapes[0][0], BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            yield _keys(pa.array(keys[rows].numpy()), names["key"], start), vectors[rows].float().numpy()


def _of_dataset(arguments: EmbeddingArguments) -> Iterator[tuple[pa.Array, np.ndarray]]:
    embedding, key = arguments.embedding_column or "", arguments.key_column or ""
    what = f"cannot read dataset {arguments.dataset!r}"
    dataset = load_columns(arguments, arguments.split, [embedding, key]).with_format("arrow")
    with dataset_errors(what, arguments.dataset or ""):
        tables = dataset.iter(batch_size=BLOCK_ROWS)
    start, width = 0, None
    while True:
        with dataset_errors(what, arguments.dataset or ""):
            table: Any = next(tables, None)
        if table is None:
            return
        column, keys = (table.column(name).combine_chunks() for name in (embedding, key))
        vectors = _vectors(column, embedding, start, width)
        yield _keys(keys, key, start), vectors
        start, width = start + len(keys), vectors.shape[1]


def _vectors(column: pa.Array, name: str, first: int, width: int | None) -> np.ndarray:
    """A column of lists as an array; rows are counted from `first`."""
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise ValueError(f"column {name!r} holds {kind}, embeddings must be lists of numbers")
    if column.null_count:
        raise ValueError(
            f"row {first + pc.index(pc.is_null(column), True).as_py()} has no embedding in column {name!r}"
        )
    widths = pc.list_value_length(column).to_numpy()
    width = int(widths[0]) if width is None else width
    other = np.flatnonzero(widths != width)
    if len(other) or width == 0:
        row = int(other[0]) if len(other) else 0
        raise ValueError(f"row {first + row} of column {name!r} has {widths[row]} numbers, the rows before it {width}")
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), width)


def _keys(keys: pa.Array, name: str, first: int) -> pa.Array:
    """A column of keys as int64 or text; rows are counted from `first`."""
    if keys.null_count:
        raise ValueError(f"row {first + pc.index(pc.is_null(keys), True).as_py()} has no key in column {name!r}")
    return key_array(keys, f"column {name!r}")


def key_array(keys: pa.Array, where: str) -> pa.Array:
    """Keys as int64 or large_string; ValueError for other types."""
    kind = keys.type
    if pa.types.is_integer(kind):
        try:
            return keys.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise ValueError(f"{where} has keys beyond 64-bit signed integers: write them as text") from error
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return keys.cast(pa.large_string())
    raise ValueError(f"{where} holds {kind}, keys must be integers or text")


def _check_numbers(shape: Sequence[int], are_numbers: bool, what: str) -> None:
    if len(shape) != 2 or shape[1] == 0 or not are_numbers:
        raise ValueError(f"{what}, embeddings must be numbers of shape (N, d), d at least 1")
