"""Balanced assignment of features to codes: entropic optimal transport, solved by Sinkhorn-Knopp in the log domain.

Problem (OptVQ, arXiv 2412.15195). Given N features z_n and K codes c_k with Euclidean distances D_nk = ||z_n - c_k||,

    minimise over A >= 0   <A, D> - H(A) / epsilon   with   A 1 = 1/N,  A^T 1 = 1/K.

`epsilon` is the inverse of the regularisation strength: larger is closer to unregularised transport.

Solution. A = diag(u) exp(-epsilon D) diag(v), found by scaling the columns (codes), then the rows (features), in turn.
With the scores S = -s D, where s is epsilon over the spread of D, and g = log v, a softmax over codes *is* the row scaling:

    round 1           g_k  = -log K - logsumexp_n S_nk                 codes first, as in the paper
    rounds 2 .. R     p_nk = softmax_k(S_nk + g_k)
                      m_k  = mean_n p_nk                               share of the mass that code k receives
                      g_k <- g_k - log(K m_k)                          in equilibrium m_k = 1/K
    result            code_n = argmax_k(S_nk + g_k),                   row n of the plan = softmax_k(S_nk + g_k)

Computed like this, every round takes N x K exponentials. `_solve` takes them once: it works on the factors u and v of a
kernel E = exp(S) whose rows and columns are rescaled such that nothing in it, u or v can overflow (see `kernel`), and a round
is two matrix-vector products. The logarithm of v is kept, so the potentials are exact however far they lie apart.

The mean and the minimum of D shift every score alike and drop out. Everything works on blocks of rows, so an N x K matrix is
kept only where it fits a memory budget. Reductions over n are all-reduced over a process group if one is given: the result
on every rank is that of one process on the concatenated features.

Everything here is a function of tensors alone, without gradient. Any float dtype goes in; the work is done in float32,
or in float64 if an input is float64.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from .distances import (
    Distances,
    best_codes,
    check_finite,
    full_precision,
    nearest_assign,
    prepare,
    row_blocks,
)
from .kernel import GivenCost, Kernel
from .spread import NORMALIZATIONS, Normalization, spread_and_nearest


__all__ = [
    "Assignment",
    "nearest_assign",
    "plan_rows",
    "potentials_assign",
    "sample_assign",
    "sinkhorn_assign",
    "sinkhorn_plan",
]


class Assignment(NamedTuple):
    """Result of [`sinkhorn_assign`].

    Attributes:
        codes: (N,) int64 in [0, K), the code with the largest mass in each feature's row of the plan.
        potentials: (K,) float32 or float64, g above. With `scale` they assign further features without Sinkhorn.
        scale: 0-dim, s above, in units of 1 / distance.
        marginal_error: 0-dim, sum_k |m_k - target_k| in [0, 2] at the last marginals computed: those behind the last update, or
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
    target_marginals: torch.Tensor | None = None,
) -> Assignment:
    """Assigns every feature to one code such that the codes are used (about) equally often.

    Args:
        features: (N, d) float; N may be 0, and may differ between ranks.
        codebook: (K, d) float, the same on every rank.
        epsilon: Inverse regularisation strength, > 0. The paper uses 10.
        iterations: Rounds R >= 0 of Sinkhorn-Knopp. The paper uses 5; 0 rounds give the nearest code.
        normalization: Scale of the distances: s = epsilon / (std(D) + 1e-6) for "zscore" (over all entries, unbiased),
            epsilon / (median(|D - median(D)|) / 0.6745 + 1e-6) for "robust", epsilon / sqrt(d) for "sqrt_dim", epsilon for
            "none".
        balance: Strength rho in [0, 1] of every update of g. 1 is the paper's balanced transport, 0 is nearest-neighbour
            assignment; with values between, a few rounds stop short of balance, nearer to the nearest codes.
        tolerance: Stop as soon as the marginal error is below this. Costs one host synchronisation per round.
        potentials: (K,) to start from instead of round 1, the same on every rank; then all R rounds are updates. A constant
            added to them changes nothing but their rounding.
        memory_budget: Bytes for rows of the N x K matrix that are kept from round to round; the others are computed anew in
            every round. 0 keeps none. Two or three blocks of rows come on top. Default 2 GiB.
        process_group: Solve for the union of the features of all ranks of this group.
        target_marginals: (K,) float, > 0: the share of the features that each code is to receive, up to a common factor.
            Default equal shares, 1/K.

    Raises:
        ValueError: For shapes that do not fit, an empty codebook, NaN or inf in the input, or an argument out of range.
    """
    check_settings(epsilon, iterations, normalization, balance)
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 or greater, got {tolerance}")
    features, codebook = prepare(features, codebook)
    num_codes, dim = codebook.shape
    log_target = _log_target(target_marginals, codebook, num_codes)
    if potentials is not None:
        potentials = _check_potentials(potentials, codebook)

    with full_precision(features):
        kernel = Kernel(Distances(features, codebook), memory_budget, process_group)
        spread, nearest = spread_and_nearest(kernel, normalization, dim)
        scale = epsilon / spread
        if _is_beyond_float32(features, codebook, scale, kernel):
            kernel.release()
            solution = sinkhorn_assign(
                features.double(),
                codebook.double(),
                epsilon=epsilon,
                iterations=iterations,
                normalization=normalization,
                balance=balance,
                tolerance=tolerance,
                potentials=potentials,
                memory_budget=memory_budget,
                process_group=process_group,
                target_marginals=target_marginals,
            )
            return Assignment(*(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in solution))
        log_v, marginal_error, rounds = _solve(
            kernel,
            scale,
            nearest,
            log_target,
            iterations,
            target_is_uniform=target_marginals is None,
            balance=balance,
            tolerance=tolerance,
            start=potentials,
        )
        codes = kernel.most_likely_codes(log_v)
        potentials = _potentials(kernel, log_v)
        kernel.release()
    return Assignment(codes, potentials, scale, marginal_error, rounds)


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
    with full_precision(cost):
        cost = cost - cost.amin() if len(cost) else cost
        kernel = Kernel(GivenCost(cost))
        spread, nearest = spread_and_nearest(kernel, normalization, dim)
        scale = epsilon / spread
        check_finite(scale * nearest, "epsilon * normalized cost")
        log_v, _, _ = _solve(kernel, scale, nearest, _log_target(None, cost, cost.shape[1]), iterations)
        potentials = _potentials(kernel, log_v)
        kernel.release()
        return (potentials - scale * cost).softmax(dim=1)


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
    return best_codes(features, codebook, _check_potentials(potentials, codebook), scale)


