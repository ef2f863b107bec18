"""The spread of the distances, by which they are divided before the exponential, in one pass over blocks of rows."""

import math
from collections.abc import Iterable
from typing import Literal

import torch

from .distances import row_blocks
from .kernel import Kernel


Normalization = Literal["zscore", "robust", "sqrt_dim", "none"]
NORMALIZATIONS = ("zscore", "robust", "sqrt_dim", "none")

# The robust spread looks at this many codes, spread evenly over the codebook, and at all features.
ROBUST_CODES = 64
# Median absolute deviation of a normal distribution of standard deviation 1.
NORMAL_DEVIATION = 0.6745


def spread_and_nearest(
    kernel: Kernel, normalization: Normalization, dim: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spread of all distances (0-dim), and for every code its distance to the nearest feature, (K,).

    "zscore" is the unbiased standard deviation of all entries; "robust" the median absolute deviation over 0.6745, which is
    the same for normally distributed distances, and which no outlier among features or codes can inflate; "sqrt_dim" the
    square root of `dim`; "none" is 1. The first two are raised by 1e-6, so that equal distances do not divide by zero.
    """
    nearest = kernel.offsets.new_full(kernel.source.shape[1:], math.inf)
    moments = []
    for _, block in kernel.distances():
        nearest = torch.minimum(nearest, block.amin(dim=0))
        if normalization == "zscore":
            moments.append(_moments(block, kernel.scratch(block)))
    nearest = kernel.minimum(nearest).nan_to_num(posinf=0.0)  # no features at all

    if normalization == "zscore":
        spread = _standard_deviation(moments, kernel) + 1e-6
    elif normalization == "robust":
        spread = _median_deviation(kernel, nearest.amin()) / NORMAL_DEVIATION + 1e-6
    else:
        spread = torch.full_like(kernel.num_rows, math.sqrt(dim) if normalization == "sqrt_dim" else 1.0)
    return spread, nearest


def _moments(block: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Count, mean and sum of squared deviations from that mean.

    In one sweep, of the differences to the mean of some rows: near enough to the mean of all for sums not to cancel.
    """
    near_mean = block[::8].mean()
    differences = torch.sub(block, near_mean, out=scratch)
    mean = differences.mean()
    # torch's sum keeps its digits over millions of numbers, which torch.dot does not.
    deviations = (differences.square_().sum() - block.numel() * mean.square()).clamp_min(0)
    return torch.stack([torch.full_like(mean, block.numel()), near_mean + mean, deviations])


def _standard_deviation(moments: list[torch.Tensor], kernel: Kernel) -> torch.Tensor:
    """Unbiased, from the moments of all blocks of all ranks, merged as in Chan, Golub and LeVeque (1983)."""
    moments = torch.stack(moments) if moments else kernel.offsets.new_zeros(0, 3)
    counts, means, deviations = moments.unbind(dim=1)
    count = kernel.total(counts.sum())
    mean = kernel.total((counts * means).sum()) / count.clamp_min(1)
    deviation = kernel.total((deviations + counts * (means - mean).square()).sum())
    return (deviation / (count - 1).clamp_min(1)).sqrt()


def _median_deviation(kernel: Kernel, smallest: torch.Tensor) -> torch.Tensor:
    """Median of |D - median(D)|, with D counted from its smallest entry, so that the histogram resolves it."""
    source = kernel.source.of_codes(slice(None, None, max(1, kernel.source.shape[1] // ROBUST_CODES)))

    def blocks():
        return (source.of_rows(rows).sub_(smallest).abs_() for rows in row_blocks(*source.shape, kernel.device))

    median = _median(blocks(), kernel)
    return _median(((block - median).abs_() for block in blocks()), kernel)


def _median(blocks: Iterable[torch.Tensor], kernel: Kernel) -> torch.Tensor:
    """Median of numbers >= 0, to within 0.4 %; 0-dim.

    From a histogram, because that adds up over blocks and ranks. A bin holds the numbers that agree in their exponent and
    the first 7 bits of their fraction: 128 bins for every doubling.
    """
    bits, integer, shift = (31, torch.int32, 16) if kernel.dtype == torch.float32 else (63, torch.int64, 45)
    counts = torch.zeros(2 ** (bits - shift), dtype=torch.int64, device=kernel.device)
    for block in blocks:
        bins = (block.view(integer) >> shift).flatten().long()
        counts.scatter_add_(0, bins, torch.ones_like(bins))
    cumulative = kernel.total(counts).cumsum(0)
    middle = torch.searchsorted(cumulative, (cumulative[-1:] + 1) // 2).to(integer)
    return ((middle << shift) + 2 ** (shift - 1)).view(kernel.dtype).squeeze(0)
