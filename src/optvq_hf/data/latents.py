"""Batches of latents that an encoder gave once."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset

from .batches import Batch, TrainingBatches
from .order import Item, Position, RowOrder


class LatentReader(TorchDataset[Batch]):
    """Reads the items of an order into a [`Batch`] of latents (B, C, H/f, W/f) float32, from files that stay on the disk.

    Args:
        latents: With a column `latents`; see [`~tokenization.latents.load_latents`].
    """

    def __init__(self, latents: Dataset):
        # Views of Arrow's files in memory: a thousand times as fast as rows of `datasets`.
        self.rows = _rows_of(latents)
        shape = latents.features["latents"].shape
        chunks = latents.data.column("latents").chunks
        self.chunks = [_as_numpy(chunk.storage).reshape(len(chunk), *shape) for chunk in chunks]
        self.starts = np.cumsum([0, *map(len, self.chunks)])

    def __getitems__(self, items_and_position: tuple[list[Item], Position]) -> Batch:
        items, position = items_and_position
        return Batch(torch.from_numpy(np.stack([self._latents(item.source) for item in items])), position, [])

    def _latents(self, row: Any) -> np.ndarray:
        number = self.rows[row]
        chunk = np.searchsorted(self.starts, number, side="right") - 1
        return self.chunks[chunk][number - self.starts[chunk]]


def _rows_of(latents: Dataset) -> np.ndarray:
    """The row of the table that every row of a dataset is."""
    indices = latents._indices  # of a selection; datasets 5.2 has no public name for it
    return np.arange(len(latents)) if indices is None else indices.column(0).to_numpy().astype(np.int64)


def _as_numpy(values: pa.Array) -> np.ndarray:
    """The numbers of nested lists, without a copy."""
    while isinstance(values, pa.ListArray):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=True)


def latent_batches(
    latents: Dataset, content: str, batch_size: int, seed: int = 0, process_index: int = 0, num_processes: int = 1
) -> TrainingBatches:
    """Endless shuffled batches of latents; every process gets its own share.

    Args:
        content: What tells these latents from others; a position in the data belongs to it.

    Raises:
        ValueError: If a process's share is smaller than one batch.
    """
    order = RowOrder(len(latents), batch_size, seed, process_index, num_processes, content=content)
    return TrainingBatches(order, LatentReader(latents))
