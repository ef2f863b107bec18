"""Trains the levels of item ids: codes by k-means level by level, then moving averages of what transport assigns to them."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from tqdm.auto import tqdm

from ..residual_optvq import ResidualOptVQQuantizer
from ..training.codebook import FEATURES_PER_CODE, cluster_centres, set_codebook, what_levels_get
from .embeddings import Embeddings


# Weight of the codes of earlier steps in the moving averages. All codes settle within some ten steps.
EMA_DECAY = 0.9
# Threads of training on a CPU: another number might round sums differently, and give other ids. More than there are cores
# would wait for each other.
THREADS = 1


def train_quantizer(
    embeddings: Embeddings,
    num_quantizers: int,
    codebook_size: int,
    max_steps: int,
    batch_size: int,
    epsilon: float,
    seed: int,
    device: torch.device,
    assignment: str = "sinkhorn",
) -> ResidualOptVQQuantizer:
    """A quantizer of (N, dim) embeddings, on the CPU; by this process alone.

    Codes are averages of embeddings, so there is no learning rate that would have to fit their scale. Transport shares every
    batch out evenly among the codes of a level, so none dies.

    Args:
        assignment: That of training, see [`~quantizer_optvq.OptVQQuantizer`].

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If there are fewer embeddings than codes.
    """
    if len(embeddings) < codebook_size:
        raise ValueError(f"{len(embeddings):,} items are fewer than the {codebook_size:,} codes: lower --codebook-size")
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, len(embeddings))
    quantizer = ResidualOptVQQuantizer(
        num_quantizers,
        codebook_size,
        embeddings.dim,
        epsilon=epsilon,
        training_assignment=assignment,
        use_projection=False,
        codebook_update="ema",
        ema_decay=EMA_DECAY,
    )
    with _pinned_threads(), torch.no_grad():
        first = next(_draws(len(embeddings), min(FEATURES_PER_CODE * codebook_size, len(embeddings)), generator))
        for level, rest in what_levels_get(quantizer, embeddings.take(first)):
            set_codebook(level, cluster_centres(rest, codebook_size, seed), batch_size / codebook_size)
        quantizer.to(device).train()
        quantizer.synchronize = False
        draws = islice(_draws(len(embeddings), batch_size, generator), max_steps)
        for drawn in tqdm(draws, total=max_steps, desc="training", unit="step", disable=None):
            quantizer(embeddings.take(drawn).to(device), return_loss=False)
        quantizer.synchronize = True
    return quantizer.cpu().eval()


def _draws(number: int, batch_size: int, generator: torch.Generator) -> Iterator[np.ndarray]:
    """Endless batches of positions, in a new order for every epoch; what remains of an epoch is not used."""
    while True:
        order = torch.randperm(number, generator=generator).numpy()
        for start in range(0, number - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


@contextmanager
def _pinned_threads() -> Iterator[None]:
    """Computes with [`THREADS`] threads, whatever was set."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)
