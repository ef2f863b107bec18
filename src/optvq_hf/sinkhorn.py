"""Balanced assignment of features to codes: entropic optimal transport, solved by Sinkhorn-Knopp in the log domain.

Problem (OptVQ, arXiv 2412.15195). Given N features z_n and K codes c_k with Euclidean distances D_nk = ||z_n - c_k||,

    minimise over A >= 0   <A, D> - H(A) / epsilon   with   A 1 = 1/N,  A^T 1 = 1/K.

`epsilon` is the inverse of the regularisation strength: larger is closer to unregularised transport.

Solution. A = diag(u) exp(-epsilon D) diag(v), found by scaling the columns (codes), then the rows (features), in turn.
With the scores S = -s D, where s is epsilon over the spread of D, and g = log v, a softmax over codes *is* the row
scaling, so u is never needed and nothing can overflow:

    round 1           g_k  = -log K - logsumexp_n S_nk                 codes first, as in the paper
    rounds 2 .. R     p_nk = softmax_k(S_nk + g_k)
                      m_k  = mean_n p_nk                               share of the mass that code k receives
                      g_k <- g_k - log(K m_k)                          in equilibrium m_k = 1/K
    result            code_n = argmax_k(S_nk + g_k),                   row n of the plan = softmax_k(S_nk + g_k)

The mean and the minimum of D shift every score alike and drop out. Everything works on blocks of rows, so the N x K
matrix is kept only where it fits a memory budget. Reductions over n are all-reduced over a process group if one is
given: the result on every rank is that of one process on the concatenated features.

Everything here is a pure function of tensors, without gradient. Any float dtype goes in; the work is done in float32,
or in float64 if an input is float64.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from .distances import (
    DistanceBlocks,
    best_codes,
    check_finite,
    euclidean,
    full_precision,
    nearest_assign,
    prepare,
    row_blocks,
)


__all__ = [
    "Assignment",
    "nearest_assign",
    "plan_rows",
    "potentials_assign",
    "sample_assign",
    "sinkhorn_assign",
    "sinkhorn_plan",
]

Normalization = Literal["zscore", "sqrt_dim", "none"]


class Assignment(NamedTuple):
    """Result of [`sinkhorn_assign`].

    Attributes:
        codes: (N,) int64 in [0, K), the code with the largest mass in each feature's row of the plan.
        potentials: (K,) float32 or float64, g above. With `scale` they assign further features without Sinkhorn.
        scale: 0-dim, s above, in units of 1 / distance.
        marginal_error: 0-dim, sum_k |m_k - 1/K| in [0, 2] at the last marginals computed: those behind the last update, or
            those of the result where no update needed any (a single cold round).
        iterations: Rounds done; fewer than asked for only if `tolerance` was reached.
    """

    codes: torch.Tensor
    potentials: torch.Tensor
    scale: torch.Tensor
    marginal_error: torch.Tensor
    iterations: int


@torch.no_grad()
def sinkhorn_assign(
    features: torch.Tensor,
    codebook: torch.Tensor,
    *,
    epsilon: float,
    iterations: int,
    normalization: Normalization,
    balance: float = 1.0,
    tolerance: float | None = None,
    potentials: torch.Tensor | None = None,
    memory_budget: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
) -> Assignment:
    """Assigns every feature to one code such that the codes are used (about) equally often.

    Args:
        features: (N, d) float; N may be 0, and may differ between ranks.
        codebook: (K, d) float, the same on every rank.
        epsilon: Inverse regularisation strength, > 0. The paper uses 10.
        iterations: Rounds R >= 0 of Sinkhorn-Knopp. The paper uses 5; 0 rounds give the nearest code.
        normalization: Scale of the distances: s = epsilon / (std(D) + 1e-6) for "zscore" (over all entries, unbiased),
            epsilon / sqrt(d) for "sqrt_dim", epsilon for "none".
        balance: Strength rho in [0, 1] of every update of g. 1 is the paper's balanced transport, 0 is nearest-neighbour
            assignment; with values between, a few rounds stop short of balance, nearer to the nearest codes.
        tolerance: Stop as soon as the marginal error is below this. Costs one host synchronisation per round.
        potentials: (K,) to start from instead of round 1; then all R rounds are updates. A constant added to them
            changes nothing but their rounding.
        memory_budget: Bytes the N x K matrix may take; above, it is recomputed block by block in every round. 0 forces
            that. Default 2 GiB.
        process_group: Solve for the union of the features of all ranks of this group.

    Raises:
        ValueError: For shapes that do not fit, an empty codebook, NaN or inf in the input, or an argument out of range.
    """
    check_settings(epsilon, iterations, normalization, balance)
    features, codebook = prepare(features, codebook)
    num_codes, dim = codebook.shape
    if potentials is not None:
        potentials = _check_potentials(potentials, codebook)

    with full_precision(features):
        distances = DistanceBlocks(features, codebook, memory_budget)
        spread = torch.as_tensor(
            _spread(distances, normalization, dim, process_group), dtype=features.dtype, device=features.device
        )
        scale = epsilon / spread
        scores = distances.scaled_by(-scale)
        num_rows = _all_reduce(features.new_tensor(len(features)), process_group)
        potentials, marginal_error, rounds = _solve(
            scores,
            num_rows,
            num_codes,
            iterations,
            balance=balance,
            tolerance=tolerance,
            start=potentials,
            group=process_group,
        )
        codes = [_most_likely_code(block, potentials) for block in scores]
    return Assignment(torch.cat(codes), potentials, scale, marginal_error, rounds)


@torch.no_grad()
def sinkhorn_plan(
    cost: torch.Tensor, *, epsilon: float, iterations: int, normalization: Normalization, dim: int | None = None
) -> torch.Tensor:
    """Transport plan of a given cost matrix.

    Args:
        cost: (N, K) float, finite.
        epsilon, iterations, normalization: As in [`sinkhorn_assign`].
        dim: Width of the vectors the cost was computed from; needed for "sqrt_dim" only.

    Returns:
        (N, K) float32 or float64 plan. Rows sum to 1, columns to about N/K.

    Raises:
        ValueError: For a cost that is not a matrix with at least one column, NaN or inf in it, or an argument out of range.
    """
    check_settings(epsilon, iterations, normalization)
    if cost.ndim != 2 or cost.shape[1] == 0 or not cost.is_floating_point():
        raise ValueError(f"cost must be a float matrix with at least one column, got {tuple(cost.shape)}, {cost.dtype}")
    if normalization == "sqrt_dim" and (dim is None or dim < 1):
        raise ValueError(
            f'normalization "sqrt_dim" needs dim >= 1, the width of the vectors behind the cost, got {dim}'
        )
    check_finite(cost, "cost")
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    scores = cost * (-epsilon / _spread([cost], normalization, dim))
    check_finite(scores, "epsilon * normalized cost")
    potentials, _, _ = _solve([scores], scores.new_tensor(len(scores)), scores.shape[1], iterations)
    return (scores + potentials).softmax(dim=1)


@torch.no_grad()
def potentials_assign(
    features: torch.Tensor, codebook: torch.Tensor, potentials: torch.Tensor, scale: torch.Tensor | float
) -> torch.Tensor:
    """Codes by stored potentials, argmax_k(-s D_nk + g_k): balanced like the solver's, but decided row by row.

    Args:
        features: (N, d) float.
        codebook: (K, d) float.
        potentials: (K,) float, g of an [`Assignment`] or a running average of it.
        scale: s of an [`Assignment`] or a running average of it.

    Returns:
        (N,) int64 in [0, K); the lowest index among equally good codes.

    Raises:
        ValueError: For shapes that do not fit, an empty codebook, NaN or inf in the input.
    """
    features, codebook = prepare(features, codebook)
    potentials = _check_potentials(potentials, codebook)
    return best_codes(features, codebook, lambda squared: potentials - scale * squared.clamp_min_(0).sqrt_())


@torch.no_grad()
def sample_assign(
    features: torch.Tensor, codebook: torch.Tensor, potentials: torch.Tensor, scale: torch.Tensor | float
) -> torch.Tensor:
    """Draws every feature's code from its row of the plan, softmax_k(-s D_nk + g_k), with torch's random generator.

    Adding Gumbel noise to the logarithm of the plan and taking the largest entry samples from the plan exactly (the
    "Gumbel-max trick"), without leaving the log domain. Arguments, result and errors as in [`potentials_assign`].
    """
    codes = []
    for scores in _plan_scores(features, codebook, potentials, scale):
        gumbel = -torch.empty_like(scores).exponential_().clamp_min(torch.finfo(scores.dtype).tiny).log()
        codes.append((scores + gumbel).argmax(dim=1))
    return torch.cat(codes)


@torch.no_grad()
def plan_rows(
    features: torch.Tensor, codebook: torch.Tensor, potentials: torch.Tensor, scale: torch.Tensor | float
) -> torch.Tensor:
    """The plan itself, softmax_k(-s D_nk + g_k), as one (N, K) matrix whose rows sum to 1.

    Arguments and errors as in [`potentials_assign`].
    """
    return torch.cat([scores.softmax(dim=1) for scores in _plan_scores(features, codebook, potentials, scale)])


# ---- the iteration ---------------------------------------------------------------------------------------------------


def _solve(
    scores: Iterable[torch.Tensor],
    num_rows: torch.Tensor,
    num_codes: int,
    iterations: int,
    *,
    balance: float = 1.0,
    tolerance: float | None = None,
    start: torch.Tensor | None = None,
    group: "dist.ProcessGroup | None" = None,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The rounds of the module's docstring on row blocks of S. Returns g, the last marginal error, and the rounds done."""
    potentials, marginal_error, rounds = start, None, 0
    if start is None and iterations > 0:  # round 1
        column_mass = _all_reduce_logsumexp(_logsumexp_over_rows(scores), group)
        potentials = -balance * (math.log(num_codes) + column_mass)
        potentials = potentials.nan_to_num(posinf=0.0)  # no features at all
        rounds = 1
    elif start is None:
        potentials = num_rows.new_zeros(num_codes)

    tiny = torch.finfo(potentials.dtype).tiny
    while rounds < iterations or marginal_error is None:
        marginals = _marginals(scores, num_rows, potentials, group)
        marginal_error = (marginals - 1 / num_codes).abs().sum()
        if rounds == iterations or (tolerance is not None and marginal_error < tolerance):
            break
        # The clamp pulls a code too far away for float32 in over the next rounds, instead of making it infinite.
        potentials = potentials - balance * (num_codes * marginals).clamp_min(tiny).log()
        rounds += 1
    return potentials, marginal_error, rounds


