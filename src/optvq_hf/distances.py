"""Distances between features and codes, a block of rows at a time, and the nearest-neighbour search built on them.

Features z_n (N, d) and codes c_k (K, d) of any float dtype; the work is done in float32, or in float64 if an input is
float64. Distances come from one matrix product per block, ||z - c||^2 = ||z||^2 + ||c||^2 - 2 z.c, with the origin moved
to the middle of the codebook first: distances do not depend on the origin, but far away from it the product loses its digits.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .workspace import Workspace


# Elements of one row block: 8 MB in float32 on a CPU, to stay in its caches; 64 MB elsewhere, to fill the device.
BLOCK_ELEMENTS = {"cpu": 2**21, "other": 2**24}
MIN_BLOCK_ROWS = 64


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
    return best_codes(*prepare(features, codebook))


def best_codes(
    features: torch.Tensor,
    codebook: torch.Tensor,
    potentials: torch.Tensor | None = None,
    scale: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """The nearest code of each row, or argmax_k(g_k - s D_nk), the same whatever rows stand beside it.

    A matrix product rounds differently for different numbers of rows, which could flip near-ties between codes. So it only
    gives bounds of the scores: a row is decided if the lower bound of its best code is above the upper bounds of all others.
    For the rest (few, unless codes coincide) the codes that may be the best are compared in float64, with bounds again, of
    which the lowest index wins.
    While torch.compile or torch.export traces, and on devices without float64 or without data, the first bounds decide.

    Args:
        features, codebook: As [`prepare`] returns them.
        potentials, scale: g (K,) and s; the nearest code if None.

    Returns:
        (N,) int64; the lowest index among equals.
    """
    num_rows = features.shape[0]  # len() would fix the number when torch.export traces
    codes = torch.empty(num_rows, dtype=torch.int64, device=features.device)
    decided = torch.empty(num_rows, dtype=torch.bool, device=features.device)
    with full_precision(features):
        bounds = _ScoreBounds(features, codebook, potentials, scale)
        blocks = list(row_blocks(num_rows, len(codebook), features.device))
        workspace = Workspace((blocks[0].stop if blocks else 0, len(codebook)), features.dtype, features.device)
        bounds.block = workspace.matrix
        for rows in blocks:
            upper = bounds.upper(rows)
            _, codes[rows], runner_up = top_two(upper)
            decided[rows] = bounds.lower(rows, codes[rows]) > runner_up
        if torch.compiler.is_compiling() or features.device.type in ("mps", "meta"):
            return codes
        open_rows = decided.logical_not_().nonzero().squeeze(1)
        for rows in row_blocks(len(open_rows), len(codebook), features.device):
            rows = open_rows[rows]
            is_candidate = bounds.upper(rows) >= bounds.lower(rows, codes[rows])[:, None]
            candidates = is_candidate.any(dim=0).nonzero().squeeze(1)
            of_candidates = None if potentials is None else potentials[candidates].double()
            exact = _ScoreBounds(features[rows].double(), codebook[candidates].double(), of_candidates, scale)
            upper = exact.upper(slice(None))
            best = exact.lower(slice(None), upper.argmax(dim=1))
            codes[rows] = candidates[(upper >= best[:, None]).to(torch.uint8).argmax(dim=1)]
        workspace.release()
    return codes


class _ScoreBounds:
    """Bounds of the scores, which are 2 z.c - ||c||^2 for the nearest code, and g - s D with potentials.

    In the former every term has a factor c, so that they are tight however small the codes are beside the features.
    """

    def __init__(self, features, codebook, potentials, scale):
        self._features, self._codebook, self._potentials, self._scale = features, codebook, potentials, scale
        self._error = (4 + 2 * math.sqrt(codebook.shape[1])) * torch.finfo(codebook.dtype).eps
        self._row_norms, self._code_norms = features.norm(dim=1), codebook.norm(dim=1)
        # 2 z.c - ||c||^2 + error (||z|| ||c|| + ||c||^2) as one product
        self._left = torch.cat([features, self._error * self._row_norms[:, None]], dim=1)
        self._right = torch.cat([2 * codebook, self._code_norms[:, None]], dim=1).T
        self._bias = (self._error - 1) * self._code_norms.square()
        self.block = None  # memory for `upper`, if there is some

    def upper(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """(B, K), overwritten by the next call."""
        left = self._left[rows]
        is_placed = self.block is not None and not torch.compiler.is_compiling()
        products = torch.addmm(self._bias, left, self._right, out=self.block[: len(left)] if is_placed else None)
        if self._potentials is None:
            return products
        squared = products.neg_().add_((1 - self._error) * self._row_norms[rows, None].square())
        return squared.clamp_min_(0).sqrt_().mul_(-self._scale).add_(self._potentials)

    def lower(self, rows: slice | torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """(B,), of one code for each row."""
        z, c = self._features[rows], self._codebook[codes]
        if self._potentials is None:
            row_norms, code_norms = self._row_norms[rows], self._code_norms[codes]
            rounding = self._error * (row_norms * code_norms + code_norms.square())
            return 2 * (z * c).sum(dim=1) - code_norms.square() - rounding
        distances = (z - c).norm(dim=1).mul_(1 + self._error)
        return self._potentials[codes] - self._scale * distances


def top_two(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest entry of each row of (B, K) scores, its column, and the second largest entry (-inf if K = 1); (B,) each.

    Searching a row for an index is slow on a CPU, while taking the maximum of whole rows is fast. So columns j, j + w,
    j + 2w, ... are first merged into one, and only the w maxima and the winner's columns are searched.
    """
    num_rows, num_columns = scores.shape
    num_merged = next(n for n in range(math.isqrt(num_columns), 0, -1) if num_columns % n == 0)
    width = num_columns // num_merged
    columns = scores.view(num_rows, num_merged, width)
    maxima = columns.amax(dim=1)
    best, slot = maxima.max(dim=1, keepdim=True)
    members = columns.gather(2, slot[:, None].expand(-1, num_merged, 1)).squeeze(2)
    member = members.argmax(dim=1, keepdim=True)
    maxima.scatter_(1, slot, -math.inf)
    members.scatter_(1, member, -math.inf)
    runner_up = torch.maximum(maxima.amax(dim=1), members.amax(dim=1))
    return best.squeeze(1), (member * width + slot).squeeze(1), runner_up


