"""Distances between features and codes, in blocks of rows; full precision.

Features z_n are (N, d), codes c_k (K, d), of any float dtype. The work is done in float32, or in float64 if an input is
float64. A block of distances is one matrix product, ||z - c||^2 = ||z||^2 + ||c||^2 - 2 z.c, with the origin moved to the
middle of the codebook first: distances do not depend on the origin, but far away from it the product loses its digits.
"""

import functools
import math
import mmap
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
import torch.distributed as dist

from .costs import Points, double_dtype, middle


# Elements of one block: 8 MB in float32 on a CPU, to stay in its caches; 64 MB elsewhere, to fill the device.
BLOCK_ELEMENTS = {"cpu": 2**21, "other": 2**24}
MIN_BLOCK_ROWS = 64


class Distances:
    """Distances D_nk = ||z_n - c_k||, or their squares, of blocks of rows to all codes.

    The squared norms of the features are one more column and those of the codes a bias, so that the product gives the squared
    distance as a whole: (z, ||z||^2) . (-2c, 1) + ||c||^2.

    Args:
        points: Features and codes, as [`~costs.points_of`] returns them.

    Attributes:
        shape: (N, K).
        like: Some tensor of the working dtype on the device.
    """

    def __init__(self, points: Points):
        self.points, features, codebook = points, points.features, points.codebook
        self.features, self.codebook, self.like = features, codebook, codebook
        self.shape = (features.shape[0], codebook.shape[0])
        self._origin = middle(codebook)
        features, codebook = features - self._origin, codebook - self._origin
        self.row_squares, self.code_squares = features.square().sum(dim=1), codebook.square().sum(dim=1)

    @functools.cached_property
    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        features, codebook = self.features - self._origin, self.codebook - self._origin
        left = torch.cat([features, self.row_squares[:, None]], dim=1)
        return left, torch.cat([-2 * codebook, torch.ones_like(codebook[:, :1])], dim=1).T

    def of_rows(self, rows: slice, out: torch.Tensor | None = None) -> torch.Tensor:
        """(B, K), the distances of a slice of rows; written to `out` if given."""
        left, right = self._factors
        squares = torch.addmm(self.code_squares, left[rows], right, out=out).clamp_min_(0)
        return squares.sqrt_() if self.points.root else squares

    def squared_error(self, row_square: torch.Tensor) -> torch.Tensor:
        """(K,): how far the squares of a row with this squared norm (0-dim) may be off.

        Rounding grows with the square root of the number of terms (Higham and Mary 2019). The largest error that was met was
        6 u (||z||^2 + ||c||^2) for widths up to 16 and 10 u up to 768, with u half the machine's epsilon; moving the origin can
        add 2 u, and rounded points 4 u.
        """
        width, info = self.codebook.shape[1], torch.finfo(self.like.dtype)
        of_points = 0 if self.points.originals is None else 4
        relative = (6 + of_points + math.sqrt(width)) * info.eps / 2 * (row_square + self.code_squares)
        return relative + 4 * width * info.tiny  # squares may underflow

    def of_codes(self, codes: slice) -> "Distances":
        """The distances to some of the codes."""
        return Distances(self.points.select(codes=codes))


class GivenDistances:
    """The same for distances that are there already: a cost matrix (N, K)."""

    def __init__(self, cost: torch.Tensor):
        self.cost, self.shape, self.like = cost, (cost.shape[0], cost.shape[1]), cost

    def of_rows(self, rows: slice, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.cost[rows].clone() if out is None else out.copy_(self.cost[rows])

    def of_codes(self, codes: slice) -> "GivenDistances":
        return GivenDistances(self.cost[:, codes])


def is_beyond_float32(
    distances: Distances, scale: torch.Tensor, process_group: "dist.ProcessGroup | None" = None
) -> torch.Tensor:
    """Whether features are so far from all codes that their distances agree in the digits that float32 has, 0-dim bool."""
    like = distances.like
    if like.dtype != torch.float32 or double_dtype(like.device) != torch.float64:
        return torch.zeros_like(scale, dtype=torch.bool)
    largest = torch.cat([distances.row_squares, like.new_zeros(1)]).amax().sqrt()  # there may be no features here
    if process_group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=process_group)
    rounding = scale * torch.finfo(like.dtype).eps * (largest if distances.points.root else largest.square())
    return (rounding > 1e-4) & (largest > 10 * distances.code_squares.amax().sqrt())


