"""Balanced assignment of features to codes: entropic optimal transport, solved by Sinkhorn-Knopp in the log domain.

Problem (OptVQ, arXiv 2412.15195). Given N features z_n and K codes c_k with Euclidean distances D_nk = ||z_n - c_k||, or one of
the other costs of `costs.py`,

    minimise over A >= 0   <A, D> - H(A) / epsilon   with   A 1 = 1/N,  A^T 1 = 1/K.

`epsilon` is the inverse of the regularisation strength: larger is closer to unregularised transport.

Solution. A = diag(u) exp(-epsilon D) diag(v), found by scaling the columns (codes), then the rows (features), in turn.
With the scores S = -s D, where s is epsilon over the spread of D, and the potentials g = log v, a softmax over codes *is* the
row scaling:

    round 1           g_k  = -log K - logsumexp_n S_nk                 codes first, as in the paper
    rounds 2 .. R     p_nk = softmax_k(S_nk + g_k)
                      m_k  = mean_n p_nk                               share of the mass that code k receives
                      g_k <- g_k - log(K m_k)                          in equilibrium m_k = 1/K
    result            code_n = argmax_k(S_nk + g_k),                   row n of the plan = softmax_k(S_nk + g_k)

`_iterate` below is these lines. It asks [`~sinkhorn_rows.RowPasses`] for what needs the N x K matrix. The mean and the minimum
of D shift every score alike and drop out. Over a process group, the result on every rank is that of one process on the
features of all ranks.

Everything here is a function of tensors alone, without gradient. Any float dtype goes in; N x K work is done in float32, or in
float64 if an input is float64, and the potentials are iterated in float64.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist

from .costs import Cost, check_cost, points_of
from .distances import (
    Distances,
    GivenDistances,
    double_dtype,
    full_precision,
    is_beyond_float32,
    median_deviation,
    operator_namespace,
    working_dtype,
)
from .nearest import nearest_assign, plan_rows, potentials_assign, sample_assign
from .sinkhorn_rows import BlockedRows, RowPasses, Statistics
from .solver_choice import Solver, check_solver, use_fused
from .solver_inputs import (
    DTYPES,
    check_finite,
    check_limits,
    check_potentials,
    check_potentials_range,
    check_settings,
    check_shapes,
    check_tensor,
    is_in_range,
    log_target,
    prepare,
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

Normalization = Literal["zscore", "robust", "sqrt_dim", "none"]
# Median absolute deviation of a normal distribution of standard deviation 1.
NORMAL_DEVIATION = 0.6745


class Assignment(NamedTuple):
    """Result of [`sinkhorn_assign`].

    Attributes:
        codes: (N,) int64 in [0, K), the code with the largest mass in each feature's row of the plan.
        potentials: (K,) float32 or float64, g above. With `scale` they assign further features without Sinkhorn.
        scale: 0-dim, s above, in units of 1 / distance.
        marginal_error: 0-dim, sum_k |m_k - target_k| in [0, 2] at the last marginals computed: those behind the last update, or
            those of the result if no update followed (a single cold round, 0 rounds, or `tolerance` reached).
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
    cost: Cost = "euclidean",
    solver: Solver = "auto",
) -> Assignment:
    """Assigns every feature to one code such that the codes are used (about) equally often.

    Args:
        features: (N, d) float; N may be 0, and may differ between ranks.
        codebook: (K, d) float, the same on every rank.
        epsilon: Inverse regularisation strength, > 0. The paper uses 10.
        iterations: Rounds R >= 0 of Sinkhorn-Knopp. The paper uses 5; 0 rounds give the nearest code.
        normalization: Scale of the distances: s = epsilon / (std(D) + 1e-6) for "zscore" (over all entries, unbiased),
            epsilon / (median(|D - median(D)|) / 0.6745 + 1e-6) for "robust", epsilon / sqrt(d) for "sqrt_dim", epsilon for
            "none". For "squared_euclidean" and "cosine", squares of distances, 1e-12 instead of 1e-6.
        balance: Strength rho in [0, 1] of every update of g. 1 is the paper's balanced transport, 0 is nearest-neighbour
            assignment; with values between, a few rounds stop short of balance, nearer to the nearest codes.
        tolerance: Stop as soon as the marginal error is below this. Costs one host synchronisation per round.
        potentials: (K,) to start from instead of round 1, the same on every rank; then all R rounds are updates. A constant
            added to them changes nothing but their rounding.
        memory_budget: Bytes for rows of the N x K matrix that are kept from round to round; the others are computed again in
            every round. 0 keeps none. Two or three blocks of rows come on top. Default 2 GiB.
        process_group: Solve for the union of the features of all ranks of this group.
        target_marginals: (K,) float, > 0: the share of the features that each code is to receive, up to a common factor.
            Default equal shares, 1/K.
        cost: What the distances D are: "euclidean" (the paper's), "squared_euclidean" (that of k-means), or "cosine", 1 - cos,
            which is 1 for vectors of zeros. See `costs.py`.
        solver: "torch", or "fused" for Triton kernels that never write the matrix (GPUs, float32). "auto" uses them on GPUs on
            which they pass a check against torch at the first call. Results are the same within rounding.

    Raises:
        TypeError: For something that is not a tensor, or not a number.
        ValueError: For shapes that do not fit, an empty codebook, NaN or inf in the input, an argument out of range, or an
            epsilon with which scores or potentials leave the range of the dtype.
    """
    check_shapes(features, codebook)
    settings = _Settings(
        epsilon,
        iterations,
        normalization,
        balance,
        tolerance,
        potentials,
        memory_budget,
        target_marginals,
        cost,
        solver,
    )
    check_solver(solver)
    check_cost(cost)
    if not torch.compiler.is_compiling():
        return _solve(features, codebook, settings, process_group)
    if process_group is None:
        return _solve_in_graph(features, codebook, settings)
    return _solve_between_graphs(features, codebook, settings, process_group)


