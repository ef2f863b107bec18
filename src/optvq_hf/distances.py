"""Distances between features and codes, a block of rows at a time, and the nearest-neighbour search built on them.

Features z_n (N, d) and codes c_k (K, d) of any float dtype; the work is done in float32, or in float64 if an input is
float64. Distances come from one matrix product per block, ||z - c||^2 = ||z||^2 + ||c||^2 - 2 z.c, with the origin moved
to the middle of the codebook first: distances do not depend on the origin, but far away from it the product loses its digits.
"""

import math
from collections.abc import Callable, Iterator

import torch


# Default for an N x K matrix: 32,768 features x 16,384 codes in float32.
MEMORY_BUDGET = 2 * 1024**3
# Elements of one row block, 16 MB in float32. Smaller blocks suit the caches of an idle machine better by a third, but every
# operation on one ends with all threads waiting for the last: with another process on the cores, small blocks take 10 to 100
# times as long.
BLOCK_ELEMENTS = 2**22


@torch.no_grad()
def nearest_assign(features: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Nearest code of every feature, decided row by row: no feature affects another's code.

    Args:
        features: (N, d) float.
        codebook: (K, d) float.

    Returns:
        (N,) int64 in [0, K); the lowest index among equally near codes.

    Raises:
        ValueError: For shapes that do not fit, an empty codebook, NaN, inf or overflowing values in the input.
    """
    return best_codes(*prepare(features, codebook), score=torch.neg)


def best_codes(
    features: torch.Tensor, codebook: torch.Tensor, score: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Code with the highest score for each row, the same whatever rows stand beside it.

    A matrix product rounds differently for different numbers of rows, which could flip near-ties between codes. So each
    squared distance is taken as an interval, its value +- the error bound of the product. A row whose best interval lies
    apart from all others is decided; for the others (few, unless codes crowd together far from the origin) the distances
    are computed again from differences, pair by pair. While torch.compile or torch.export traces, the value decides.

    Args:
        features, codebook: As [`prepare`] returns them.
        score: (B, K) squared distances to scores, falling in every entry.

    Returns:
        (N,) int64; the lowest index among equals.
    """
    codes = []
    code_norms = codebook.square().sum(dim=1)
    relative_error = (4 + 2 * math.sqrt(codebook.shape[1])) * torch.finfo(codebook.dtype).eps
    with full_precision(features):
        for rows in row_blocks(features, len(codebook)):
            norms = rows.square().sum(dim=1, keepdim=True)
            product = (rows @ codebook.T).mul_(-2)
            pessimistic = score(((1 + relative_error) * code_norms + product).add_((1 + relative_error) * norms))
            best, chosen = pessimistic.max(dim=1)
            if not torch.compiler.is_compiling():
                optimistic = score(product.add_((1 - relative_error) * code_norms).add_((1 - relative_error) * norms))
                open_rows = ((optimistic >= best[:, None]).sum(dim=1) > 1).nonzero().squeeze(1)
                exact = torch.cdist(rows[open_rows], codebook, compute_mode="donot_use_mm_for_euclid_dist").square()
                chosen[open_rows] = score(exact).argmax(dim=1)
            codes.append(chosen)
    return torch.cat(codes)


class DistanceBlocks:
    """Iterates over the distances in blocks of rows: kept in memory where they fit, recomputed on every pass otherwise.

    Args:
        features, codebook: As [`prepare`] returns them.
        memory_budget: Bytes the whole N x K matrix may take; 2 GiB by default.
    """

    def __init__(self, features: torch.Tensor, codebook: torch.Tensor, memory_budget: int | None = None):
        budget = MEMORY_BUDGET if memory_budget is None else memory_budget
        bytes_needed = len(features) * len(codebook) * features.element_size()
        self._features, self._codebook, self._factor = features, codebook, None
        self._kept = list(self._compute()) if bytes_needed <= budget else None

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self._compute() if self._kept is None else iter(self._kept)

    def _compute(self) -> Iterator[torch.Tensor]:
        for rows in row_blocks(self._features, len(self._codebook)):
            block = euclidean(rows, self._codebook)
            yield block if self._factor is None else block.mul_(self._factor)

    def scaled_by(self, factor: torch.Tensor) -> "DistanceBlocks":
        """Multiplies every entry, in place."""
        self._factor = factor
        for block in self._kept or ():
            block.mul_(factor)
        return self


def row_blocks(features: torch.Tensor, num_codes: int) -> tuple[torch.Tensor, ...]:
    """Views of (B, d) rows whose (B, num_codes) scores make one block; a single empty one if there are no rows."""
    return features.split(max(1, BLOCK_ELEMENTS // num_codes))


def euclidean(rows: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """(B, K) Euclidean distances of rows (B, d) to all codes, by one matrix product."""
    squared = torch.addmm(codebook.square().sum(dim=1), rows, codebook.T, alpha=-2)
    return squared.add_(rows.square().sum(dim=1, keepdim=True)).clamp_min_(0).sqrt_()


def prepare(features: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks both, and returns them in the working dtype, with the middle of the codebook as origin."""
    if features.ndim != 2 or codebook.ndim != 2 or features.shape[1] != codebook.shape[1]:
        raise ValueError(
            "features must be (N, d) and codebook (K, d) with the same d, "
            f"got {tuple(features.shape)} and {tuple(codebook.shape)}"
        )
    if len(codebook) == 0:
        raise ValueError("codebook must hold at least one code, got none")
    if not (features.is_floating_point() and codebook.is_floating_point()):
        raise ValueError(f"features and codebook must be floating point, got {features.dtype} and {codebook.dtype}")
    dtype = torch.promote_types(torch.promote_types(features.dtype, codebook.dtype), torch.float32)
    features, codebook = features.to(dtype), codebook.to(dtype)
    check_finite(features, "features")
    check_finite(codebook, "codebook")
    # A median, of some codes, because a single far-away code would drag the mean along.
    origin = codebook[:: max(1, len(codebook) // 256)].median(dim=0).values
    return features - origin, codebook - origin


def check_finite(tensor: torch.Tensor, name: str):
    """Raises ValueError for NaN, inf, and values whose squares overflow.

    Skipped while torch.compile or torch.export is tracing.
    """
    if torch.compiler.is_compiling() or tensor.numel() == 0:
        return
    largest = tensor.abs().max().item()  # NaN if there is one
    if not math.isfinite(largest):
        raise ValueError(f"found NaN or inf in {name}")
    limit = math.sqrt(torch.finfo(tensor.dtype).max / (64 * max(tensor.shape[-1], 1)))
    if largest > limit:
        raise ValueError(f"{name} are too large for {tensor.dtype}: up to {largest:.1e}, the limit is {limit:.1e}")


def full_precision(tensor: torch.Tensor) -> torch.autocast:
    """Autocast off: neither distances nor the logarithms of small masses survive bfloat16."""
    return torch.autocast(tensor.device.type, enabled=False)