def centred(features: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both, with the middle of the codebook as origin."""
    origin = middle(codebook)
    return features - origin, codebook - origin


def row_blocks(num_rows: int, num_codes: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows whose (B, num_codes) scores make one block; none without rows. One block while B is symbolic."""
    if isinstance(num_rows, torch.SymInt):
        return iter([slice(0, num_rows)])
    # A matrix product of fewer rows spends its time on reading the codebook.
    size = max(MIN_BLOCK_ROWS, BLOCK_ELEMENTS["cpu" if device.type == "cpu" else "other"] // num_codes)
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


# ---- memory ----------------------------------------------------------------------------------------------------------

# At most one piece of memory, between calls; taken out while in use, so that no other thread gets it.
_kept_memory: list[mmap.mmap] = []
_kept_memory_lock = threading.Lock()
# Below, marking memory as free costs more than it is worth.
SMALLEST_FREED = 2**24


class KeptMatrix:
    """An uninitialised matrix whose memory is kept for the next one.

    Pages of fresh memory take a CPU as long as solving does: writing 64 MB of kept memory is 9 times as fast
    (scripts/benchmark_row_functions.py). Between calls the memory is marked as free to take: the system does so when it is
    short, although the process is seen to hold it. Where that cannot be done, nothing is kept.

    Attributes:
        matrix: Not to be used after `release`.
    """

    def __init__(self, shape: tuple[int, int], like: torch.Tensor):
        self._num_bytes = num_bytes = shape[0] * shape[1] * like.dtype.itemsize
        self._memory: mmap.mmap | None = None
        if like.device.type != "cpu" or num_bytes == 0 or not hasattr(mmap, "MADV_FREE"):
            self.matrix = like.new_empty(shape)
            return
        with _kept_memory_lock, suppress(IndexError):
            self._memory = _kept_memory.pop()
        if self._memory is None or len(self._memory) < num_bytes:
            self._memory = mmap.mmap(-1, num_bytes, access=mmap.ACCESS_COPY)  # private to this process
            with suppress(AttributeError, OSError):  # a system without large pages
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        # A new tensor each time: the last one may have been made in inference mode.
        self.matrix = torch.frombuffer(self._memory, dtype=like.dtype, count=shape[0] * shape[1]).view(shape)

    def release(self) -> None:
        """Leaves the memory to the next matrix."""
        memory, self._memory = self._memory, None
        if memory is None:
            return
        with suppress(OSError):  # a kernel that does not know the advice: nothing is kept
            if self._num_bytes >= SMALLEST_FREED:
                memory.madvise(mmap.MADV_FREE, 0, self._num_bytes)
            with _kept_memory_lock:
                _kept_memory[:] = [max([memory, *_kept_memory], key=len)]  # another thread may have left one


# ---- the robust spread -----------------------------------------------------------------------------------------------

# It looks at this many codes, spread evenly over the codebook, and at all features.
ROBUST_CODES = 64


def median_deviation(
    distances: Distances | GivenDistances, process_group: "dist.ProcessGroup | None" = None
) -> torch.Tensor:
    """Median of |D - median(D)| over all rows of all ranks and some codes, 0-dim."""
    some = distances.of_codes(slice(None, None, max(1, distances.shape[1] // ROBUST_CODES)))

    def deviations(centre: torch.Tensor | float) -> Callable[[], Iterator[torch.Tensor]]:
        return lambda: ((some.of_rows(rows) - centre).abs_() for rows in row_blocks(*some.shape, some.like.device))

    centre = median(deviations(0.0), some.like, process_group)
    return median(deviations(centre), some.like, process_group)


def median(
    blocks: Callable[[], Iterator[torch.Tensor]], like: torch.Tensor, process_group: "dist.ProcessGroup | None" = None
) -> torch.Tensor:
    """The lower median of numbers >= 0 in the blocks of all ranks, exact; 0-dim, in the dtype of `like`. 0 if there are none.

    Read as integers, the bits of such numbers are in the order of the numbers. So the median is found from the most significant
    bits on, 16 at a time, by counting: counts add up over blocks and ranks.
    """
    integer = torch.int32 if like.dtype == torch.float32 else torch.int64
    prefix = rank = torch.zeros(1, dtype=torch.int64, device=like.device)
    for shift in range(8 * like.dtype.itemsize - 16, -1, -16):
        counts = torch.zeros(2**16, dtype=torch.int64, device=like.device)
        for block in blocks():
            bits = block.view(integer).flatten().long()
            # Not with torch.bincount of those that match: the host would wait for their number.
            counts.scatter_add_(0, bits >> shift & 0xFFFF, (bits >> shift + 16 == prefix).long())
        if process_group is not None:
            dist.all_reduce(counts, group=process_group)
        cumulative = counts.cumsum(0)
        if shift + 16 == 8 * like.dtype.itemsize:
            rank = (cumulative[-1:] + 1) // 2
        digit = torch.searchsorted(cumulative, rank).clamp_max(2**16 - 1)
        rank = rank - (cumulative - counts)[digit]
        prefix = prefix << 16 | digit
    return prefix.to(integer).view(like.dtype).squeeze(0)


# ---- precision -------------------------------------------------------------------------------------------------------


def working_dtype(features: torch.Tensor, codebook: torch.Tensor) -> torch.dtype:
    """float32, or float64 if one of both is."""
    return torch.promote_types(torch.promote_types(features.dtype, codebook.dtype), torch.float32)


def without_autocast(tensor: torch.Tensor) -> torch.autocast:
    """A context without autocast on the tensor's device."""
    return torch.autocast("cpu" if tensor.is_meta else tensor.device.type, enabled=False)


# The precision of matrix products is a setting of the process, not of the thread. The first thread that needs full precision
# saves the setting, and the last one puts it back.
_precision_lock = threading.Lock()
_precision_users = 0
_precision_before: list[Any] = []


@contextmanager
def full_precision(tensor: torch.Tensor) -> Iterator[None]:
    """Turns autocast, bfloat16 and TF32 products off: distances and the logarithms of small masses do not survive them."""
    global _precision_users
    with without_autocast(tensor):
        if torch.compiler.is_compiling():  # a setting of the process cannot be traced
            yield
            return
        backends = (torch.backends.cuda.matmul, cast(Any, torch.backends.mkldnn).matmul)
        with _precision_lock:
            if _precision_users == 0:
                _precision_before[:] = [backend.fp32_precision for backend in backends]
                for backend in backends:
                    backend.fp32_precision = "ieee"
            _precision_users += 1
        try:
            yield
        finally:
            with _precision_lock:
                _precision_users -= 1
                if _precision_users == 0:
                    for backend, precision in zip(backends, _precision_before):
                        backend.fp32_precision = precision


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def operator_namespace(module: str) -> str:
    """Where a module of this name registers its operators for torch.compile.

    Copies of the code in one process, of the package and of repositories on the Hub, have operators of their own: torch would
    let the last copy replace those of all others.
    """
    return "optvq_" + re.sub(r"\W", "_", module.rpartition(".")[0])
