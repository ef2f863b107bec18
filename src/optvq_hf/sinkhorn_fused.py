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
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist

from .distances import Distances, centred, double_dtype, row_blocks
from .sinkhorn_blocks import IN_REGISTERS, Blocks, Method, choose_blocks, default_method, squared_error, stored_width
from .sinkhorn_kernels import (
    NOTHING,
    PADDING,
    log_sums_kernel,
    merge_kernel,
    moments_kernel,
    top_two_kernel,
)
from .sinkhorn_rows import BlockedRows, Statistics, merged_statistics, over_ranks


LOG2_E = math.log2(math.e)
# Splits are made until there are so many warps, a few times what the largest devices hold at a time. Not a property of the
# device: sums are the same on all.
WARPS = 8192
LARGEST_SPLIT = 16384  # float32 sums so many positive numbers well within its last four digits
SMALLEST_SPLIT = 128
# Logarithm of the smallest mass of a code, far from all features.
SMALLEST_LOG_MASS = math.log(torch.finfo(torch.float64).tiny)


class Points:
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
        if method in IN_REGISTERS:
            self.data = points.new_zeros(self.width, self.stride)
            self.data[:, : self.count] = points.T
        else:
            self.data = points.new_zeros(self.stride, stored_width(self.width, method))
            self.data[: self.count, : self.width] = points

    def bound_below(self) -> "Points":
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