@torch.no_grad()
def sample_assign(
    features: torch.Tensor, codebook: torch.Tensor, potentials: torch.Tensor, scale: torch.Tensor | float
) -> torch.Tensor:
    """Draws every feature's code from its row of the plan, softmax_k(-s D_nk + g_k), with torch's random generator.

    Adding Gumbel noise to the logarithm of the plan and taking the largest entry samples from the plan exactly (the
    "Gumbel-max trick"), without leaving the log domain. Arguments, result and errors as in [`potentials_assign`].
    """
    codes = torch.empty(len(features), dtype=torch.int64, device=features.device)
    for rows, scores in _plan_scores(features, codebook, potentials, scale):
        gumbel = -torch.empty_like(scores).exponential_().clamp_min(torch.finfo(scores.dtype).tiny).log()
        codes[rows] = (scores + gumbel).argmax(dim=1)
    return codes


@torch.no_grad()
def plan_rows(
    features: torch.Tensor, codebook: torch.Tensor, potentials: torch.Tensor, scale: torch.Tensor | float
) -> torch.Tensor:
    """The plan itself, softmax_k(-s D_nk + g_k), as one (N, K) matrix whose rows sum to 1.

    Arguments and errors as in [`potentials_assign`].
    """
    blocks = [scores.softmax(dim=1) for _, scores in _plan_scores(features, codebook, potentials, scale)]
    return torch.cat(blocks) if blocks else potentials.new_zeros(0, len(codebook))


# ---- the iteration ---------------------------------------------------------------------------------------------------

# Rounds between two references of the kernel, if balanced and with equal targets. Such a round, after the first, moves a
# potential by at most log N up and log K down, so four more leave the factors within the range of float32.
ROUNDS_PER_REFERENCE = 5