class _Settings(NamedTuple):
    """Arguments of [`sinkhorn_assign`]."""

    epsilon: float
    iterations: int
    normalization: Normalization
    balance: float
    tolerance: float | None
    potentials: torch.Tensor | None
    memory_budget: int | None
    target_marginals: torch.Tensor | None
    cost: Cost
    solver: Solver


def _solve(
    features: torch.Tensor,
    codebook: torch.Tensor,
    settings: _Settings,
    process_group: "dist.ProcessGroup | None" = None,
    dtype: torch.dtype | None = None,
) -> Assignment:
    """For tensors with data. Codes are those of the potentials and the scale as they are returned, in `dtype`."""
    dtype = dtype or working_dtype(features, codebook)
    epsilon, iterations, normalization, balance, tolerance, potentials, memory_budget, target_marginals = settings[:-2]
    check_settings(epsilon, iterations, normalization, balance)
    check_limits(tolerance, memory_budget)
    if features.is_meta:
        raise ValueError("features must hold data, got a tensor on the device meta")
    features, codebook = prepare(features, codebook)
    target = log_target(target_marginals, codebook)
    start = None if potentials is None else check_potentials(potentials, codebook).to(target.dtype, copy=True)
    points = points_of(features, codebook, settings.cost, process_group)
    distances = Distances(points)
    with full_precision(features), make_rows(distances, memory_budget, process_group, settings.solver) as rows:
        spread = _spread(rows.statistics(), normalization, codebook.shape[1], distances, process_group)
        scale = (epsilon / spread).to(dtype)
        of_points = scale if points.unit == 1 else (scale.to(double_dtype(scale.device)) * points.unit).to(dtype)
        is_beyond = is_beyond_float32(distances, of_points, process_group)
        value, is_beyond = torch.stack([of_points, is_beyond.to(dtype)]).tolist()  # waits once for the device
        if is_in_range(value, codebook, f"epsilon {epsilon}") and not is_beyond:
            rows.set_scale(of_points)
            g, marginal_error, rounds = _iterate(rows, target, iterations, balance, tolerance, start)
            if dtype != codebook.dtype:  # a large constant in g changes no code, but would cost digits
                g = g - g.mean()
            g = g.to(dtype)
            check_potentials_range(g, dtype, f"potentials of epsilon {epsilon}")
            return Assignment(rows.most_likely(g), g, scale, marginal_error.to(dtype), rounds)
    return _solve(features.double(), codebook.double(), settings, process_group, dtype)