class Distances:
    """Euclidean distances of rows of the features to all codes, by one matrix product.

    With the squared norms of the features as a further column, and those of the codes as a bias, the product gives the
    squared distance as a whole: (z, ||z||^2) . (-2c, 1) + ||c||^2.

    Args:
        features, codebook: As [`prepare`] returns them.
    """

    def __init__(self, features: torch.Tensor, codebook: torch.Tensor):
        self.shape = (len(features), len(codebook))
        self.dtype, self.device = features.dtype, features.device
        self._left = torch.cat([features, features.square().sum(dim=1, keepdim=True)], dim=1)
        self._right = torch.cat([-2 * codebook, torch.ones_like(codebook[:, :1])], dim=1).T
        self._bias = codebook.square().sum(dim=1)

    def of_rows(self, rows: slice | torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(B, K) for the rows of a slice or of an index."""
        return torch.addmm(self._bias, self._left[rows], self._right, out=out).clamp_min_(0).sqrt_()

    def of_codes(self, codes: slice | torch.Tensor) -> "Distances":
        """The same for some of the codes."""
        part = object.__new__(Distances)
        part.__dict__.update(self.__dict__, _right=self._right[:, codes], _bias=self._bias[codes])
        part.shape = (self.shape[0], part._right.shape[1])
        return part


def row_blocks(num_rows: int, num_codes: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows whose (B, num_codes) scores make one block; none if there are no rows. One block if B is symbolic."""
    if isinstance(num_rows, torch.SymInt):
        return iter([slice(0, num_rows)])
    elements = BLOCK_ELEMENTS["cpu" if device.type == "cpu" and not torch.compiler.is_compiling() else "other"]
    # A matrix product of fewer rows spends its time on reading the codebook.
    size = max(MIN_BLOCK_ROWS, elements // num_codes)
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


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
    origin = codebook[:: max(1, len(codebook) // 256)].contiguous().median(dim=0).values
    return features - origin, codebook - origin


def check_finite(tensor: torch.Tensor, name: str):
    """Raises ValueError for NaN, inf, and values whose squares overflow.

    Skipped while torch.compile or torch.export is tracing.
    """
    if torch.compiler.is_compiling() or tensor.is_meta or tensor.numel() == 0:
        return
    largest = torch.stack(tensor.aminmax()).abs().max().item()  # NaN if there is one
    if not math.isfinite(largest):
        raise ValueError(f"found NaN or inf in {name}")
    limit = math.sqrt(torch.finfo(tensor.dtype).max / (64 * max(tensor.shape[-1], 1)))
    if largest > limit:
        raise ValueError(f"{name} are too large for {tensor.dtype}: up to {largest:.1e}, the limit is {limit:.1e}")


def without_autocast(tensor: torch.Tensor) -> torch.autocast:
    return torch.autocast("cpu" if tensor.is_meta else tensor.device.type, enabled=False)


@contextmanager
def full_precision(tensor: torch.Tensor):
    """Neither distances nor the logarithms of small masses survive bfloat16 or TF32: both are off inside.

    The precision of matrix products is a setting of the whole process, which is put back at the end.
    """
    with without_autocast(tensor):
        if torch.compiler.is_compiling():
            yield
            return
        backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
        precisions = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, precisions):
                backend.fp32_precision = precision
