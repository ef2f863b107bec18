"""The five row passes in Triton: the N x K matrix is never written, and memory is O(N + K) beside copies of the inputs.

Every pass computes the distances again, in tiles that stay in registers. With weights w and c = s / ln 2, two of the passes
are one kernel, seen from the rows and from the columns:

    rows        a_n = log2 sum_k 2^(g_k / ln 2 - c D_nk)
    columns     log_mass_k = g_k + ln 2 log2 sum_n 2^(-a_n - c D_nk)

Sums are kept beside their largest exponent, so that nothing over- or underflows at any scale, and partial sums are merged in
float64 in a fixed order. Between the rounds nothing waits for the device.

float32 alone: [`~sinkhorn_rows.BlockedRows`] does what is in float64, and a given cost. It also decides the rows of the result
that rounding leaves open.
"""

import copy
import functools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from .costs import Points
from .distances import Distances, centred, double_dtype, row_blocks
from .sinkhorn_blocks import (
    Blocks,
    Method,
    choose_blocks,
    default_method,
    matrix_units,
    squared_error,
    stored_width,
)
from .sinkhorn_kernels import (
    LOG2_E,
    NOTHING,
    PADDING,
    log_sums_kernel,
    merge_log_sums_kernel,
    merge_top_two_kernel,
    moments_kernel,
    top_two_kernel,
)
from .sinkhorn_rows import LARGEST_TIE, BlockedRows, Statistics, merged_statistics, over_ranks


# Splits are made until there are so many warps, a few times what the largest devices hold at a time. Not a property of the
# device: sums are the same on all.
WARPS = 8192
LARGEST_SPLIT = 16384  # float32 sums so many positive numbers well within its last four digits
SMALLEST_SPLIT = 128
# Logarithm of the smallest mass of a code, far from all features.
SMALLEST_LOG_MASS = math.log(torch.finfo(torch.float64).tiny)
# Entries of open rows that are computed in float64 at once.
FEW_PAIRS = 2**20