def _iterate(
    rows: RowPasses,
    log_target: torch.Tensor,
    iterations: int,
    balance: float = 1.0,
    tolerance: float | None = None,
    start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The rounds at the head of this module, with log_target = log(1/K) if shares are equal.

    Returns:
        g (K,), the last marginal error (0-dim), and the rounds done.
    """
    if start is not None or iterations == 0:
        g, rounds = torch.zeros_like(log_target) if start is None else start, 0
    else:
        g, rounds = balance * (log_target - rows.log_column_sums()), 1
    log_m = None
    while rounds < iterations or log_m is None:
        log_m = rows.log_mass(g) - rows.log_num_rows
        if rounds == iterations or (tolerance is not None and _marginal_error(log_m, log_target) < tolerance):
            break
        g = torch.sub(g, log_m - log_target, alpha=balance)
        rounds += 1
    return g, _marginal_error(log_m, log_target), rounds


def _marginal_error(log_m: torch.Tensor, log_target: torch.Tensor) -> torch.Tensor:
    return (log_m.exp() - log_target.exp()).abs().sum()


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
    check_tensor(cost, "cost")
    if cost.ndim != 2 or cost.shape[1] == 0 or cost.dtype not in DTYPES or cost.is_meta:
        raise ValueError(
            f"cost must be a float matrix with at least one column, got {tuple(cost.shape)}, {cost.dtype}, {cost.device}"
        )
    if normalization == "sqrt_dim" and not (isinstance(dim, int) and dim >= 1):
        raise ValueError(
            f'normalization "sqrt_dim" needs dim >= 1, the width of the vectors behind the cost, got {dim}'
        )
    check_finite(cost, "cost")
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    with full_precision(cost):
        cost = cost - cost.amin() if len(cost) else cost
        distances = GivenDistances(cost)
        with make_rows(distances) as rows:
            scale = (epsilon / _spread(rows.statistics(), normalization, dim, distances)).to(cost.dtype)
            if not is_in_range(scale.item(), cost, f"epsilon {epsilon}"):
                settings = {"epsilon": epsilon, "iterations": iterations, "normalization": normalization, "dim": dim}
                return sinkhorn_plan(cost.double(), **settings).to(cost.dtype)
            check_finite(scale * cost, "epsilon * normalized cost")
            rows.set_scale(scale)
            g, _, _ = _iterate(rows, log_target(None, cost.T), iterations)
        return (g - scale * cost.to(g.dtype)).softmax(dim=1).to(cost.dtype)


# ---- what the iteration needs ----------------------------------------------------------------------------------------


def make_rows(
    distances: Distances | GivenDistances,
    memory_budget: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    solver: Solver = "torch",
) -> AbstractContextManager[RowPasses]:
    """The one place that chooses the implementation of [`~sinkhorn_rows.RowPasses`]."""
    if isinstance(distances, Distances) and use_fused(solver, distances.features, distances.codebook, process_group):
        from .sinkhorn_fused import FusedRows

        return FusedRows(distances, process_group)
    return BlockedRows(distances, memory_budget, process_group)


def _spread(
    statistics: Statistics,
    normalization: Normalization,
    dim: int | None,
    distances: Distances | GivenDistances,
    process_group: "dist.ProcessGroup | None" = None,
) -> torch.Tensor:
    """What the distances are divided by, 0-dim.

    "zscore" is their unbiased standard deviation; "robust" the median absolute deviation of the distances to some codes over
    0.6745, which is the same for normally distributed distances, and which no outlier among features or codes can inflate.
    Both are raised by 1e-6 of a distance, so that equal distances do not divide by zero: 1e-12 where costs are squares of
    distances ("squared_euclidean" and "cosine").
    """
    floor = 1e-6 if not isinstance(distances, Distances) or distances.points.root else 1e-12
    unit = distances.points.unit if isinstance(distances, Distances) else 1.0
    if normalization == "zscore":
        return (statistics.squared_deviations / (statistics.count - 1).clamp_min(1)).sqrt() * unit + floor
    if normalization == "robust":
        deviation = median_deviation(distances, process_group)
        deviation = deviation if unit == 1 else deviation.to(statistics.mean.dtype) * unit  # may underflow in float32
        return deviation / NORMAL_DEVIATION + floor
    return torch.full_like(statistics.mean, math.sqrt(dim or 1) if normalization == "sqrt_dim" else 1.0)


# ---- for graphs ------------------------------------------------------------------------------------------------------


_solve_between_graphs = cast(Callable[..., Assignment], torch.compiler.disable(_solve))


def _solve_in_graph(features: torch.Tensor, codebook: torch.Tensor, settings: _Settings) -> Assignment:
    """[`_solve`] as one operator. What schedules change is a tensor for it, so that a new value does not compile again."""
    one = torch.ones((), dtype=torch.float64)
    settings = settings._replace(epsilon=one * settings.epsilon, balance=one * settings.balance)
    codes, g, scale, marginal_error, rounds = _solve_operator(features, codebook, *settings)
    iterations = settings.iterations if settings.tolerance is None else int(rounds.item())
    return Assignment(codes, g, scale, marginal_error, iterations)


def _solve_eagerly(features: torch.Tensor, codebook: torch.Tensor, *values: Any) -> tuple[torch.Tensor, ...]:
    plain = (v.item() if name in ("epsilon", "balance") else v for name, v in zip(_Settings._fields, values))
    *tensors, rounds = _solve(features, codebook, _Settings(*plain))
    return (*tensors, torch.tensor(rounds))


_solve_operator = torch.library.custom_op(
    f"{operator_namespace(__name__)}::sinkhorn_assign",
    _solve_eagerly,
    mutates_args=(),
    schema="(Tensor features, Tensor codebook, Tensor epsilon, int iterations, str normalization, Tensor balance, "
    "float? tolerance, Tensor? potentials, int? memory_budget, Tensor? target_marginals, str cost, str solver) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_solve_operator.register_fake
def _(features, codebook, *_):
    check_shapes(features, codebook)
    like = codebook.new_empty((), dtype=working_dtype(features, codebook))
    codes = features.new_empty(features.shape[0], dtype=torch.int64)
    return codes, like.new_empty(len(codebook)), like, torch.empty_like(like), torch.empty((), dtype=torch.int64)
