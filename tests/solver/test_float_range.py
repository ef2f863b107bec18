"""Epsilon and scales near the ends of the range of floats: the right answer, or one line that says what is out of range."""

import math
import re

import pytest
import torch

from grids import slow
from optvq_hf.sinkhorn import (
    nearest_assign,
    plan_rows,
    potentials_assign,
    sample_assign,
    sinkhorn_assign,
    sinkhorn_plan,
)
from reference import points


ENDS = [5e-324, 1e-300, 1e-40, 1e-30, 1e-20, 1e20, 1e30, 1e38, 1e39, 1e300]
REFUSED = (
    "is too small or too large: distances are multiplied by|potentials.* too large|NaN or inf in potentials of epsilon"
)
TIE = 5.1e-4


def exact_scores(features, codebook, scale):
    return -float(scale) * (features.double()[:, None] - codebook.double()).norm(dim=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalization", ["zscore", "none", "robust", slow("sqrt_dim")])
@pytest.mark.parametrize("magnitude", [1.0, 1e-22, slow(1e8)])
@pytest.mark.parametrize("epsilon", ENDS)
@pytest.mark.parametrize("start", [None, 500.0])
def test_epsilon(epsilon, magnitude, normalization, dtype, start):
    features, codebook = (magnitude * x for x in points(200, 50, 4, dtype))
    start = None if start is None else torch.linspace(-start, start, 50)
    for balance in (0.0, 0.5, 1.0):
        arguments = {"epsilon": epsilon, "iterations": 5, "normalization": normalization, "balance": balance}
        try:
            result = sinkhorn_assign(features, codebook, potentials=start, **arguments)
        except ValueError as error:
            assert re.search(REFUSED, str(error)) and "\n" not in str(error)
            assert epsilon < 1e-36 or epsilon >= 1e20
            continue
        assert result.potentials.isfinite().all() and result.marginal_error.isfinite() and result.scale > 0
        scores = exact_scores(features, codebook, result.scale) + result.potentials.double()
        assert (scores.amax(1) - scores.gather(1, result.codes[:, None]).squeeze(1) <= TIE).all()
        if balance == 0 and start is None:
            assert torch.equal(result.codes, nearest_assign(features, codebook))
        if (
            balance == 1 and result.scale * magnitude * 20 > 1e3 and start is None
        ):  # transport, not what underflow left of it
            assert result.codes.bincount(minlength=50).max() <= 20


def test_the_transport_of_features_whose_squares_underflow():
    """At an epsilon that makes their distances matter, they are those of the same features at a usual size."""
    features, codebook = points(200, 50, 4)
    arguments = {"iterations": 5, "normalization": "none"}
    usual = sinkhorn_assign(features, codebook, epsilon=10.0, **arguments)
    tiny = sinkhorn_assign(features * 2.0**-80, codebook * 2.0**-80, epsilon=10.0 * 2.0**80, **arguments)
    torch.testing.assert_close(tiny.potentials - tiny.potentials.mean(), usual.potentials - usual.potentials.mean())
    assert (tiny.codes == usual.codes).float().mean() >= 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, *ENDS, 1e-37, 1e100])
def test_stored_scales(scale, dtype):
    features, codebook = points(200, 50, 4, dtype)
    potentials = torch.linspace(-1, 1, 50)
    functions = (potentials_assign, sample_assign, plan_rows)
    if scale and not 1e-115 < scale < 1e115:
        for function in functions:
            with pytest.raises(ValueError, match="scale is too small or too large"):
                function(features, codebook, potentials, scale)
        return
    codes, drawn, plan = (function(features, codebook, potentials, scale) for function in functions)
    scores = exact_scores(features, codebook, scale) + potentials.double()
    assert torch.equal(codes, scores.argmax(1))
    assert plan.isfinite().all() and (drawn >= 0).all() and (drawn < 50).all()
    torch.testing.assert_close(plan.double(), scores.softmax(1), rtol=1e-5, atol=1e-7)
    if scale > 1e10:
        assert torch.equal(drawn, codes)


def test_a_stored_scale_of_0_and_equal_potentials_are_a_tie():
    features, codebook = points(20, 5, 4)
    assert (potentials_assign(features, codebook, torch.zeros(5), 0.0) == 0).all()


@pytest.mark.parametrize("normalization", ["zscore", "none"])
@pytest.mark.parametrize("epsilon", ENDS)
def test_plans(epsilon, normalization):
    cost = torch.rand(60, 5, generator=torch.Generator().manual_seed(0))
    try:
        plan = sinkhorn_plan(cost, epsilon=epsilon, iterations=5, normalization=normalization)
    except ValueError as error:
        assert "epsilon" in str(error) and (epsilon < 1e-115 or epsilon > 1e18)
        return
    torch.testing.assert_close(plan.sum(1), torch.ones(60))
    if epsilon < 1e-10:
        torch.testing.assert_close(plan, torch.full_like(plan, 1 / 5))
    else:
        assert plan.sum(0).max() <= 60 / 5 * 2


@pytest.mark.parametrize("potentials", [torch.full((50,), 30.0).half(), torch.full((50,), 1e30, dtype=torch.float64)])
def test_potentials_of_other_dtypes(potentials):
    """float16 holds them; what float32 cannot square is refused."""
    features, codebook = points(200, 50, 4)
    if potentials.dtype == torch.float16:
        assert torch.equal(potentials_assign(features, codebook, potentials, 1.0), nearest_assign(features, codebook))
        return
    with pytest.raises(ValueError, match="potentials are too large for torch.float32: up to 1.0e\\+30"):
        potentials_assign(features, codebook, potentials, 1.0)
    assert math.isfinite(plan_rows(features.double(), codebook, potentials, 1.0).sum())


@pytest.mark.parametrize("num_codes", [20, 4096])
@pytest.mark.parametrize("epsilon", [1e12, 1e16, 1e20])
def test_returned_potentials_are_taken_again(num_codes, epsilon):
    """By every function that takes potentials, however many codes there are."""
    torch.manual_seed(0)
    z, c = torch.randn(60, 3) * 1e4, torch.randn(num_codes, 3) * 1e4
    settings = {"epsilon": epsilon, "iterations": 3, "normalization": "none"}
    solved = sinkhorn_assign(z, c, **settings)
    for take in (potentials_assign, sample_assign, plan_rows):
        take(z, c, solved.potentials, solved.scale)
    again = sinkhorn_assign(z, c, potentials=solved.potentials, **settings)
    assert again.potentials.isfinite().all() and again.codes.max() < num_codes
