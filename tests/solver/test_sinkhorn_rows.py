"""The five row passes, and the small functions they are made of, each beside its one-line torch form."""

import math

import pytest
import torch

from grids import slow
from optvq_hf import distances
from optvq_hf.costs import Points
from optvq_hf.distances import Distances, GivenDistances, median, median_deviation
from optvq_hf.sinkhorn import _iterate, make_rows, sinkhorn_assign
from optvq_hf.sinkhorn_rows import block_moments, exponentiate_, weighted_column_sums
from reference import exact_iteration, points


def exact(features, codebook):
    return torch.cdist(features.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")


# ---- the passes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 50 * 4 * 300, 0])
@pytest.mark.parametrize("scale", [1e-2, 1.0, slow(30.0), 300.0])
@pytest.mark.parametrize("magnitude", [1.0, slow(1e-4), slow(1e4)])
def test_passes_equal_the_dense_formulas(monkeypatch, budget, scale, magnitude):
    monkeypatch.setitem(distances.BLOCK_ELEMENTS, "cpu", 50 * 100)
    monkeypatch.setattr(distances, "MIN_BLOCK_ROWS", 1)
    features, codebook = (magnitude * x for x in points(777, 50, 6))
    cost = exact(features, codebook)
    scale = torch.tensor(scale / magnitude)
    scores = -scale.double() * cost
    generator = torch.Generator().manual_seed(1)
    with make_rows(Distances(Points(features, codebook)), budget) as rows:
        statistics = rows.statistics()
        assert statistics.count == cost.numel() and rows.log_num_rows.exp() == pytest.approx(777)
        torch.testing.assert_close(statistics.mean, cost.mean(), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            statistics.squared_deviations, (cost - cost.mean()).square().sum(), rtol=1e-5, atol=0
        )
        torch.testing.assert_close(statistics.nearest.double(), cost.amin(0), rtol=1e-5, atol=1e-5 * magnitude)

        rows.set_scale(scale)
        tolerance = {"rtol": 1e-5, "atol": 2e-5 * max(1.0, scale.item() * magnitude)}
        torch.testing.assert_close(rows.log_column_sums(), scores.logsumexp(0), **tolerance)
        for spread in (0.0, 1.0, 30.0, 1000.0, 1.0):  # far and back: the kernel is made to suit
            g = spread * torch.randn(50, generator=generator, dtype=torch.float64) + 3 * spread
            expected = (scores + g).log_softmax(1).logsumexp(0)
            found = rows.log_mass(g)
            floor = -80.0  # the smallest mass that float32 holds beside 1
            torch.testing.assert_close(found.clamp_min(floor), expected.clamp_min(floor), **tolerance)
            plan = (scores + g).softmax(1)
            codes = rows.most_likely(g)
            chosen = (scores + g).gather(1, codes[:, None]).squeeze(1)
            assert ((scores + g).amax(1) - chosen <= 5.1e-4).all() and plan.gather(1, codes[:, None]).min() > 0


def test_no_rows_and_one_code():
    for num_rows, num_codes in ((0, 5), (3, 1), (0, 1)):
        features, codebook = points(num_rows, num_codes, 4)
        with make_rows(Distances(Points(features, codebook))) as rows:
            statistics = rows.statistics()
            assert statistics.count == num_rows * num_codes and statistics.nearest.isfinite().all()
            rows.set_scale(torch.tensor(10.0))
            g = torch.zeros(num_codes, dtype=torch.float64)
            assert rows.log_column_sums().isfinite().all() and rows.log_mass(g).isfinite().all()
            assert rows.most_likely(g).shape == (num_rows,)


def test_a_given_cost_has_the_same_passes():
    features, codebook = points(300, 40, 4)
    cost = torch.cdist(features, codebook)
    answers = []
    for source in (GivenDistances(cost), Distances(Points(features, codebook))):
        with make_rows(source) as rows:
            mean = rows.statistics().mean
            rows.set_scale(torch.tensor(10.0))
            answers.append((mean, rows.log_column_sums(), rows.log_mass(torch.arange(40, dtype=torch.float64))))
    for given, computed in zip(*answers):
        torch.testing.assert_close(given, computed, rtol=1e-5, atol=1e-4)


class DenseRows:
    """The five passes on a float64 matrix: all that the rounds need."""

    def __init__(self, cost):
        self.cost, self.log_num_rows = cost, torch.tensor(float(len(cost)), dtype=torch.float64).log()

    def set_scale(self, scale):
        self.scores = -scale * self.cost

    def log_column_sums(self):
        return self.scores.logsumexp(0)

    def log_mass(self, g):
        return (self.scores + g).log_softmax(1).logsumexp(0)


@pytest.mark.parametrize("iterations", [0, 1, 5])
@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_the_rounds_need_no_more_than_the_passes(iterations, balance):
    features, codebook = points(300, 40, 4, torch.float64)
    cost = torch.cdist(features, codebook)
    arguments = {"epsilon": 10.0, "iterations": iterations, "normalization": "none", "balance": balance}
    rows = DenseRows(cost)
    rows.set_scale(10.0)
    log_target = torch.full((40,), -math.log(40), dtype=torch.float64)
    g, _, rounds = _iterate(rows, log_target, iterations, balance)
    torch.testing.assert_close(rows.scores + g, exact_iteration(cost, **arguments))
    torch.testing.assert_close(g, sinkhorn_assign(features, codebook, **arguments).potentials)
    assert rounds == iterations


# ---- the functions ---------------------------------------------------------------------------------------------------


def test_exponentiate():
    generator = torch.Generator().manual_seed(0)
    block, offsets = torch.rand(30, 20, generator=generator), torch.rand(30, generator=generator)
    expected = torch.exp(-7.0 * (block - offsets[:, None]))
    torch.testing.assert_close(exponentiate_(block.clone(), torch.tensor(7.0), offsets), expected, rtol=1e-5, atol=0)
    smallest = exponentiate_(torch.full((1, 1), 1e4), torch.tensor(7.0), torch.zeros(1))
    assert smallest.item() == 2.0**-115


@pytest.mark.parametrize("num_rows", [1, 2, 7, 100])
def test_weighted_column_sums(num_rows):
    generator = torch.Generator().manual_seed(0)
    block, weights = torch.rand(num_rows, 33, generator=generator), torch.rand(num_rows, generator=generator)
    torch.testing.assert_close(weighted_column_sums(block, weights), weights @ block)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_block_moments(offset):
    block = torch.randn(100, 40, generator=torch.Generator().manual_seed(0)) + offset
    count, mean, deviations = block_moments(block, torch.empty_like(block))
    variance, exact_mean = torch.var_mean(block.double(), correction=0)
    assert count == block.numel()
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(deviations.double() / block.numel(), variance, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 100])
def test_median(dtype, num_rows):
    block = torch.randn(num_rows, 33, generator=torch.Generator().manual_seed(0), dtype=dtype).exp()
    assert median(lambda: iter(block.split(13)), block) == block.median()
    assert median(lambda: iter(()), block) == 0


@pytest.mark.parametrize("change", ["none", "far row", "row on a code"])
def test_the_robust_spread_is_not_moved_by_one_feature(change):
    features, codebook = points(2048, 64, 8)
    features, codebook = 1e4 * features, codebook
    if change == "far row":
        features[3] = 1e9
    elif change == "row on a code":
        features[3] = codebook[5]
    cost = exact(features, codebook)
    expected = (cost - cost.median()).abs().median()
    torch.testing.assert_close(
        median_deviation(Distances(Points(features, codebook))).double(), expected, rtol=1e-3, atol=0
    )
    assert math.isfinite(expected)
