"""The nearest code of every feature, and the best one by stored potentials: exact, and decided row by row. Also the plan.

A matrix product rounds differently for different numbers of rows, which could flip near-ties between codes, so that the codes
of an image would depend on the batch it is in. So the product only gives bounds of the scores. A row is decided if the lower
bound of its best code is above the upper bounds of all others. The candidates of the other rows (few, unless codes coincide)
are compared in float64, from differences z - c instead of products.
"""

import math
from collections.abc import Iterator
from typing import cast

import torch

from .costs import Cost, Points, check_cost, plain_costs, points_of
from .distances import Distances, KeptMatrix, centred, double_dtype, full_precision, operator_namespace, row_blocks
from .solver_choice import Solver, check_solver, use_fused
from .solver_inputs import check_potentials, check_shapes, check_tensor, prepare, prepare_with_potentials


# Pairs of a row and a code whose difference is taken at a time.
PAIRS = 2**16


@torch.no_grad()
def nearest_assign(
    features: torch.Tensor, codebook: torch.Tensor, *, cost: Cost = "euclidean", solver: Solver = "auto"
) -> torch.Tensor:
    """Nearest code of every feature, decided row by row: no feature affects another's code.

    Args:
        features: (N, d) float.
        codebook: (K, d) float.
        cost: As of [`~sinkhorn.sinkhorn_assign`]. "squared_euclidean" gives the same codes as "euclidean".
        solver: "auto", "torch" or "fused", as of [`~sinkhorn.sinkhorn_assign`]. The codes are the same.

    Returns:
        (N,) int64 in [0, K); the lowest index among equally near codes (with "cosine", equal after rounding in float64).

    Raises:
        ValueError: For shapes that do not fit, an empty codebook, NaN, inf or overflowing values in the input.
    """
    return _choose(features, codebook, None, 1.0, cost, solver)


@torch.no_grad()
def potentials_assign(
    features: torch.Tensor,
    codebook: torch.Tensor,
    potentials: torch.Tensor,
    scale: torch.Tensor | float,
    *,
    cost: Cost = "euclidean",
    solver: Solver = "auto",
) -> torch.Tensor:
    """Codes by stored potentials, argmax_k(-s D_nk + g_k): balanced like the solver's, but decided row by row.

    Args:
        features: (N, d) float.
        codebook: (K, d) float.
        potentials: (K,) float, g of an [`~sinkhorn.Assignment`] or a running average of it.
        scale: s of an [`~sinkhorn.Assignment`] or a running average of it.
        cost: That of the assignment.
        solver: "auto", "torch" or "fused", as of [`~sinkhorn.sinkhorn_assign`]. The codes are the same.

    Returns:
        (N,) int64 in [0, K); the lowest index among equally good codes.

    Raises:
        ValueError: For shapes that do not fit, an empty codebook, NaN or inf in the input.
    """
    check_tensor(potentials, "potentials")
    return _choose(features, codebook, potentials, scale, cost, solver)


def _choose(
    features: torch.Tensor,
    codebook: torch.Tensor,
    potentials: torch.Tensor | None,
    scale: torch.Tensor | float,
    cost: Cost,
    solver: Solver,
) -> torch.Tensor:
    """The one place that chooses the implementation: bounds, the same as one operator of a compiled graph, or plain torch."""
    check_shapes(features, codebook)
    check_solver(solver)
    check_cost(cost)
    if features.is_meta or torch.compiler.is_exporting():
        return _plain_best_codes(features, codebook, potentials, scale, cost)
    if torch.compiler.is_compiling():
        scale = torch.ones((), dtype=double_dtype(codebook.device), device=codebook.device) * scale
        return _best_codes_operator(features, codebook, potentials, scale, cost, solver)
    return best_codes(features, codebook, potentials, scale, cost, solver)


def best_codes(
    features: torch.Tensor,
    codebook: torch.Tensor,
    potentials: torch.Tensor | None,
    scale: torch.Tensor | float,
    cost: Cost = "euclidean",
    solver: Solver = "torch",
) -> torch.Tensor:
    """argmax_k(g_k - s D_nk), (N,), or the nearest codes if `potentials` is None. By bounds, as this module's head says."""
    if potentials is None:
        # The order of distances is that of their squares.
        points = points_of(*prepare(features, codebook), "cosine" if cost == "cosine" else "euclidean")
    else:
        points, potentials, scale = prepare_with_potentials(features, codebook, potentials, scale, cost)
    with full_precision(features):
        if use_fused(solver, points.features, points.codebook):
            from .sinkhorn_fused import decided_codes

            codes, is_decided = decided_codes(points, potentials, scale)
        else:
            codes, is_decided = _decided_codes(points, potentials, scale)
        open_rows = is_decided.logical_not_().nonzero().squeeze(1)
        if len(open_rows):
            candidates, choices = points.select(open_rows), codes[open_rows]
            bounds = _ScoreBounds(candidates, potentials, scale)
            for rows in row_blocks(len(open_rows), len(codebook), features.device):
                pairs = (bounds.upper(rows) >= bounds.lower(rows, choices[rows])[:, None]).nonzero()
                choices[rows] = best_of_pairs(*candidates.exact(rows), pairs, potentials, scale, root=points.root)
            codes[open_rows] = choices
    return codes