def _logsumexp_over_rows(scores: Iterable[torch.Tensor]) -> torch.Tensor:
    total = None
    for block in scores:
        mass = block.logsumexp(dim=0) if len(block) else block.new_full(block.shape[1:], -math.inf)
        total = mass if total is None else torch.logaddexp(total, mass)
    return total


def _marginals(scores: Iterable[torch.Tensor], num_rows: torch.Tensor, potentials: torch.Tensor, group) -> torch.Tensor:
    """m_k, the mean over all features of the plan's rows; uniform if there are no features."""
    total, work = torch.zeros_like(potentials), None
    for block in scores:
        work = torch.empty_like(block) if work is None else work[: len(block)]
        torch.add(block, potentials, out=work)
        total += torch.softmax(work, dim=1, out=work).sum(dim=0)
    total = _all_reduce(total, group)
    return torch.where(num_rows > 0, total / num_rows.clamp_min(1), 1 / len(total))


def _most_likely_code(scores: torch.Tensor, potentials: torch.Tensor) -> torch.Tensor:
    """argmax_k(S_nk + g_k). Entries that differ by rounding alone are a tie, and ties go to the nearest code.

    With fewer features than codes one row often gives equal mass to many codes; a bare argmax would let rounding decide.
    """
    log_plan = scores + potentials
    best = log_plan.amax(dim=1, keepdim=True)
    rounding = 8 * torch.finfo(scores.dtype).eps * (1 + potentials.abs())
    return scores.masked_fill(log_plan + rounding < best, -math.inf).argmax(dim=1)


