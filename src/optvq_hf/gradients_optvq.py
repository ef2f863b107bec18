"""What trains codes and features: the codebook loss, averages of codes by the plan, and gradients that pass the quantizer."""

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .costs import Cost, plain_costs
from .distances import full_precision, row_blocks, working_dtype
from .sinkhorn import plan_rows


LOSS_TYPES = ("l2", "l1", "cross_entropy")
GRADIENT_ESTIMATORS = ("straight_through", "rotation")
# Most that the rotation's gradient is stretched by: what a code vector is longer than its feature.
MAX_STRETCH = 1000.0


def with_gradient(
    hidden_states: torch.Tensor, quantized: torch.Tensor, estimator: str, head_dim: int, axis: int
) -> torch.Tensor:
    """The quantized values to the last bit, in the dtype of the hidden states, which get the gradient.

    Args:
        hidden_states, quantized: Of the same shape, with heads of width `head_dim` along `axis`.
        estimator: "straight_through": the gradient unchanged. "rotation": see [`rotated`].
    """
    carrier = hidden_states
    if estimator == "rotation":
        features, vectors = (x.movedim(axis, -1) for x in (hidden_states, quantized))
        shape = features.shape
        features, vectors = features.reshape(-1, head_dim), vectors.detach().reshape(-1, head_dim)
        carrier = rotated(features, vectors).view(shape).movedim(-1, axis).to(hidden_states.dtype)
    return quantized.to(hidden_states.dtype) + (carrier - carrier.detach())


def rotated(features: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Features, rotated and scaled onto their code vectors: the rotation trick (Fifty et al. 2024, section 4).

        q = lambda R e,   lambda = ||q|| / ||e||,   R = I - 2 r r^T + 2 q' e'^T,   r = (e' + q') / ||e' + q'||

    for a feature e, its code vector q, and their directions e' and q'. lambda and R are constants: the gradient is at the same
    angle to the feature as it was to the code vector. A feature of zeros has no direction: its gradient passes unchanged. Where
    e' and q' are opposite, r is a vector at a right angle to them, and the rotation a half-turn. Features near zero would get
    gradients without bound: lambda is at most [`MAX_STRETCH`].

    Args:
        features, vectors: (N, d) float.
    """
    dtype = working_dtype(features, vectors)
    features, vectors = features.to(dtype), vectors.to(dtype)
    with torch.no_grad():
        (before, lengths, is_zero), (after, of_vectors, _) = map(_polar, (features, vectors))
        between = before + after
        is_opposite = (
            between.norm(dim=1, keepdim=True) < torch.finfo(dtype).eps ** 0.5
        )  # about half its digits are rounding
        between = F.normalize(torch.where(is_opposite, _at_right_angle(before), between), dim=1)
        stretch = (of_vectors / lengths.masked_fill(is_zero, 1)).clamp_max(MAX_STRETCH)
    of_between, of_before = ((features * x).sum(dim=1, keepdim=True) for x in (between, before))
    turned = stretch * (features - 2 * of_between * between + 2 * of_before * after)
    return torch.where(is_zero, features, turned)


def _polar(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Directions (N, d) and lengths (N, 1) of vectors, and where these are too short to have any, which are zeros."""
    largest = vectors.abs().amax(dim=1, keepdim=True)  # squares of smaller ones would underflow
    is_zero = largest < torch.finfo(vectors.dtype).tiny
    scaled = (vectors / largest.masked_fill(is_zero, 1)).masked_fill(is_zero, 0)
    lengths = scaled.norm(dim=1, keepdim=True)
    return scaled / lengths.masked_fill(is_zero, 1), lengths * largest, is_zero


def _at_right_angle(directions: torch.Tensor) -> torch.Tensor:
    """For each direction (N, d) the axis that is furthest from it, without its share in the direction; zeros if d = 1."""
    axes = F.one_hot(directions.abs().argmin(dim=1), directions.shape[1]).to(directions.dtype)
    return axes - (axes * directions).sum(dim=1, keepdim=True) * directions


def codebook_loss(
    features: torch.Tensor,
    vectors: torch.Tensor,
    codebook: torch.Tensor,
    codes: torch.Tensor,
    loss_type: str,
    commitment_weight: float,
    codebook_weight: float,
    cost: Cost,
) -> torch.Tensor:
    """The 0-dim loss of [`~quantizer_optvq.OptVQQuantizer`].

    Args:
        features, vectors: (N, head_dim), with gradients, and the code vectors of the features.
        codebook, codes: (K, head_dim), and (N,) int64.
    """
    if features.shape[0] == 0:  # this process has no share of the batch, and a mean of nothing is NaN
        return features.sum() + codebook.sum() * 0
    if loss_type == "cross_entropy":
        if cost == "euclidean":
            origin = codebook.detach().mean(dim=0)
            features, codebook = features - origin, codebook - origin

        def cross_entropy(of_rows: torch.Tensor, codebook: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
            with full_precision(of_rows):
                return F.cross_entropy(-plain_costs(of_rows, codebook, cost), codes, reduction="sum")

        blocks = in_row_blocks(cross_entropy, features, codebook, codes)
        return sum(blocks, start=features.new_zeros(())) / features.shape[0]
    distance = F.mse_loss if loss_type == "l2" else F.l1_loss
    commitment = distance(features, vectors.detach())
    return commitment_weight * commitment + codebook_weight * distance(vectors, features.detach())


def plan_averages(
    features: torch.Tensor, codebook: torch.Tensor, potentials: torch.Tensor, scale: torch.Tensor, cost: Cost
) -> torch.Tensor:
    """(N, head_dim): the average of all codes by the plan, for each feature, with its gradient to the codebook."""

    def average(of_rows: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        with full_precision(of_rows):
            return plan_rows(of_rows, codebook.detach(), potentials, scale, cost=cost) @ codebook

    return torch.cat([codebook[:0], *in_row_blocks(average, features, codebook)])


def in_row_blocks(
    function: Callable[..., torch.Tensor],
    features: torch.Tensor,
    codebook: torch.Tensor,
    codes: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Yields `function(features, codebook, ...)` block of rows by block of rows.

    Its (rows, K) intermediates are recomputed in the backward pass instead of kept, so there is never an N x K matrix.
    """
    for rows in row_blocks(features.shape[0], len(codebook), features.device):
        of_rows = () if codes is None else (codes[rows],)
        yield checkpoint(function, features[rows], codebook, *of_rows, use_reentrant=False, preserve_rng_state=False)
