"""What it costs to assign a feature to a code: three costs, all of them functions of the distance between two points.

    "euclidean"            D_nk = ||z_n - c_k||
    "squared_euclidean"    D_nk = ||z_n - c_k||^2
    "cosine"               D_nk = 1 - cos(z_n, c_k) = ||a - b||^2   with   a = z_n / (sqrt(2) ||z_n||),  b likewise of c_k

A difference of directions keeps the digits that 1 - cos loses where two vectors have nearly the same direction: at an angle of
1e-6, 1 - cos has three digits left in float64, the difference ten. A vector of zeros has no direction: its cosine with every
other is 0, as in `torch.nn.functional.cosine_similarity`.

So the solver knows points, and whether it takes the root of their squared distance. Squares have twice the exponents, which
float32 does not hold: points of "squared_euclidean" are divided by a power of 2, which loses no digit.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist


Cost = Literal["euclidean", "squared_euclidean", "cosine"]
COSTS = ("euclidean", "squared_euclidean", "cosine")


class Points(NamedTuple):
    """Features and codes, between which the cost is `unit` times the distance (`root`) or its square.

    Attributes:
        features, codebook: (N, w), (K, w) in the working dtype.
        root: Whether the cost is the distance, not its square.
        unit: A power of 2, the same on all ranks.
        originals: Where points are rounded directions, what they are of: features (N, d), and directions of codes (K, w) in
            float64.
    """

    features: torch.Tensor
    codebook: torch.Tensor
    root: bool = True
    unit: float = 1.0
    originals: tuple[torch.Tensor, torch.Tensor] | None = None

    def select(self, rows: slice | torch.Tensor = slice(None), codes: slice = slice(None)) -> "Points":
        """Some of the features and codes."""
        originals = None if self.originals is None else (self.originals[0][rows], self.originals[1][codes])
        return self._replace(features=self.features[rows], codebook=self.codebook[codes], originals=originals)

    def exact(self, rows: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Some of the features, and all codes, whose differences in float64 are exact: (B, w), (K, w)."""
        if self.originals is None:
            return self.features[rows], self.codebook
        features, codes = self.originals
        return directions(features[rows], None if codes.shape[1] == features.shape[1] else 0), codes


def points_of(
    features: torch.Tensor, codebook: torch.Tensor, cost: Cost, process_group: "dist.ProcessGroup | None" = None
) -> Points:
    """The points of a cost, for features and codes as [`~solver_inputs.prepare`] returns them."""
    if cost == "squared_euclidean":
        unit = _power_of_two(features, codebook, process_group)
        return Points(features / unit, codebook / unit, root=False, unit=unit**2)
    if cost == "cosine":
        has_zeros = _has_zeros(features, codebook)
        left, right = (directions(x, axis if has_zeros else None) for axis, x in enumerate((features, codebook)))
        origin = middle(right)  # moved before points are rounded, so that those near to each other keep their digits
        rounded = ((points - origin).to(codebook.dtype) for points in (left, right))
        return Points(*rounded, root=False, originals=(features, right))
    return Points(features, codebook)


def directions(vectors: torch.Tensor, axis: int | None = None) -> torch.Tensor:
    """Vectors (M, d) with length sqrt(1/2), in float64 where the device has it; zeros where they are zeros.

    Args:
        axis: 0 or 1 appends two entries, of which this one is sqrt(1/2) for vectors of zeros: at a right angle to all others.
    """
    vectors = vectors.to(double_dtype(vectors.device))
    largest = vectors.abs().amax(dim=1, keepdim=True)  # squares of smaller ones would underflow
    is_zero = largest == 0
    vectors = vectors / largest.masked_fill(is_zero, 1)
    vectors = vectors / (vectors.norm(dim=1, keepdim=True) * math.sqrt(2)).masked_fill(is_zero, 1)
    if axis is None:
        return vectors
    axes = [is_zero.to(vectors.dtype) * math.sqrt(0.5), torch.zeros_like(largest)]
    return torch.cat([vectors, *(axes if axis == 0 else reversed(axes))], dim=1)


def plain_costs(features: torch.Tensor, codebook: torch.Tensor, cost: Cost) -> torch.Tensor:
    """(N, K) in torch's own operators, with gradients, in the dtype of both."""
    if cost == "cosine":
        return 1 - _unit(features) @ _unit(codebook).T
    if cost == "squared_euclidean":
        origin = codebook.detach().mean(dim=0)
        features, codebook = features - origin, codebook - origin
        squares = features.square().sum(dim=1, keepdim=True) + codebook.square().sum(dim=1)
        return torch.addmm(squares, features, codebook.T, alpha=-2).clamp_min(0)
    return torch.cdist(features, codebook)


def check_cost(cost: str) -> None:
    if cost not in COSTS:
        raise ValueError(f"cost must be one of {COSTS}, got {cost!r}")


def middle(codebook: torch.Tensor) -> torch.Tensor:
    """(d,): a median, of some codes, because a far-away code drags a mean along."""
    return codebook[:: max(1, len(codebook) // 256)].contiguous().median(dim=0).values


def double_dtype(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors with length 1; zeros where they are zeros, with no gradient, nor where one would overflow."""
    largest = vectors.detach().abs().amax(dim=1, keepdim=True)  # squares of smaller ones would underflow
    vectors = torch.where(largest < torch.finfo(vectors.dtype).tiny, vectors.detach(), vectors)
    return torch.nn.functional.normalize(vectors / largest.masked_fill(largest == 0, 1), dim=1)


def _has_zeros(features: torch.Tensor, codebook: torch.Tensor) -> bool:
    """Whether a vector is all zeros; while compiling, when that has no value, True."""
    if torch.compiler.is_compiling() or features.is_meta:
        return True
    return bool(torch.stack([(~x.any(dim=1)).any() for x in (features, codebook)]).any())


def _power_of_two(
    features: torch.Tensor, codebook: torch.Tensor, process_group: "dist.ProcessGroup | None" = None
) -> float:
    """About the largest entry of all, also of other ranks; 1 if all are 0. While compiling, when it has no value, 1."""
    if torch.compiler.is_compiling() or features.is_meta:
        return 1.0
    parts = [x.abs().amax() for x in (features, codebook) if x.numel()]
    largest = torch.stack(parts).amax()
    if process_group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=process_group)
    value = largest.item()
    return max(2.0 ** math.frexp(value)[1], torch.finfo(codebook.dtype).tiny) if value else 1.0
