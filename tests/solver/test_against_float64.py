"""The solver beside an iteration of its own equations, dense and in float64, at every scale, balance and epsilon."""

import math
import os

import pytest
import torch

from grids import slow
from optvq_hf.sinkhorn import nearest_assign, potentials_assign, sinkhorn_assign
from reference import points


TIE = 5e-4  # codes whose scores differ by less may be exchanged
ROUNDS = 5


def exact_distances(features, codebook, cost="euclidean"):
    features, codebook = features.double(), codebook.double()
    if cost == "cosine":  # half the squared distance of directions, which keeps all digits
        features, codebook = (
            torch.nn.functional.normalize(x, dim=1, eps=0.0).nan_to_num() for x in (features, codebook)
        )
        costs = (features[:, None] - codebook).square().sum(dim=2) / 2
        is_zero = ~features.any(dim=1)[:, None] | ~codebook.any(dim=1)
        return costs.masked_fill(is_zero, 1.0)
    distances = (features[:, None] - codebook).norm(dim=2)
    return distances if cost == "euclidean" else distances.square()


def exact_scale(distances, epsilon, normalization, dim, cost):
    floor = 1e-6 if cost == "euclidean" else 1e-12  # of squares
    if normalization == "zscore":
        return epsilon / (distances.std() + floor)
    if normalization == "robust":
        return epsilon / ((distances - distances.median()).abs().median() / 0.6745 + floor)
    return torch.tensor(epsilon / (math.sqrt(dim) if normalization == "sqrt_dim" else 1.0), dtype=torch.float64)


def exact_potentials(scores, balance, log_target):
    """g and the smallest logarithm of a mass that each code had."""
    g = balance * (log_target - torch.logsumexp(scores, dim=0))
    smallest = torch.zeros_like(g)
    for _ in range(ROUNDS - 1):
        log_p = scores + g - torch.logsumexp(scores + g, dim=1, keepdim=True)
        log_m = torch.logsumexp(log_p, dim=0) - math.log(len(scores))
        g = g - balance * (log_m - log_target)
        smallest = torch.minimum(smallest, log_m)
    return g, smallest


def score_error(features, codebook, distances, scale, cost):
    """How far scores computed in float32 from the expanded square may be off."""
    if cost == "cosine":
        return (scale * 10 * torch.finfo(torch.float32).eps).item()
    squares = features.double().square().sum(1, keepdim=True) + codebook.double().square().sum(1)
    off = 10 * torch.finfo(torch.float32).eps * squares
    if cost == "squared_euclidean":
        return (scale * off).max().item()
    return (scale * off / torch.maximum(distances, off.sqrt()).clamp_min(1e-300)).max().item()


def check(features, codebook, epsilon, balance, normalization, target=None, cost="euclidean"):
    arguments = {"epsilon": epsilon, "iterations": ROUNDS, "normalization": normalization, "balance": balance}
    result = sinkhorn_assign(features, codebook, target_marginals=target, cost=cost, **arguments)
    g, codes = result.potentials.double(), result.codes
    assert g.isfinite().all() and result.marginal_error.isfinite()

    distances = exact_distances(features, codebook, cost)
    expected_scale = exact_scale(distances, epsilon, normalization, features.shape[1], cost)
    torch.testing.assert_close(result.scale.double(), expected_scale, rtol=1e-5, atol=0)
    scores = -result.scale.double() * distances
    plan = scores + g
    assert (plan.amax(1) - plan.gather(1, codes[:, None]).squeeze(1) <= 1.02 * TIE).all()

    shares = torch.ones(len(codebook)) if target is None else target
    expected, smallest = exact_potentials(scores, balance, shares.double().log().log_softmax(0))
    is_determined = smallest > -60  # float32 holds masses down to e^-87
    assert is_determined.any()
    difference = (g - expected)[is_determined]
    off = (difference - difference.median()).abs().max()  # a constant changes nothing
    assert off <= 1e-3 + 10 * score_error(features, codebook, distances, result.scale.double(), cost)
    if balance == 0:
        assert torch.equal(codes, nearest_assign(features, codebook, cost=cost))
        differ = codes != distances.argmin(dim=1)
        assert not (
            differ & (distances.amax(dim=1) > distances.amin(dim=1))
        ).any()  # a vector of zeros has no nearest code
    stored = potentials_assign(features, codebook, result.potentials, result.scale, cost=cost)
    assert (plan.amax(1) - plan.gather(1, stored[:, None]).squeeze(1) <= 1e-12 * (1 + plan.abs().amax())).all()
    return result


# Powers of ten. The whole takes a minute; a third of it is tested again and again.
GRID = (
    (-20, -15, -10, -6, -3, -1, 1, 3, 5, 7, 9, 11, 13) if os.environ.get("OPTVQ_GRID") == "whole" else (-15, -3, 3, 13)
)


@pytest.mark.parametrize("normalization", ["zscore", "robust", "none", slow("sqrt_dim")])
@pytest.mark.parametrize("epsilon", [10.0, slow(1.0), slow(100.0), slow(1e4)])
@pytest.mark.parametrize("balance", [0.0, 0.9, 1.0, slow(0.1), slow(0.5)])
@pytest.mark.parametrize("magnitude", [1e-22, 1.0, 1e8, *(slow(10.0**power) for power in GRID)])
def test_codes_and_potentials(magnitude, balance, epsilon, normalization):
    features, codebook = points(200, 50, 4)
    features[3] = codebook[5]  # whose expanded square has no digit left
    check(magnitude * features, magnitude * codebook, epsilon, balance, normalization)