def _spread(
    distances: Iterable[torch.Tensor], normalization: Normalization, dim: int | None, group=None
) -> torch.Tensor | float:
    """What the distances are divided by."""
    if normalization == "zscore":
        return _standard_deviation(distances, group) + 1e-6
    return math.sqrt(dim) if normalization == "sqrt_dim" else 1.0


def _standard_deviation(blocks: Iterable[torch.Tensor], group) -> torch.Tensor:
    """Unbiased standard deviation of all entries: moments per block, merged as in Chan, Golub and LeVeque (1983)."""
    count, mean, variance = 0, 0.0, 0.0
    for block in blocks:
        if block.numel() == 0:
            continue
        block_variance, block_mean = torch.var_mean(block, correction=0)
        share = block.numel() / (count + block.numel())
        variance = _merged_variance(variance, block_variance, mean - block_mean, share)
        mean = mean + (block_mean - mean) * share
        count += block.numel()
    count, mean, variance = (
        torch.as_tensor(x, dtype=block.dtype, device=block.device) for x in (count, mean, variance)
    )
    total = _all_reduce(count.clone(), group)
    share = count / total.clamp_min(1)
    overall_mean = _all_reduce(share * mean, group)
    variance = _all_reduce(share * (variance + (mean - overall_mean).square()), group)
    return (variance * (total / (total - 1).clamp_min(1))).sqrt()