def _solve(
    kernel: Kernel,
    scale: torch.Tensor,
    nearest: torch.Tensor,
    log_target: torch.Tensor,
    iterations: int,
    *,
    target_is_uniform: bool = True,
    balance: float = 1.0,
    tolerance: float | None = None,
    start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The rounds of the module's docstring on the plan's factors, P = diag(u) E diag(v), with v = exp(g - s reference).

        u_n = 1 / sum_k E_nk v_k          m_k = v_k sum_n u_n E_nk / N          v_k <- v_k (target_k / m_k)^balance

    Leaves E behind in the kernel, with a reference that suits the result. Returns log v, the last marginal error, and the
    rounds done.
    """
    log_rows = kernel.num_rows.clamp_min(1).log()
    if start is None and iterations == 0:
        start = torch.zeros_like(log_target)
    if start is None:  # round 1 has no v yet, and weighs all rows alike
        kernel.rescale(scale, nearest)
        log_v = None
    elif _is_near(start, scale * nearest):  # spares the pass over all distances
        kernel.rescale(scale, nearest)
        log_v = start - scale * nearest
    else:
        log_v = kernel.move_reference(scale, start)
    is_uniform = balance == 1 and target_is_uniform

    marginal_error, rounds, age = None, 0, 0
    while rounds < iterations or marginal_error is None:
        if age == (ROUNDS_PER_REFERENCE if is_uniform else 1):
            log_v = kernel.move_reference(scale, _potentials(kernel, log_v))
            age = 0
        log_mass = kernel.log_column_sums(log_v)
        if log_v is not None:
            marginal_error = ((log_v + log_mass - log_rows).exp() - log_target.exp()).abs().sum()
            if rounds == iterations or (tolerance is not None and marginal_error < tolerance):
                break
        balanced = log_target + log_rows - log_mass
        log_v = (
            balanced if balance == 1 else torch.lerp(-scale * nearest if log_v is None else log_v, balanced, balance)
        )
        rounds += 1
        age += 1
    if not is_uniform and age > 0:
        log_v = kernel.move_reference(scale, _potentials(kernel, log_v))
    return log_v, marginal_error, rounds


def _is_near(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether potentials differ, but for a constant, by less than e^40: well within the range of the kernel."""
    if torch.compiler.is_compiling():
        return False
    low, high = (first - second).aminmax()
    return (high - low < 40).item()


def _potentials(kernel: Kernel, log_v: torch.Tensor) -> torch.Tensor:
    """g of v; zeros if there are no features at all."""
    return torch.where(kernel.num_rows > 0, log_v + kernel.scale * kernel.reference, 0)


def _plan_scores(features, codebook, potentials, scale) -> Iterator[tuple[slice, torch.Tensor]]:
    """Row blocks of the logarithm of the plan, up to a constant per row."""
    features, codebook = prepare(features, codebook)
    potentials = _check_potentials(potentials, codebook)
    with full_precision(features):
        distances = Distances(features, codebook)
        for rows in row_blocks(*distances.shape, features.device):
            yield rows, potentials - scale * distances.of_rows(rows)


def _is_beyond_float32(features: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor, kernel: Kernel) -> bool:
    """Whether features are so far from all codes that their distances agree in the digits that float32 has."""
    if features.dtype != torch.float32 or features.device.type == "mps" or torch.compiler.is_compiling():
        return False
    norms = torch.cat([features.norm(dim=1), features.new_zeros(1)])  # there may be no features here
    largest = -kernel.minimum(-norms.amax())
    rounding = scale * torch.finfo(features.dtype).eps * largest
    return ((rounding > 1e-4) & (largest > 10 * codebook.norm(dim=1).amax())).item()


# ---- inputs ----------------------------------------------------------------------------------------------------------


def _check_potentials(potentials: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    if potentials.shape != codebook.shape[:1]:
        raise ValueError(f"potentials must have one entry per code, ({len(codebook)},), got {tuple(potentials.shape)}")
    check_finite(potentials, "potentials")
    return potentials.to(codebook.dtype)


def _log_target(marginals: torch.Tensor | None, like: torch.Tensor, num_codes: int) -> torch.Tensor:
    if marginals is None:
        return like.new_full((num_codes,), -math.log(num_codes))
    if marginals.shape != (num_codes,):
        raise ValueError(f"target_marginals must have one entry per code, ({num_codes},), got {tuple(marginals.shape)}")
    if not torch.compiler.is_compiling() and not (marginals.isfinite() & (marginals > 0)).all():
        raise ValueError("target_marginals must be finite and greater than 0")
    return marginals.to(like.dtype).log().log_softmax(dim=0)


def check_settings(epsilon: float, iterations: int, normalization: str, balance: float = 1.0):
    """Raises ValueError for a setting of [`sinkhorn_assign`] out of its range."""
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon must be finite and greater than 0, got {epsilon}")
    if not (0 <= iterations < math.inf) or iterations != int(iterations):
        raise ValueError(f"iterations must be a whole number, 0 or more, got {iterations}")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}")
    if not 0 <= balance <= 1:
        raise ValueError(f"balance must lie in [0, 1], got {balance}")