class PaddedPoints:
    """Features or codes as the kernels read them.

    Args:
        points: (M, d) float32; centred unless the method is "direct".

    Attributes:
        count: M.
        stride: M with padding, at least `PADDING`.
        data: (d, stride) if computed in registers, else (stride, d with padding); 0 in the padding.
        squares: (stride,), the squared norms.
    """

    def __init__(self, points: torch.Tensor, method: Method):
        self.count, self.width = points.shape
        self.method: Method = method
        self.stride = max(1, -(-self.count // PADDING)) * PADDING
        self.squares = points.new_zeros(self.stride)
        self.squares[: self.count] = points.square().sum(dim=1)
        if method == "direct":
            self.data = points.new_zeros(self.width, self.stride)
            self.data[:, : self.count] = points.T
        else:
            self.data = points.new_zeros(self.stride, stored_width(self.width, method))
            self.data[: self.count, : self.width] = points

    def bound_below(self) -> "PaddedPoints":
        """The same, with squares such that squared distances from products are not above the exact ones, if both points are."""
        points = copy.copy(self)
        if self.method != "direct":
            info = torch.finfo(torch.float32)
            relative = squared_error(self.width, self.method) * info.eps / 2
            points.squares = self.squares * (1 - relative) - 4 * self.width * info.tiny
        return points

    def weights(self, values: torch.Tensor | float) -> torch.Tensor:
        """(stride,) float32: the values (M,), rounded, and NOTHING in the padding."""
        weights = self.data.new_full((self.stride,), NOTHING)
        weights[: self.count] = values
        return weights

    @functools.cached_property
    def zeros(self) -> torch.Tensor:
        """Weights of 0, not to be written to."""
        return self.weights(0.0)


class Tiles:
    """Launches the kernels.

    Args:
        features, codebook: (N, d), (K, d) float32, contiguous or not, on a device that Triton compiles for (or on a CPU, with
            its interpreter).
        blocks: Of some kernels, in place of the defaults.
        method: In place of the default for the width.
        root: Whether D is the distance, not its square.
    """

    def __init__(
        self,
        features: torch.Tensor,
        codebook: torch.Tensor,
        blocks: dict[str, Blocks] | None = None,
        method: Method | None = None,
        root: bool = True,
    ):
        self._root = root
        self.method: Method = method or default_method(features.shape[1], matrix_units(features.device))
        if self.method != "direct":
            features, codebook = centred(features, codebook)
        self.features, self.codes = PaddedPoints(features, self.method), PaddedPoints(codebook, self.method)
        self.device, self._blocks = features.device, blocks or {}

    def log_sums(
        self,
        outer: PaddedPoints,
        inner: PaddedPoints,
        weights: torch.Tensor,
        own_weights: torch.Tensor,
        factor: torch.Tensor,
    ) -> torch.Tensor:
        """ln sum_j 2^(w_i + w_j - factor D_ij), (M,) float64.

        Args:
            weights, own_weights: (stride,) float32, of the inner and of the outer points.
            factor: 0-dim float32.
        """
        return self._log_sums(outer, inner, weights, own_weights, factor, False)[: outer.count]

    def balancing_weights(
        self, outer: PaddedPoints, inner: PaddedPoints, weights: torch.Tensor, factor: torch.Tensor
    ) -> torch.Tensor:
        """-log2 sum_j 2^(w_j - factor D_ij), (stride,) float32: weights with which each outer point sums to 1."""
        return self._log_sums(outer, inner, weights, weights, factor, True)

    def _log_sums(
        self,
        outer: PaddedPoints,
        inner: PaddedPoints,
        weights: torch.Tensor,
        own_weights: torch.Tensor,
        factor: torch.Tensor,
        negated: bool,
    ) -> torch.Tensor:
        dtypes = [torch.float32] * 2
        maxima, sums = self._launch(log_sums_kernel, "log_sums", outer, inner, weights, factor, dtypes, self._root)
        merged = maxima.new_empty(outer.stride, dtype=torch.float32 if negated else torch.float64)
        arguments = (maxima, sums, own_weights, merged, outer.stride, outer.count, len(maxima))
        self._merge(merge_log_sums_kernel, outer, *arguments, NEGATED=negated)
        return merged

    def top_two(
        self, weights: torch.Tensor, factor: torch.Tensor, root: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The code (N,) int64 with the largest score w_k - factor D_nk of each row, and the second largest score (N,).

        `root` may be another here. For wide codes, with lower bounds of the distances.
        """
        features, codes = self.features.bound_below(), self.codes.bound_below()
        dtypes = [torch.float32, torch.int32, torch.float32]
        best, index, second = self._launch(
            top_two_kernel, "top_two", features, codes, weights, factor, dtypes, self._root if root is None else root
        )
        chosen = index.new_empty(features.stride, dtype=torch.int64)
        runner_up = best.new_empty(features.stride)
        self._merge(merge_top_two_kernel, features, best, index, second, chosen, runner_up, features.stride, len(best))
        return chosen[: features.count], runner_up[: features.count]

    def moments(self, near_mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """min_n D_nk (K,) float32, and the sums of D - near_mean and of its square over all entries, 0-dim float64."""
        dtypes = [torch.float32] * 3
        nearest, sums, square_sums = (
            found[:, : self.codes.count]
            for found in self._launch(
                moments_kernel, "moments", self.codes, self.features, self.features.zeros, near_mean, dtypes, self._root
            )
        )
        return nearest.amin(dim=0), sums.sum(dtype=torch.float64), square_sums.sum(dtype=torch.float64)

    def _launch(
        self,
        kernel: Any,
        name: str,
        outer: PaddedPoints,
        inner: PaddedPoints,
        weights: torch.Tensor,
        value: torch.Tensor,
        dtypes: list[torch.dtype],
        root: bool,
    ) -> list[torch.Tensor]:
        """What the kernel writes, (splits, outer.stride) each, of these dtypes."""
        blocks = self._blocks.get(name) or choose_blocks(name, outer.width, self.method, self.device)
        num_blocks = max(1, -(-outer.count // blocks.outer))
        split_size = split_of(num_blocks * blocks.num_warps, inner.count)
        num_splits = max(1, -(-inner.count // split_size))
        outputs = [weights.new_empty((num_splits, outer.stride), dtype=dtype) for dtype in dtypes]
        with self._on_device():
            kernel[(num_blocks, num_splits)](
                *(outer.data, outer.squares, inner.data, inner.squares, weights, value),
                *outputs,
                *(outer.stride, inner.stride, inner.count, split_size),
                DIM=stored_width(outer.width, self.method),
                OUTER=blocks.outer,
                INNER=blocks.inner,
                DEPTH=blocks.depth,
                METHOD=self.method,
                ROOT=root,
                num_warps=blocks.num_warps,
                num_stages=blocks.num_stages,
            )
        return outputs

    def _merge(self, kernel: Any, outer: PaddedPoints, *arguments: Any, **constants: bool) -> None:
        block = PADDING if self.device.type == "cpu" else 128
        with self._on_device():
            kernel[(outer.stride // block,)](*arguments, BLOCK=block, **constants)

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def split_of(num_warps: int, num_inner: int) -> int:
    """How many inner points one program reduces over, when all outer points make this many warps."""
    wanted = max(-(-WARPS // num_warps), -(-num_inner // LARGEST_SPLIT), 1)
    return max(SMALLEST_SPLIT, -(-num_inner // wanted // SMALLEST_SPLIT) * SMALLEST_SPLIT)


def decided_codes(
    points: Points,
    potentials: torch.Tensor | None = None,
    scale: torch.Tensor | float = 1.0,
    tie: torch.Tensor | float = 0.0,
    tiles: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """argmax_k(g_k - s D_nk), or the nearest codes if `potentials` is None, and which are beyond rounding; (N,) each.

    The kernel finds the code with the largest upper bound. It is decided if its lower bound, from differences of coordinates,
    is above the second largest upper bound.

    Args:
        points: In float32. The nearest codes do not depend on their `root`.
        potentials, scale: g (K,), and s >= 0.
        tie: (K,) or a number: codes that come so near to the best leave a row open.
        tiles: Of the points, if there are some already.
    """
    features, codebook = points.features, points.codebook
    tiles = tiles or Tiles(features, codebook)
    width, info, double = codebook.shape[1], torch.finfo(torch.float32), double_dtype(codebook.device)
    # Of sums of squared differences; the rest is for the root, the factor, and the difference to g.
    relative = (width + 16) * info.eps / 2
    underflow = 4 * width * info.tiny  # of squares
    s = codebook.new_ones((), dtype=double) * scale
    g = codebook.new_zeros(len(codebook), dtype=double) if potentials is None else potentials.to(double)
    root = points.root and potentials is not None  # nearest codes do not need it
    if root:
        upper, relative_of_cost = g + s * math.sqrt(underflow), relative / 2
    else:
        upper, relative_of_cost = g + s * underflow, relative
    if points.originals is not None:  # differences of rounded points
        upper = upper + 2 * info.eps * s * (tiles.features.squares.amax() + tiles.codes.squares.amax()).to(double)
    upper = upper + 2 * info.eps * upper.abs() + tie
    slope = s * (1 - relative_of_cost)
    codes, runner_up = tiles.top_two(tiles.codes.weights(upper), slope.float(), root)
    is_decided = torch.empty_like(codes, dtype=torch.bool)
    for rows in row_blocks(len(features), width, features.device):
        candidates, exact_codebook = points.exact(rows)
        distances = (candidates - exact_codebook[codes[rows]]).norm(dim=1).to(double)
        costs = distances + math.sqrt(underflow) if root else distances.square() + underflow
        is_decided[rows] = g[codes[rows]] - s * costs * (1 + relative_of_cost) > runner_up[rows]
    return codes, is_decided


class FusedRows:
    """[`~sinkhorn_rows.RowPasses`] in Triton, for features and codes in float32.

    Args:
        distances: Of the rows of this rank.
        process_group: The matrix consists of the rows of all ranks of this group.
        blocks, method: As of [`Tiles`].
    """

    def __init__(
        self,
        distances: Distances,
        process_group: "dist.ProcessGroup | None" = None,
        blocks: dict[str, Blocks] | None = None,
        method: Method | None = None,
    ):
        self._distances, self._process_group = distances, process_group
        self._tiles = Tiles(distances.features, distances.codebook, blocks, method, distances.points.root)
        self._features, self._codes = self._tiles.features, self._tiles.codes
        num_rows = over_ranks(distances.like.new_full((), self._features.count), "SUM", process_group)
        self.log_num_rows = num_rows.clamp_min(1).double().log()

    def __enter__(self) -> "FusedRows":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    # ---- the passes

    def statistics(self) -> Statistics:
        features, codebook = self._distances.features, self._distances.codebook
        num_entries = len(features) * len(codebook)
        near_mean = codebook.new_zeros(())
        if num_entries:
            rows, codes = (x[:: max(1, len(x) // 64)] for x in (features, codebook))
            some = torch.cdist(rows, codes, compute_mode="donot_use_mm_for_euclid_dist")
            near_mean = (some if self._distances.points.root else some.square_()).mean()
        nearest, total, square_total = self._tiles.moments(near_mean)
        count = total.new_full((), num_entries)
        difference = total / max(num_entries, 1)
        deviations = (square_total - total * difference).clamp_min(0)
        if num_entries == 0:
            nearest = nearest.fill_(math.inf)
        moments = torch.stack([count, near_mean + difference, deviations])[None]
        self._statistics = merged_statistics(moments, nearest, self._process_group)
        return self._statistics

    def set_scale(self, scale: torch.Tensor) -> None:
        self._scale = scale
        self._factor = (scale.double() * LOG2_E).float()  # of distances, in exponents of 2
        self._scaled_nearest = scale.double() * self._statistics.nearest
        self._weights = self._codes.weights(0.0)  # written to in every round

    def log_column_sums(self) -> torch.Tensor:
        features, codes = self._features, self._codes
        sums = self._tiles.log_sums(codes, features, features.zeros, codes.zeros, self._factor)
        # No column sums to less than its nearest feature gives.
        return self._log_total(sums + self._scaled_nearest) - self._scaled_nearest

    def log_mass(self, g: torch.Tensor) -> torch.Tensor:
        features, codes, weights = self._features, self._codes, self._weights
        torch.mul(self._centred(g), LOG2_E, out=weights[: codes.count])
        of_rows = self._tiles.balancing_weights(features, codes, weights, self._factor)
        return self._log_total(self._tiles.log_sums(codes, features, of_rows, weights, self._factor))

    def most_likely(self, g: torch.Tensor) -> torch.Tensor:
        """As [`~sinkhorn_rows.RowPasses.most_likely`]: a few rows that rounding leaves open in float64, many by BlockedRows."""
        points = self._distances.points
        # BlockedRows may take codes for equal whose scores differ by less than this, relative to their distances.
        tie = 16 * torch.finfo(torch.float32).eps * (1 + self._scaled_nearest)
        g = g.double()
        codes, is_decided = decided_codes(points, self._centred(g), self._scale, tie, self._tiles)
        open_rows = is_decided.logical_not_().nonzero().squeeze(1)
        if 0 < len(open_rows) * len(points.codebook) <= FEW_PAIRS:
            tie = tie.clamp_max(LARGEST_TIE)
            codes[open_rows] = exact_codes(*points.exact(open_rows), g, self._scale, tie, points.root)
        elif len(open_rows):
            with BlockedRows(Distances(points.select(open_rows)), memory_budget=0) as rows:
                rows.set_scale(self._scale, self._statistics.nearest)
                codes[open_rows] = rows.most_likely(g)
        return codes

    def _centred(self, g: torch.Tensor) -> torch.Tensor:
        """g less a constant that makes the largest score of all at most 0."""
        return g - (g - self._scaled_nearest).amax()

    def _log_total(self, logarithms: torch.Tensor) -> torch.Tensor:
        """Logarithm of the sum over ranks."""
        if self._process_group is not None:
            logarithms = over_ranks(logarithms.exp(), "SUM", self._process_group).log()
        return logarithms.clamp_min(SMALLEST_LOG_MASS)


def exact_codes(
    features: torch.Tensor,
    codebook: torch.Tensor,
    potentials: torch.Tensor,
    scale: torch.Tensor,
    tie: torch.Tensor,
    root: bool = True,
) -> torch.Tensor:
    """argmax_k(g_k - s D_nk), (N,), in float64; of codes whose score is at most tie_k below the best, the nearest."""
    distances = torch.cdist(features.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    if not root:
        distances = distances.square_()
    scores = potentials - scale.double() * distances
    is_tie = scores + tie >= scores.amax(dim=1, keepdim=True)
    return distances.masked_fill(~is_tie, math.inf).argmin(dim=1)
