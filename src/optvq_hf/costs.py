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
        originals: Where the points are rounded, that of which they are directions: features (N, d) and codes (K, d).
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
        return directions(self.originals[0][rows], self.originals[1])


def points_of(
    features: torch.Tensor, codebook: torch.Tensor, cost: Cost, process_group: "dist.ProcessGroup | None" = None
) -> Points:
    """The points of a cost, for features and codes as [`~solver_inputs.prepare`] returns them."""
    if cost == "squared_euclidean":
        unit = _power_of_two(features, codebook, process_group)
        return Points(features / unit, codebook / unit, root=False, unit=unit**2)
    if cost == "cosine":
        left, right = directions(features, codebook)
        origin = middle(right)  # moved before points are rounded, so that those near to each other keep their digits
        left, right = (points.sub_(origin).to(codebook.dtype) for points in (left, right))
        return Points(left, right, root=False, originals=(features, codebook))
    return Points(features, codebook)


def directions(features: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both with length sqrt(1/2), in float64 where the device has it.

    A vector of zeros is at a right angle to all others: it gets an axis of its own, one more for features and one for codes.
    """
    vectors = [x.to(double_dtype(x.device)) for x in (features, codebook)]
    largest = [x.abs().amax(dim=1, keepdim=True) for x in vectors]  # squares of smaller ones would underflow
    are_zero = [size == 0 for size in largest]
    vectors = [x / size.masked_fill(none, 1) for x, size, none in zip(vectors, largest, are_zero)]
    vectors = [
        x / (x.norm(dim=1, keepdim=True) * math.sqrt(2)).masked_fill(none, 1) for x, none in zip(vectors, are_zero)
    ]
    has_no_value = torch.compiler.is_compiling() or features.is_meta
    if has_no_value or torch.stack([none.any() for none in are_zero]).any():
        axes = [none * math.sqrt(0.5) for none in are_zero]
        left = torch.cat([vectors[0], axes[0], torch.zeros_like(axes[0])], dim=1)
        return left, torch.cat([vectors[1], torch.zeros_like(axes[1]), axes[1]], dim=1)
    return vectors[0], vectors[1]


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
    return torch.nn.functional.normalize(vectors, dim=1, eps=torch.finfo(vectors.dtype).tiny)


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