@pytest.mark.parametrize("normalization", ["zscore", "none", slow("robust"), slow("sqrt_dim")])
@pytest.mark.parametrize("epsilon", [10.0, slow(1.0), slow(100.0), slow(1e4)])
@pytest.mark.parametrize("balance", [1.0, slow(0.0), slow(0.1), slow(0.5), slow(0.9)])
@pytest.mark.parametrize("magnitude", [1e-22, 1.0, *(slow(10.0**power) for power in (8, *GRID))])
@pytest.mark.parametrize("cost", ["squared_euclidean", "cosine"])
def test_other_costs(cost, magnitude, balance, epsilon, normalization):
    features, codebook = points(200, 50, 4)
    features[3], features[4] = codebook[5], -codebook[5]
    if cost == "cosine":
        features[7], codebook[9] = 0, 0
        features[10] = 1e3 * codebook[5]
    arguments = (magnitude * features, magnitude * codebook, epsilon, balance, normalization)
    # Potentials are as large as scores, which float32 does not hold then.
    if (
        cost == "squared_euclidean"
        and normalization in ("none", "sqrt_dim")
        and balance * epsilon * magnitude**2 > 1e28
    ):
        with pytest.raises(ValueError, match="potentials of epsilon .* are too large for torch.float32"):
            check(*arguments, cost=cost)
    else:
        check(*arguments, cost=cost)


@pytest.mark.parametrize("spread", [1e-2, 1e-5])
@pytest.mark.parametrize("cost", ["squared_euclidean", "cosine"])
def test_other_costs_far_from_the_origin(cost, spread):
    """Vectors with nearly the same direction, and nearly the same place."""
    features, codebook = points(200, 50, 4)
    check(1 + spread * features, 1 + spread * codebook, 10.0, 0.9, "zscore", cost=cost)


def test_features_far_from_all_codes():
    features, codebook = points(200, 50, 4)
    check(1e6 * features, codebook, 10.0, 0.9, "none", cost="squared_euclidean")


@pytest.mark.parametrize("normalization", ["zscore", "robust"])
@pytest.mark.parametrize("cost", ["squared_euclidean", "cosine"])
def test_small_spreads_are_balanced_by_every_cost(cost, normalization):
    """Squares of 1e-8 are no rounding: their spread is not lost in what keeps equal costs from dividing by zero."""
    features, codebook = points(200, 50, 4)
    offset = 1.0 if cost == "cosine" else 0.0
    small, smaller = (
        check(offset + size * features, offset + size * codebook, 10.0, 1.0, normalization, cost=cost)
        for size in (1e-3, 1e-4)
    )
    assert (small.codes == smaller.codes).float().mean() > 0.95
    assert smaller.marginal_error == pytest.approx(small.marginal_error.item(), rel=0.2)


@pytest.mark.parametrize("solver", [nearest_assign, sinkhorn_assign])
def test_an_unknown_cost(solver):
    arguments = {} if solver is nearest_assign else {"epsilon": 1.0, "iterations": 1, "normalization": "none"}
    with pytest.raises(ValueError, match="cost must be one of .*'manhattan'"):
        solver(*points(4, 3, 2), cost="manhattan", **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_skewed_targets(balance, dtype):
    """Shares that float32 does not hold."""
    features, codebook = points(200, 20, 4, dtype)
    target = torch.logspace(-46, 39, 20, dtype=torch.float64)
    arguments = {"epsilon": 10.0, "iterations": ROUNDS, "normalization": "zscore", "balance": balance}
    result = check(features, codebook, 10.0, balance, "zscore", target)
    scaled = sinkhorn_assign(features, codebook, target_marginals=1e-40 * target, **arguments)
    torch.testing.assert_close(scaled.potentials, result.potentials)


@pytest.mark.parametrize("shape", [(4096, 2048, 1), (500, 300, 3)])
@pytest.mark.parametrize("change", [{"iterations": 0}, {"balance": 0.0}])
def test_without_rounds_or_balance_codes_are_the_nearest(shape, change):
    features, codebook = points(*shape)
    arguments = {"epsilon": 10.0, "iterations": 5, "normalization": "zscore", **change}
    assert torch.equal(sinkhorn_assign(features, codebook, **arguments).codes, nearest_assign(features, codebook))


def test_large_scores_between_the_balances():
    """Rows of 1e9 and more, where float32 has no digit left for what tells codes apart."""
    torch.manual_seed(0)
    features, codebook = torch.randn(200, 4) * 1e8, torch.randn(50, 4) * 1e8
    result = check(features, codebook, 10.0, 0.9, "none")
    again = potentials_assign(features, codebook, result.potentials, result.scale)
    assert torch.equal(again, result.codes)


@pytest.mark.parametrize("shape", [(0, 5, 3), (1, 1, 1), (7, 1, 4), (3, 200, 4), (200, 3, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cost", ["squared_euclidean", "cosine"])
def test_edges_of_other_costs(cost, dtype, shape):
    features, codebook = (x.to(dtype) for x in points(*shape))
    arguments = {"epsilon": 10.0, "iterations": ROUNDS, "normalization": "zscore", "cost": cost}
    result = sinkhorn_assign(features, codebook, **arguments)
    assert result.codes.shape == shape[:1] and result.potentials.isfinite().all() and result.marginal_error <= 2
    strided = sinkhorn_assign(features.repeat(1, 2)[:, : shape[2]], codebook.T.contiguous().T, **arguments)
    assert torch.equal(strided.codes, result.codes) and torch.equal(strided.potentials, result.potentials)
    streamed = sinkhorn_assign(features, codebook, memory_budget=0, **arguments)
    assert torch.equal(streamed.codes, result.codes)
    for same in (torch.zeros_like(codebook), torch.ones_like(codebook)):  # all costs are equal
        codes = sinkhorn_assign(same[:1].expand(len(features), -1), same, **arguments).codes
        assert ((codes >= 0) & (codes < shape[1])).all()