class Tiles:
    """Launches the kernels.

    Args:
        features, codebook: (N, d), (K, d) float32, contiguous or not, on a device that Triton compiles for (or on a CPU, with
            its interpreter).
        blocks: Of some kernels, in place of the defaults.
        method: In place of the default for the width.
    """

    def __init__(
        self,
        features: torch.Tensor,
        codebook: torch.Tensor,
        blocks: dict[str, Blocks] | None = None,
        method: Method | None = None,
    ):
        self.method: Method = method or default_method(features.shape[1])
        if self.method != "direct":
            features, codebook = centred(features, codebook)
        self.features, self.codes = Points(features, self.method), Points(codebook, self.method)
        self.device, self._blocks = features.device, blocks or {}

    def log2_sums(
        self, outer: Points, inner: Points, weights: torch.Tensor, factor: torch.Tensor, negated: bool = False
    ) -> torch.Tensor:
        """log2 sum_j 2^(w_j - factor D_ij), (M,) float64.

        Args:
            weights: (stride,) float32, of the inner points.
            factor: 0-dim float32.
            negated: As weights for the next call instead: the negative, (stride,) float32.
        """
        maxima, sums = self._launch(log_sums_kernel, "log_sums", outer, inner, weights, factor, [torch.float32] * 2)
        dtype = torch.float32 if negated else torch.float64
        merged = maxima.new_empty(outer.stride, dtype=dtype)
        block, kernel = PADDING if self.device.type == "cpu" else 128, cast(Any, merge_kernel)
        with self._on_device():
            kernel[(outer.stride // block,)](
                maxima, sums, merged, outer.stride, outer.count, len(maxima), NEGATED=negated, BLOCK=block
            )
        return merged if negated else merged[: outer.count]

    def top_two(
        self, weights: torch.Tensor, factor: torch.Tensor, root: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Largest score w_k - factor D_nk of each row, its code (int64), and the second largest score; (N,) each.

        `root=False`: of w_k - factor D_nk^2. For wide codes, with lower bounds of the distances.
        """
        dtypes = [torch.float32, torch.int32, torch.float32]
        best, codes, runner_up = (
            found[:, : self.features.count]
            for found in self._launch(
                top_two_kernel,
                "top_two",
                self.features.bound_below(),
                self.codes.bound_below(),
                weights,
                factor,
                dtypes,
                ROOT=root,
            )
        )
        best_of_all, split = best.max(dim=0, keepdim=True)
        others = best.scatter(0, split, 2 * NOTHING).amax(dim=0)
        runner_up = torch.maximum(others, runner_up.gather(0, split).squeeze(0))
        return best_of_all.squeeze(0), codes.gather(0, split).squeeze(0).long(), runner_up

    def moments(self, near_mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """min_n D_nk (K,) float32, and the sums of D - near_mean and of its square, (K,) float64."""
        nearest, sums, square_sums = (
            found[:, : self.codes.count]
            for found in self._launch(
                moments_kernel,
                "moments",
                self.codes,
                self.features,
                self.features.weights(0.0),
                near_mean,
                [torch.float32] * 3,
            )
        )
        return nearest.amin(dim=0), sums.double().sum(dim=0), square_sums.double().sum(dim=0)

    def _launch(
        self,
        kernel: Any,
        name: str,
        outer: Points,
        inner: Points,
        weights: torch.Tensor,
        value: torch.Tensor,
        dtypes: list[torch.dtype],
        **constants: bool,
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
                num_warps=blocks.num_warps,
                num_stages=blocks.num_stages,
                **constants,
            )
        return outputs

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def split_of(num_warps: int, num_inner: int) -> int:
    """How many inner points one program reduces over, when all outer points make this many warps."""
    wanted = max(-(-WARPS // num_warps), -(-num_inner // LARGEST_SPLIT), 1)
    return max(SMALLEST_SPLIT, -(-num_inner // wanted // SMALLEST_SPLIT) * SMALLEST_SPLIT)


def decided_codes(
    features: torch.Tensor,
    codebook: torch.Tensor,
    potentials: torch.Tensor | None = None,
    scale: torch.Tensor | float = 1.0,
    tie: torch.Tensor | float = 0.0,
    tiles: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """argmax_k(g_k - s D_nk), or the nearest codes if `potentials` is None, and which are beyond rounding; (N,) each.

    The kernel finds the code with the largest upper bound. It is decided if its lower bound, from differences of coordinates,
    is above the second largest upper bound.

    Args:
        features, codebook: (N, d), (K, d) float32.
        potentials, scale: g (K,), and s >= 0.
        tie: (K,) or a number: codes that come so near to the best leave a row open.
        tiles: Of the features and the codebook, if there are some already.
    """
    tiles = tiles or Tiles(features, codebook)
    width, info, double = codebook.shape[1], torch.finfo(torch.float32), double_dtype(codebook.device)
    # Of sums of squared differences; the rest is for the root, the factor, and the difference to g.
    relative = (width + 16) * info.eps / 2
    underflow = 4 * width * info.tiny  # of squares
    is_nearest = potentials is None
    if is_nearest:
        g, s = codebook.new_zeros(len(codebook), dtype=double), codebook.new_ones((), dtype=double)
        upper, relative_of_cost = g + underflow, relative
    else:
        g, s = potentials.to(double), codebook.new_ones((), dtype=double) * scale
        upper, relative_of_cost = g + s * math.sqrt(underflow), relative / 2
    upper = upper + 2 * info.eps * upper.abs() + tie
    slope = s * (1 - relative_of_cost)
    _, codes, runner_up = tiles.top_two(tiles.codes.weights(upper), slope.float(), root=not is_nearest)
    is_decided = torch.empty_like(codes, dtype=torch.bool)
    for rows in row_blocks(len(features), width, features.device):
        distances = (features[rows] - codebook[codes[rows]]).norm(dim=1).to(double)
        costs = distances.square() + underflow if is_nearest else distances + math.sqrt(underflow)
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
        self._tiles = Tiles(distances.features, distances.codebook, blocks, method)
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
        rows, codes = (x[:: max(1, len(x) // 256)] for x in (features, codebook))
        near_mean = torch.cdist(rows, codes, compute_mode="donot_use_mm_for_euclid_dist").mean().nan_to_num(0.0)
        nearest, sums, square_sums = self._tiles.moments(near_mean)
        count = sums.new_full((), len(features) * len(codebook))
        mean = sums.sum() / count.clamp_min(1)
        deviations = (square_sums.sum() - count * mean.square()).clamp_min(0)
        moments = torch.stack([count, near_mean.double() + mean, deviations])[None]
        if len(features) == 0:
            nearest = nearest.fill_(math.inf)
        self._statistics = merged_statistics(moments, nearest, self._process_group)
        return self._statistics

    def set_scale(self, scale: torch.Tensor) -> None:
        self._scale = scale
        self._factor = (scale.double() * LOG2_E).float()  # of distances, in exponents of 2
        self._scaled_nearest = scale.double() * self._statistics.nearest.double()

    def log_column_sums(self) -> torch.Tensor:
        sums = self._tiles.log2_sums(self._codes, self._features, self._features.weights(0.0), self._factor)
        # No column sums to less than its nearest feature gives.
        return self._log_total(sums / LOG2_E + self._scaled_nearest) - self._scaled_nearest

    def log_mass(self, g: torch.Tensor) -> torch.Tensor:
        weights = self._codes.weights(self._centred(g) * LOG2_E)
        row_sums = self._tiles.log2_sums(self._features, self._codes, weights, self._factor, negated=True)
        sums = self._tiles.log2_sums(self._codes, self._features, row_sums, self._factor)
        return self._log_total((sums + weights[: self._codes.count]) / LOG2_E)

    def most_likely(self, g: torch.Tensor) -> torch.Tensor:
        """As [`~sinkhorn_rows.RowPasses.most_likely`], with rows that rounding leaves open decided by BlockedRows."""
        features, codebook = self._distances.features, self._distances.codebook
        # BlockedRows may take codes for equal whose scores differ by less than this, relative to their distances.
        tie = 16 * torch.finfo(torch.float32).eps * (1 + self._scaled_nearest)
        codes, is_decided = decided_codes(features, codebook, self._centred(g.double()), self._scale, tie, self._tiles)
        open_rows = is_decided.logical_not_().nonzero().squeeze(1)
        if len(open_rows):
            with BlockedRows(Distances(features[open_rows], codebook), memory_budget=0) as rows:
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
