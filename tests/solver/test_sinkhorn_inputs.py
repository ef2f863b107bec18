import math

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
from reference import PAPER, exact_iteration, margins, points


# ---- hard cases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["zscore", "sqrt_dim", "none"])
@pytest.mark.parametrize(
    "case",
    [
        "no rows",
        "one code",
        "one by one",
        "fewer rows than codes",
        "duplicates",
        "constant cost",
        "outlier code",
        "outlier row",
        "tiny",
        "far",
    ],
)
def test_hard_cases_are_finite_and_valid(case, normalization):
    features, codebook = points(64, 32, 4)
    if case == "no rows":
        features = features[:0]
    elif case == "one code":
        codebook = codebook[:1]
    elif case == "one by one":
        features, codebook = features[:1], codebook[:1]
    elif case == "fewer rows than codes":
        features = features[:5]
    elif case == "duplicates":
        features[1:8], codebook[1:8] = features[0].clone(), codebook[0].clone()
    elif case == "constant cost":
        features, codebook = torch.zeros_like(features), torch.eye(4)
    elif case == "outlier code":
        codebook[3] = 1e4
    elif case == "outlier row":
        features[3] = 1e4
    elif case == "tiny":
        features, codebook = features * 1e-4, codebook * 1e-4
    elif case == "far":
        features, codebook = features + 1e4, codebook + 1e4
    for epsilon in (1.0, 10.0, 300.0):
        arguments = {"epsilon": epsilon, "iterations": 5, "normalization": normalization}
        result = sinkhorn_assign(features, codebook, **arguments)
        assert result.codes.shape == (len(features),)
        assert ((result.codes >= 0) & (result.codes < len(codebook))).all()
        assert result.potentials.isfinite().all() and result.scale.isfinite() and result.marginal_error.isfinite()
        if case in ("no rows", "one by one", "one code", "constant cost"):
            continue
        cost = torch.cdist(features.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
        log_plan = exact_iteration(cost, dim=4, **arguments)
        # float32 resolves scores of this size; rows closer to a tie than that are skipped.
        resolution = 1e-2 + 1e-5 * (epsilon * cost / cost.std() if normalization == "zscore" else epsilon * cost).max()
        decided = margins(log_plan) > resolution
        assert (result.codes == log_plan.argmax(1))[decided].float().mean() > 0.98 or not decided.any()


@pytest.mark.parametrize(
    ("num_rows", "num_codes", "dim"), [slow(16384, 1024, 2), (70000, 64, 1), (4097, 33, 3), (7, 5, 2)]
)
@pytest.mark.parametrize("value", [0.1, slow(1.7), slow(7.7), 123.4])
def test_equal_distances_at_any_size(num_rows, num_codes, dim, value):
    """Rounding must not make their variance negative."""
    features, codebook = torch.full((num_rows, dim), value), torch.zeros(num_codes, dim)
    result = sinkhorn_assign(features, codebook, **PAPER)
    assert result.scale.isfinite() and result.potentials.isfinite().all() and result.marginal_error.isfinite()
    assert (result.codes == 0).all()


@pytest.mark.parametrize("spread", [1.0, 1e3])
def test_the_scale_keeps_its_digits(spread):
    features, codebook = points(32768, 256, 8)
    features[::8] *= spread
    scale = sinkhorn_assign(features, codebook, **{**PAPER, "iterations": 0}).scale
    cost = torch.cdist(features.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(scale.double(), 10 / (cost.std() + 1e-6), rtol=1e-6, atol=0)


def test_scores_of_any_size():
    """Scores of 1e10 and more, of which float32 holds but the first digits."""
    cost = torch.rand(200, 20, generator=torch.Generator().manual_seed(0)) * 1e7
    cost[:5] += 1e8
    plan = sinkhorn_plan(cost, epsilon=100.0, iterations=5, normalization="none")
    torch.testing.assert_close(plan.sum(1), torch.ones(200))
    features, codebook = points(600, 64, 8)
    settings = {"epsilon": 3e3, "iterations": 5, "normalization": "none"}
    result = sinkhorn_assign(1e6 * features, 1e6 * codebook, **settings)
    assert result.potentials.isfinite().all() and len(result.codes.unique()) > 50


def test_a_codebook_that_repeats_one_row():
    """Expanded, without memory of its own."""
    for seed in range(200):
        features, code = points(5, 1, 3, seed=seed)
        for codebook in (code.expand(4, 3), code.expand(300, 3)):
            assert (nearest_assign(features, codebook) == 0).all()
            assert (sinkhorn_assign(features, codebook, **PAPER).codes == 0).all()


@pytest.mark.parametrize("value", [1e19, 1e30])
def test_values_whose_distances_overflow_are_refused(value):
    features, codebook = points(16, 8, 4)
    features[3] = value
    for call in (lambda: sinkhorn_assign(features, codebook, **PAPER), lambda: nearest_assign(features, codebook)):
        with pytest.raises(ValueError, match="features are too large for torch.float32: up to 1.0e"):
            call()
    assert sinkhorn_assign(features.double(), codebook.double(), **PAPER).potentials.isfinite().all()
    with pytest.raises(ValueError, match="too large"):
        sinkhorn_plan(torch.rand(4, 4) * 1e30, **PAPER)


def test_a_tie_goes_to_the_nearest_code():
    """One feature must give an equal share to every code: its row is a tie, which rounding must not decide."""
    for seed in range(50):
        features, codebook = points(1, 64, 8, seed=seed)
        assert torch.equal(sinkhorn_assign(features, codebook, **PAPER).codes, nearest_assign(features, codebook))


def test_a_far_code_is_pulled_in():
    features, codebook = points(256, 16, 4)
    codebook[3] = 50.0
    result = sinkhorn_assign(features, codebook, epsilon=30.0, iterations=30, normalization="sqrt_dim")
    plan = plan_rows(features, codebook, result.potentials, result.scale)
    torch.testing.assert_close(plan.mean(0)[3].item(), 1 / 16, rtol=0.05, atol=0)


# ---- row-by-row assignments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [slow(1), 7, 64])
def test_row_by_row_assignments_do_not_depend_on_the_batch(rows):
    features, codebook = points(4096, 1024, 2)
    solution = sinkhorn_assign(features, codebook, **PAPER)
    for assign in (
        lambda z: nearest_assign(z, codebook),
        lambda z: potentials_assign(z, codebook, solution.potentials, solution.scale),
    ):
        together = assign(features)
        assert torch.equal(torch.cat([assign(part) for part in features.split(rows)]), together)


def test_potentials_assign_repeats_the_solver():
    features, codebook = points(1000, 100, 8)
    solution = sinkhorn_assign(features, codebook, **PAPER)
    codes = potentials_assign(features, codebook, solution.potentials, solution.scale)
    assert (codes == solution.codes).float().mean() > 0.999
    assert torch.equal(potentials_assign(features, codebook, torch.zeros(100), 1.0), nearest_assign(features, codebook))


def test_sample_assign_draws_from_the_plan():
    torch.manual_seed(0)
    features, codebook = points(8, 6, 3)
    solution = sinkhorn_assign(features, codebook, **{**PAPER, "epsilon": 2.0})
    plan = plan_rows(features, codebook, solution.potentials, solution.scale)
    draws = sample_assign(features.repeat_interleave(4000, 0), codebook, solution.potentials, solution.scale).view(
        8, 4000
    )
    frequencies = torch.stack([row.bincount(minlength=6) for row in draws]) / 4000
    torch.testing.assert_close(frequencies, plan, rtol=0, atol=5 * math.sqrt(0.25 / 4000))


# ---- dtypes and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    features, codebook = points(100, 20, 4)
    features, codebook = features.to(dtype), codebook.to(dtype)
    result = sinkhorn_assign(features, codebook, **PAPER)
    assert result.potentials.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = sinkhorn_assign(features.double(), codebook.double(), **PAPER)  # of the same, rounded numbers
    assert (result.codes == exact.codes).float().mean() >= 0.99


def test_autocast_changes_nothing():
    features, codebook = points(300, 40, 16)
    reference = sinkhorn_assign(features, codebook, **PAPER)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = sinkhorn_assign(features, codebook, **PAPER)
        nearest = nearest_assign(features, codebook)
    assert torch.equal(result.codes, reference.codes) and torch.equal(result.potentials, reference.potentials)
    assert torch.equal(nearest, nearest_assign(features, codebook))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(3)}, r"features must be \(N, d\)"),
        ({"features": torch.zeros(3, 5)}, r"same d.*\(3, 5\)"),
        ({"codebook": torch.zeros(0, 4)}, "at least one code"),
        ({"features": torch.zeros(3, 4, dtype=torch.int64)}, "floating point.*int64"),
        ({"features": torch.tensor([[math.nan] * 4])}, "NaN or inf in features"),
        ({"codebook": torch.tensor([[math.inf] * 4])}, "NaN or inf in codebook"),
        ({"epsilon": 0.0}, "epsilon.*0.0"),
        ({"epsilon": math.inf}, "epsilon.*inf"),
        ({"iterations": -1}, "iterations.*-1"),
        ({"iterations": math.inf}, "iterations.*inf"),
        ({"tolerance": -1.0}, "tolerance.*-1.0"),
        ({"normalization": "all"}, "normalization.*'all'"),
        ({"balance": 1.5}, "balance.*1.5"),
        ({"target_marginals": torch.ones(3)}, r"target_marginals.*\(8,\).*\(3,\)"),
        ({"target_marginals": torch.zeros(8)}, "target_marginals must be finite and greater than 0"),
        ({"potentials": torch.zeros(3)}, r"potentials.*\(8,\).*\(3,\)"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"features": torch.randn(6, 4), "codebook": torch.randn(8, 4), **PAPER, **change}
    with pytest.raises(ValueError, match=message):
        sinkhorn_assign(arguments.pop("features"), arguments.pop("codebook"), **arguments)


def test_wrong_costs():
    with pytest.raises(ValueError, match="needs dim"):
        sinkhorn_plan(torch.zeros(2, 2), epsilon=1.0, iterations=1, normalization="sqrt_dim")
    with pytest.raises(ValueError, match="NaN or inf in cost"):
        sinkhorn_plan(torch.tensor([[math.inf]]), **PAPER)
    with pytest.raises(ValueError, match="float matrix"):
        sinkhorn_plan(torch.zeros(2), **PAPER)
