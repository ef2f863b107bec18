"""What the rounds of the solver ask of the N x K matrix of distances, and the answers in torch, block by block.

The rounds (see `sinkhorn.py`) know [`RowPasses`] alone: five questions, each answered in one pass over the rows.
[`BlockedRows`] answers them with one exponential per entry of the matrix, not one per entry and round, and without over- or
underflow at any scale s. It keeps the kernel

    E_nk = exp(-s (D_nk - r_k - o_n)),        o_n = min_k(D_nk - r_k),

with a reference distance r_k per code, such that the largest entry of every row and of every column is (about) 1. With
v_k = exp(g_k - s r_k), row n of the plan is E_nk v_k / sum_j E_nj v_j: a round is two matrix-vector products.

At first r_k is the distance of code k to its nearest feature, which suits potentials near g = s r. While g has moved by less
than e^40 from the potentials that the kernel suits, rounds can reuse this kernel without overflow; beyond, it is computed
again with a reference that suits the new ones. This is the absorption of Schmitzer (2019), "Stabilized Sparse Scaling
Algorithms for Entropy Regularized Transport Problems", section 3.1.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist

from .distances import Distances, GivenDistances, KeptMatrix, double_dtype, row_blocks
from .nearest import best_of_pairs, largest_of_row, top_two


# Default for the rows that are kept: 32,768 features x 16,384 codes in float32.
MEMORY_BUDGET = 2 * 1024**3
# Of base 2. Smaller entries of the kernel are beyond the precision of every sum they enter, and denormal numbers, which are
# slow on many processors, are near.
SMALLEST_EXPONENT = -115.0
LARGEST_MOVE = 40.0
# Codes that the kernel cannot tell apart are a tie, unless their exact scores differ by more than this.
LARGEST_TIE = 5e-4


class Statistics(NamedTuple):
    """Of all distances D of all ranks.

    Attributes:
        count: 0-dim, N K.
        mean: 0-dim.
        squared_deviations: 0-dim, sum of (D - mean)^2.
        nearest: (K,), the distance of every code to its nearest feature; 0 without features.
    """

    count: torch.Tensor
    mean: torch.Tensor
    squared_deviations: torch.Tensor
    nearest: torch.Tensor


class RowPasses(Protocol):
    """One pass over the rows each, with S = -s D. K-vectors are float64 where the device has it, and the same on all ranks.

    Attributes:
        log_num_rows: 0-dim, log N of all ranks together; 0 if there are none.
    """

    log_num_rows: torch.Tensor

    def statistics(self) -> Statistics: ...

    def set_scale(self, scale: torch.Tensor) -> None:
        """s, 0-dim. After `statistics`."""

    def log_column_sums(self) -> torch.Tensor:
        """logsumexp_n S_nk, (K,)."""
        ...

    def log_mass(self, g: torch.Tensor) -> torch.Tensor:
        """logsumexp_n log_softmax_k(S_nk + g_k), (K,)."""
        ...

    def most_likely(self, g: torch.Tensor) -> torch.Tensor:
        """argmax_k(S_nk + g_k) for the rows of this rank, (N,) int64. Ties go to the nearest code."""
        ...


class BlockedRows:
    """[`RowPasses`] in torch, in blocks of rows.

    As many blocks as fit the memory budget are kept from pass to pass, first as distances and then as kernel. The others are
    computed again in every pass. A context manager, whose end leaves the memory to the next.

    Args:
        distances: Of the rows of this rank.
        memory_budget: Bytes for the blocks that are kept; 2 GiB by default.
        process_group: The matrix consists of the rows of all ranks of this group.
    """

    def __init__(
        self,
        distances: Distances | GivenDistances,
        memory_budget: int | None = None,
        process_group: "dist.ProcessGroup | None" = None,
    ):
        (num_rows, num_codes), like = distances.shape, distances.like
        self._distances, self._like, self._process_group = distances, like, process_group
        self._double = double_dtype(like.device)
        self._blocks = list(row_blocks(num_rows, num_codes, like.device))
        budget = MEMORY_BUDGET if memory_budget is None else memory_budget
        row_bytes = num_codes * like.dtype.itemsize
        self._num_kept = max((rows.stop for rows in self._blocks if rows.stop * row_bytes <= budget), default=0)
        self._block_size = self._blocks[0].stop if self._blocks else 0
        self._offsets = like.new_empty(num_rows)
        self._kept_are: str | None = None  # "distances", or "kernel"
        self._num_rows = self._total(like.new_full((), num_rows))
        self.log_num_rows = self._num_rows.clamp_min(1).to(self._double).log()

    def __enter__(self) -> "BlockedRows":
        num_rows, num_codes = self._distances.shape
        streamed = 0 if self._num_kept == num_rows else self._block_size
        self._memory = KeptMatrix((self._num_kept + streamed + self._block_size, num_codes), self._like)
        self._scratch = self._memory.matrix[self._num_kept + streamed :]
        return self

    def __exit__(self, *error: object) -> None:
        self._memory.release()

    # ---- the passes

    def statistics(self) -> Statistics:
        nearest = self._like.new_full(self._distances.shape[1:], math.inf)
        moments = [self._like.new_zeros(3)]
        for _, block in self._distance_blocks():
            nearest = torch.minimum(nearest, block.amin(dim=0))
            moments.append(block_moments(block, self._scratch[: len(block)]))
        statistics = merged_statistics(torch.stack(moments).to(self._double), nearest, self._process_group)
        self._nearest = statistics.nearest
        return statistics

    def set_scale(self, scale: torch.Tensor, nearest: torch.Tensor | None = None) -> None:
        """As [`RowPasses.set_scale`]. With `nearest` as of all rows of all ranks, `statistics` is not needed."""
        self._scale = scale
        self._nearest = self._nearest if nearest is None else nearest
        self._set_reference(self._nearest)

    def log_column_sums(self) -> torch.Tensor:
        sums = torch.zeros_like(self._reference)
        for rows, kernel in self._kernel_blocks():
            sums += weighted_column_sums(kernel, (-self._scale * self._offsets[rows]).exp_())
        return self._log_total(sums) - self._scaled_reference

    def log_mass(self, g: torch.Tensor) -> torch.Tensor:
        self._make_suit(g)
        log_v = g - self._scaled_reference
        log_v -= log_v.amax()
        v = log_v.exp().to(self._like.dtype)
        sums = torch.zeros_like(v)
        for _, kernel in self._kernel_blocks():
            # Row by row in two steps, not as a product with v: the columns find the block in the cache.
            row_sums = torch.mul(kernel, v, out=self._scratch[: len(kernel)]).sum(dim=1)
            sums += weighted_column_sums(kernel, row_sums.reciprocal_())
        return self._log_total(sums) + log_v

    def most_likely(self, g: torch.Tensor) -> torch.Tensor:
        """As [`RowPasses.most_likely`]; rows that rounding leaves open are decided in float64.

        With fewer features than codes, one row often gives the same mass to many codes, which only rounding tells apart.
        """
        distances = self._distances
        assert isinstance(distances, Distances), "a given cost has no features to decide open rows by"
        g = g.to(self._double)  # the kernel must suit potentials to the last digit that they have
        self._make_suit(g)
        largest_square = 4 * distances.row_squares.mean()
        error = self._score_error(distances, largest_square)
        log_v = g - self._scaled_reference
        factors = (log_v - log_v.amax() + error).exp().to(self._like.dtype)  # of upper bounds
        centres, discounts = (
            (-i * error).exp().to(self._like.dtype) for i in (1, 2)
        )  # from there to the plan, and below
        # Entries of the plan that differ by less may be equal. (The plan is meant up to a factor per row.)
        roundings = (-16 * torch.finfo(self._like.dtype).eps * (1 + self._scale * self._nearest)).exp()
        is_large = distances.row_squares > largest_square
        codes = torch.empty_like(self._offsets, dtype=torch.int64)
        for rows, kernel in self._kernel_blocks():
            upper = torch.mul(kernel, factors, out=self._scratch[: len(kernel)])
            best, codes[rows], runner_up = top_two(upper)
            is_decided = (runner_up < best * discounts[codes[rows]]) & ~is_large[rows]  # not where a bound is infinite
            open_rows = is_decided.logical_not_().nonzero().squeeze(1)
            if len(open_rows) == 0:
                continue
            bounds = upper[open_rows]
            is_candidate = bounds >= (bounds * discounts).nan_to_num_(0).amax(dim=1, keepdim=True)
            pairs = is_candidate.nonzero()
            n, k = pairs.unbind(dim=1)
            plan = bounds[n, k] * centres[k]
            tie = LARGEST_TIE * (plan >= largest_of_row(plan, n, len(bounds))[n] * roundings[k])
            chosen = rows.start + open_rows
            candidates, codebook = distances.points.exact(chosen)
            codes[chosen] = best_of_pairs(candidates, codebook, pairs, g, self._scale, tie, distances.points.root)
        return codes

    # ---- the kernel

    def _make_suit(self, g: torch.Tensor) -> None:
        """Computes the kernel again if g is too far from the potentials that it suits. A constant in g changes nothing.

        The new reference is min_n(D_nk + f_n / s) with f_n = logsumexp_k(S_nk + g_k). Then v_k <= 1, and v_k >= 1 / K for every
        code that is the best of a row.
        """
        low, high = (g - self._suits).aminmax()
        if (high - low).item() < LARGEST_MOVE:
            return
        reference = torch.full_like(self._reference, math.inf)
        shifts = (g / self._scale).to(reference.dtype)
        for _, block in self._distance_blocks():
            scores = torch.sub(block, shifts, out=self._scratch[: len(block)])
            nearest = scores.amin(dim=1)
            row_potentials = exponentiate_(scores, self._scale, nearest).sum(dim=1).log_() / self._scale - nearest
            sums = torch.add(block, row_potentials[:, None], out=scores)
            reference = torch.minimum(reference, sums.amin(dim=0))
        self._set_reference(self._minimum(reference).nan_to_num(posinf=0.0), suits=g)

    def _set_reference(self, reference: torch.Tensor, suits: torch.Tensor | None = None) -> None:
        """Sets r (K,), and the potentials that it suits, by default s r."""
        self._reference, self._scaled_reference = reference, self._scale * reference.to(self._double)
        self._suits = self._scaled_reference if suits is None else suits
        self._has_offsets = False
        if self._kept_are == "kernel":
            self._kept_are = None

    def _distance_blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Blocks of D, not to be written to."""
        for rows in self._blocks:
            yield rows, self._distances_of(rows)
        self._kept_are = "distances"

    def _kernel_blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Blocks of E, not to be written to."""
        for rows in self._blocks:
            if self._kept_are == "kernel" and rows.stop <= self._num_kept:
                yield rows, self._place(rows)
                continue
            block = self._distances_of(rows).sub_(self._reference)
            if not self._has_offsets:
                self._offsets[rows] = block.amin(dim=1)
            yield rows, exponentiate_(block, self._scale, self._offsets[rows])
        self._kept_are, self._has_offsets = "kernel", True

    def _distances_of(self, rows: slice) -> torch.Tensor:
        place = self._place(rows)
        is_there = self._kept_are == "distances" and rows.stop <= self._num_kept
        return place if is_there else self._distances.of_rows(rows, out=place)

    def _place(self, rows: slice) -> torch.Tensor:
        """Memory of a block: its own if it is kept, or that of all others."""
        start = min(rows.start, self._num_kept)
        return self._memory.matrix[start : start + rows.stop - rows.start]

    def _score_error(self, distances: Distances, largest_square: torch.Tensor) -> torch.Tensor:
        """(K,): how far log E_nk may be off, for rows of up to this squared norm.

        If a squared distance is off by e, its root is off by e / D at most, and by the root of e. No distance to a code is
        below that of the code's nearest feature. Differences of distances add some ulps of these, and exponents some of 1.
        """
        e, eps = distances.squared_error(largest_square), torch.finfo(self._like.dtype).eps
        if distances.points.root:
            error = e / torch.maximum(self._nearest, e.sqrt())
            error += 2 * eps * (largest_square + distances.code_squares).sqrt()
        else:
            error = e + 4 * eps * (largest_square + distances.code_squares)
        return self._scale.to(self._double) * error + 256 * eps

    # ---- all ranks

    def _log_total(self, of_this_rank: torch.Tensor) -> torch.Tensor:
        """Logarithm of the sum over ranks. A sum of 0, of a code far from all features, is raised to the smallest number."""
        total = self._total(of_this_rank)
        return total.clamp_min(torch.finfo(total.dtype).tiny).to(self._double).log_()

    def _total(self, of_this_rank: torch.Tensor) -> torch.Tensor:
        return over_ranks(of_this_rank, "SUM", self._process_group)

    def _minimum(self, of_this_rank: torch.Tensor) -> torch.Tensor:
        return over_ranks(of_this_rank, "MIN", self._process_group)


def merged_statistics(
    moments: torch.Tensor, nearest: torch.Tensor, process_group: "dist.ProcessGroup | None" = None
) -> Statistics:
    """Statistics of all ranks.

    Args:
        moments: (B, 3), of blocks of this rank: count, mean and sum of squared deviations from it. Merged as in Chan, Golub and
            LeVeque (1983).
        nearest: (K,), the distance of every code to its nearest feature of this rank; inf without features.
    """
    if process_group is None and len(moments) == 1:
        count, mean, deviations = moments[0].unbind()
        return Statistics(count, mean, deviations, nearest.nan_to_num(posinf=0.0))
    counts, means, deviations = moments.unbind(dim=1)
    count = over_ranks(counts.sum(), "SUM", process_group)
    mean = over_ranks((counts * means).sum(), "SUM", process_group) / count.clamp_min(1)
    deviations = over_ranks((deviations + counts * (means - mean).square()).sum(), "SUM", process_group)
    return Statistics(count, mean, deviations, over_ranks(nearest, "MIN", process_group).nan_to_num(posinf=0.0))


def over_ranks(
    of_this_rank: torch.Tensor, operation: Literal["SUM", "MIN"], process_group: "dist.ProcessGroup | None"
) -> torch.Tensor:
    """The sum or minimum over all ranks of a group, in place."""
    if process_group is not None:
        dist.all_reduce(of_this_rank, getattr(dist.ReduceOp, operation), group=process_group)
    return of_this_rank


# ---- what a CPU needs ------------------------------------------------------------------------------------------------

LOG2_E = math.log2(math.e)


def exponentiate_(distances: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Replaces (B, K) distances by exp(-s (D_nk - offset_n)), for offsets (B,) of the rows and a 0-dim s.

    With a power of 2: 1.5 times as fast as one of e on a CPU (scripts/benchmark_row_functions.py).
    """
    return distances.sub_(offsets[:, None]).mul_(-scale * LOG2_E).clamp_min_(SMALLEST_EXPONENT).exp2_()


def weighted_column_sums(block: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """weights @ block, (K,), for weights (B,).

    Two products of half the rows each run on two threads: 1.2 to 1.6 times as fast (scripts/benchmark_row_functions.py).
    """
    half = len(block) // 2
    halves = torch.bmm(weights[: 2 * half].view(2, 1, half), block[: 2 * half].view(2, half, block.shape[1])).sum(
        (0, 1)
    )
    return torch.add(halves, weights[-1] * block[-1]) if len(block) % 2 else halves


def block_moments(block: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Count, mean and sum of squared deviations from the mean of a block, (3,).

    As sums of the differences to the mean of some rows, which is near enough to the mean of all for them not to cancel: 4 to 5
    times as fast as torch.var_mean (scripts/benchmark_row_functions.py).
    """
    near_mean = block[::8].mean()
    differences = torch.sub(block, near_mean, out=scratch)
    mean = differences.mean()
    # torch's sum keeps its digits over millions of numbers, which torch.dot does not.
    deviations = (differences.square_().sum() - block.numel() * mean.square()).clamp_min(0)
    return torch.stack([torch.full_like(mean, block.numel()), near_mean + mean, deviations])