def _decided_codes(
    points: Points, potentials: torch.Tensor | None, scale: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The code with the largest upper bound, and whether its lower bound is above all others, (N,) each."""
    features, num_codes = points.features, len(points.codebook)
    num_rows = len(features)
    codes = torch.empty(num_rows, dtype=torch.int64, device=features.device)
    is_decided = torch.empty(num_rows, dtype=torch.bool, device=features.device)
    bounds = _ScoreBounds(points, potentials, scale)
    blocks = list(row_blocks(num_rows, num_codes, features.device))
    memory = KeptMatrix((blocks[0].stop if blocks else 0, num_codes), features)
    for rows in blocks:
        upper = bounds.upper(rows, out=memory.matrix[: rows.stop - rows.start])
        _, codes[rows], runner_up = top_two(upper)
        is_decided[rows] = bounds.lower(rows, codes[rows]) > runner_up
    memory.release()
    return codes, is_decided


def best_of_pairs(
    features: torch.Tensor,
    codebook: torch.Tensor,
    pairs: torch.Tensor,
    potentials: torch.Tensor | None = None,
    scale: torch.Tensor | float = 1.0,
    tie: torch.Tensor | None = None,
    root: bool = True,
) -> torch.Tensor:
    """argmax_k(g_k - s D_nk) among some codes of each row, in float64, with D from differences.

    Args:
        features, codebook: (B, d), (K, d).
        pairs: (P, 2) int64, a row and a code that may be its best; at least one for each row.
        potentials, scale: g (K,) and s. If None, the nearest of the codes.
        tie: (P,). Codes whose score is at most this below the best are as good, and the nearest of them wins. By default none.
        root: Whether D is the distance, not its square.

    Returns:
        (B,) int64 in [0, K); the lowest index among equals.
    """
    double = double_dtype(features.device)
    rows, codes = pairs.unbind(dim=1)
    nearness = torch.cat(
        [
            -(features[n].to(double) - codebook[k].to(double)).norm(dim=1)
            for n, k in zip(rows.split(PAIRS), codes.split(PAIRS))
        ]
    )
    if not root:
        nearness = -nearness.square()
    scores = nearness
    if potentials is not None:
        scale = torch.as_tensor(scale, dtype=double, device=features.device)
        scores = potentials[codes].to(double) + scale * nearness
        if tie is not None:
            is_tie = scores + tie >= largest_of_row(scores, rows, len(features))[rows]
            scores = nearness.masked_fill(~is_tie, -math.inf)
    is_best = scores == largest_of_row(scores, rows, len(features))[rows]
    return -largest_of_row(-codes[is_best], rows[is_best], len(features))


def largest_of_row(values: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """(num_rows,): the largest of the values (P,) of each row, for their rows (P,)."""
    return values.new_empty(num_rows).scatter_reduce_(0, rows, values, "amax", include_self=False)


class _ScoreBounds:
    """Bounds of the scores, which are 2 z.c - ||c||^2 for the nearest code, and g - s D with potentials.

    In the former every term has a factor c, so that they are tight however small the codes are beside the features.
    """

    def __init__(self, points: Points, potentials: torch.Tensor | None, scale: torch.Tensor | float):
        self._features, self._codebook = features, codebook = centred(points.features, points.codebook)
        self._potentials, self._scale, self._root = potentials, scale, points.root
        self._rounding = 4 * torch.finfo(codebook.dtype).eps  # of g - s D, relative to |g| and to s D
        of_points = 0 if points.originals is None else 2
        self._error = (4 + of_points + 2 * math.sqrt(codebook.shape[1])) * torch.finfo(codebook.dtype).eps
        # A difference of rounded points may be off by so much, times the sum of their norms.
        self._of_points = torch.finfo(codebook.dtype).eps if of_points else 0.0
        self._row_norms, self._code_norms = features.norm(dim=1), codebook.norm(dim=1)
        # 2 z.c - ||c||^2 + error (||z|| ||c|| + ||c||^2) as one product
        self._left = torch.cat([features, self._error * self._row_norms[:, None]], dim=1)
        self._right = torch.cat([2 * codebook, self._code_norms[:, None]], dim=1).T
        self._underflow = 4 * codebook.shape[1] * torch.finfo(codebook.dtype).tiny  # of squares
        self._bias = (self._error - 1) * self._code_norms.square() + self._underflow

    def upper(self, rows: slice | torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(B, K)."""
        products = torch.addmm(self._bias, self._left[rows], self._right, out=out)
        if self._potentials is None:
            return products
        squared = products.neg_().add_((1 - self._error) * self._row_norms[rows, None].square() - self._underflow)
        distances = squared.clamp_min_(0).sqrt_() if self._root else squared.clamp_min_(0)
        scores = distances.mul_(-self._scale * (1 - self._rounding))
        return scores.add_(self._potentials + self._rounding * self._potentials.abs())

    def lower(self, rows: slice | torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """(B,), of one code for each row."""
        z, c = self._features[rows], self._codebook[codes]
        if self._potentials is None:
            row_norms, code_norms = self._row_norms[rows], self._code_norms[codes]
            rounding = self._error * (row_norms * code_norms + code_norms.square())
            return 2 * (z * c).sum(dim=1) - code_norms.square() - rounding - self._underflow
        g = self._potentials[codes]
        distances = (z - c).norm(dim=1).mul_(1 + self._error + self._rounding)
        if not self._root:
            distances += self._of_points * (self._row_norms[rows] + self._code_norms[codes])
            distances = distances.square_().mul_(1 + self._rounding)
        return g - self._rounding * g.abs() - self._scale * distances


def top_two(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest entry of each row of (B, K) scores, its column, and the second largest entry (-inf if K = 1); (B,) each.

    As `scores.topk(2)`, 2 to 3 times as fast (scripts/benchmark_row_functions.py). A CPU searches a row for an index slowly,
    but takes the maximum of whole rows fast. So columns j, j + w, j + 2w, ... are first merged into one, and only the w maxima
    and the winner's columns are searched.
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


# ---- the plan by stored potentials ------------------------------------------------------------------------------------


@torch.no_grad()
def sample_assign(
    features: torch.Tensor,
    codebook: torch.Tensor,
    potentials: torch.Tensor,
    scale: torch.Tensor | float,
    *,
    cost: Cost = "euclidean",
) -> torch.Tensor:
    """Draws every feature's code from its row of the plan, softmax_k(-s D_nk + g_k), with torch's random generator.

    Adding Gumbel noise to the logarithm of the plan and taking the largest entry samples from the plan exactly (the
    "Gumbel-max trick"), without leaving the log domain. Arguments, result and errors as in [`potentials_assign`].
    """
    check_shapes(features, codebook)
    codes = torch.empty(len(features), dtype=torch.int64, device=features.device)
    with full_precision(features):
        for rows, scores in _plan_scores(features, codebook, potentials, scale, cost):
            gumbel = -torch.empty_like(scores).exponential_().clamp_min(torch.finfo(scores.dtype).tiny).log()
            codes[rows] = (scores + gumbel).argmax(dim=1)
    return codes


@torch.no_grad()
def plan_rows(
    features: torch.Tensor,
    codebook: torch.Tensor,
    potentials: torch.Tensor,
    scale: torch.Tensor | float,
    *,
    cost: Cost = "euclidean",
) -> torch.Tensor:
    """The plan itself, softmax_k(-s D_nk + g_k), as one (N, K) matrix whose rows sum to 1.

    Arguments and errors as in [`potentials_assign`].
    """
    check_shapes(features, codebook)
    with full_precision(features):
        blocks = [scores.softmax(dim=1) for _, scores in _plan_scores(features, codebook, potentials, scale, cost)]
    return torch.cat(blocks) if blocks else potentials.new_zeros(0, len(codebook))


def _plan_scores(
    features: torch.Tensor, codebook: torch.Tensor, potentials: torch.Tensor, scale: torch.Tensor | float, cost: Cost
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Row blocks of the logarithm of the plan, up to a constant per row. To be used in full precision."""
    check_cost(cost)
    points, potentials, scale = prepare_with_potentials(features, codebook, potentials, scale, cost)
    distances = Distances(points)
    for rows in row_blocks(*distances.shape, features.device):
        yield rows, potentials - scale * distances.of_rows(rows)


# ---- for graphs ------------------------------------------------------------------------------------------------------


@torch.library.custom_op(f"{operator_namespace(__name__)}::best_codes", mutates_args=())
def _best_codes_operator(
    features: torch.Tensor,
    codebook: torch.Tensor,
    potentials: torch.Tensor | None,
    scale: torch.Tensor,
    cost: str,
    solver: str,
) -> torch.Tensor:
    """What torch.compile calls as a whole, so that compiled and eager code choose alike, for any number of rows."""
    return best_codes(features, codebook, potentials, scale, cast(Cost, cost), cast(Solver, solver))


@_best_codes_operator.register_fake
def _(features, codebook, potentials, scale, cost, solver):
    check_shapes(features, codebook)
    return features.new_empty(features.shape[0], dtype=torch.int64)


def _plain_best_codes(
    features: torch.Tensor,
    codebook: torch.Tensor,
    potentials: torch.Tensor | None,
    scale: torch.Tensor | float,
    cost: Cost,
) -> torch.Tensor:
    """The same in torch's own operators, for torch.export: in float64, so that products keep the digits that decide."""
    double = double_dtype(features.device)
    features, codebook = features.to(double), codebook.to(double)
    if cost == "cosine" or (potentials is not None and cost == "squared_euclidean"):
        g = 0 if potentials is None else check_potentials(potentials, codebook)
        return (g - scale * plain_costs(features, codebook, cost)).argmax(dim=1)
    scores = 2 * features @ codebook.T - codebook.square().sum(dim=1)
    if potentials is not None:
        distances = (features.square().sum(dim=1, keepdim=True) - scores).clamp_min(0).sqrt()
        scores = check_potentials(potentials, codebook) - scale * distances
    return scores.argmax(dim=1)