def _merged_variance(first, second, difference_of_means, share_of_second: float):
    within = first + (second - first) * share_of_second
    return within + difference_of_means**2 * (share_of_second * (1 - share_of_second))


def _plan_scores(features, codebook, potentials, scale) -> Iterator[torch.Tensor]:
    """Row blocks of the logarithm of the plan, up to a constant per row."""
    features, codebook = prepare(features, codebook)
    potentials = _check_potentials(potentials, codebook)
    with full_precision(features):
        for rows in row_blocks(features, len(codebook)):
            yield potentials - scale * euclidean(rows, codebook)


# ---- process groups --------------------------------------------------------------------------------------------------


def _all_reduce(tensor: torch.Tensor, group, op=None) -> torch.Tensor:
    if group is not None:
        dist.all_reduce(tensor, op or dist.ReduceOp.SUM, group=group)
    return tensor


def _all_reduce_logsumexp(values: torch.Tensor, group) -> torch.Tensor:
    if group is None:
        return values
    largest = _all_reduce(values.clone(), group, dist.ReduceOp.MAX).nan_to_num(neginf=0.0)
    return largest + _all_reduce((values - largest).exp(), group).log()


# ---- inputs ----------------------------------------------------------------------------------------------------------


def _check_potentials(potentials: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    if potentials.shape != codebook.shape[:1]:
        raise ValueError(f"potentials must have one entry per code, ({len(codebook)},), got {tuple(potentials.shape)}")
    check_finite(potentials, "potentials")
    return potentials.to(codebook.dtype, copy=True)


def check_settings(epsilon: float, iterations: int, normalization: str, balance: float = 1.0):
    """Raises ValueError for a setting of [`sinkhorn_assign`] out of its range."""
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon must be finite and greater than 0, got {epsilon}")
    if iterations < 0 or iterations != int(iterations):
        raise ValueError(f"iterations must be a whole number, 0 or more, got {iterations}")
    if normalization not in ("zscore", "sqrt_dim", "none"):
        raise ValueError(f'normalization must be "zscore", "sqrt_dim" or "none", got {normalization!r}')
    if not 0 <= balance <= 1:
        raise ValueError(f"balance must lie in [0, 1], got {balance}")
