import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grids import slow
from optvq_hf import distances
from optvq_hf.sinkhorn import (
    nearest_assign,
    plan_rows,
    sinkhorn_assign,
    sinkhorn_plan,
)
from reference import PAPER, exact_iteration, margins, points


# ---- values ----------------------------------------------------------------------------------------------------------


def test_two_by_two_traced_by_hand():
    """Costs [[0, 1], [0, 1]], epsilon 1: both features prefer code 0. Round 1 gives both codes equal mass, for good."""
    cost = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    plan = sinkhorn_plan(cost, epsilon=1.0, iterations=1, normalization="none")
    torch.testing.assert_close(plan, torch.full((2, 2), 0.5))

    # Costs [[0, 1], [1, 0]]: columns of exp(-D) sum to 1 + e^-1, so both potentials are equal and row 0 is softmax(0, -1).
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    plan = sinkhorn_plan(cost, epsilon=1.0, iterations=3, normalization="none")
    p = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(plan, torch.tensor([[p, 1 - p], [1 - p, p]]))


@pytest.mark.parametrize("normalization", ["zscore", "sqrt_dim", "none"])
@pytest.mark.parametrize("epsilon", [slow(1.0), 10.0, 100.0])
@pytest.mark.parametrize("iterations", [1, slow(2), 5, slow(6), slow(20)])
def test_codes_and_plan_equal_the_dense_float64_iteration(normalization, epsilon, iterations):
    features, codebook = points(600, 128, 8)
    cost = torch.cdist(features.double(), codebook.double())
    arguments = {"epsilon": epsilon, "iterations": iterations, "normalization": normalization}
    log_plan = exact_iteration(cost, dim=8, **arguments)

    codes = sinkhorn_assign(features, codebook, **arguments).codes
    decided = margins(log_plan) > 1e-2
    assert decided.float().mean() > 0.9
    assert (codes == log_plan.argmax(1))[decided].all()
    plan = sinkhorn_plan(cost, dim=8, **arguments)
    torch.testing.assert_close(plan, log_plan.softmax(1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("normalization", ["zscore", "sqrt_dim", "none"])
@pytest.mark.parametrize("case", ["both", "far code", "features alone", "features moved"])
@pytest.mark.parametrize("scale", [1e-4, slow(1e-2), 1.0, slow(1e2), 1e4])
def test_float32_decides_as_float64_at_every_scale(normalization, case, scale):
    features, codebook = points(1024, 256, 8)
    features = features + scale if case == "features moved" else scale * features
    if case in ("both", "far code"):
        codebook = scale * codebook
    if case == "far code":
        codebook[3] = 1e4 * scale
    cost = torch.cdist(features.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    for epsilon in (1.0, 10.0, 30.0, 100.0, 300.0):
        arguments = {"epsilon": epsilon, "iterations": 5, "normalization": normalization}
        log_plan = exact_iteration(cost, dim=8, **arguments)
        result = sinkhorn_assign(features, codebook, **arguments)
        decided = margins(log_plan) > 1e-3
        if normalization == "zscore" and case == "both":
            assert decided.float().mean() > 0.9
        assert (result.codes != log_plan.argmax(1))[decided].sum() <= 0.001 * decided.sum()
        assert result.potentials.isfinite().all() and result.marginal_error.isfinite()


@pytest.mark.parametrize("epsilon", [10.0, 300.0])
@pytest.mark.parametrize("balance", [0.3, 1.0])
@pytest.mark.parametrize("iterations", [0, 1, 3, 8])
def test_any_potentials_can_start(epsilon, balance, iterations):
    """Also potentials by which most codes have no mass that float32 could hold."""
    features, codebook = points(400, 64, 4)
    cost = torch.cdist(features.double(), codebook.double())
    start = 500 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    arguments = {"epsilon": epsilon, "iterations": iterations, "normalization": "zscore", "balance": balance}
    log_plan = exact_iteration(cost, potentials=start, **arguments)
    result = sinkhorn_assign(features, codebook, potentials=start, **arguments)
    decided = margins(log_plan) > 1e-2
    assert (result.codes == log_plan.argmax(1))[decided].float().mean() > 0.99
    exact = (log_plan + epsilon / (cost.std() + 1e-6) * cost)[0]  # the potentials
    torch.testing.assert_close(result.potentials.double(), exact, rtol=1e-4, atol=2e-2)


@pytest.mark.parametrize("epsilon", [slow(1.0), 10.0, 1000.0])
@pytest.mark.parametrize("constant", [slow(0.0), 1e3, -1e3])
@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.float64)])
def test_a_constant_in_the_start_changes_nothing(epsilon, constant, dtype):
    """In 64 dimensions scores are in the hundreds, and potentials too."""
    features, codebook = points(500, 128, 64, dtype)
    arguments = {"epsilon": epsilon, "normalization": "zscore"}
    for start in (torch.zeros(128), sinkhorn_assign(features, codebook, iterations=3, **arguments).potentials):
        for iterations in (0, 2):
            expected = exact_iteration(
                torch.cdist(features.double(), codebook.double()), potentials=start, iterations=iterations, **arguments
            )
            result = sinkhorn_assign(
                features, codebook, potentials=start + constant, iterations=iterations, **arguments
            )
            decided = margins(expected) > 1e-2
            assert (result.codes == expected.argmax(1))[decided].all() and 0 <= result.marginal_error <= 2
            assert result.potentials.isfinite().all()


def test_rows_sum_to_one_whatever_the_balance():
    """One code takes all: the error is zero, with a start, far away, and at any strength."""
    for num_codes, distance, balance in ((1, 0, 0.3), (1, 1e3, 1.0), (1, 1e3, 0.3), (3, 0, 0.0), (3, 0, 0.3)):
        features, codebook = points(300, 1, 8)[0] * 0, torch.full((num_codes, 8), float(distance))
        for start in (None, 100 * torch.randn(num_codes)):
            result = sinkhorn_assign(features, codebook, potentials=start, balance=balance, **PAPER)
            assert result.marginal_error <= 2 + 1e-5
            assert num_codes > 1 or result.marginal_error < 1e-5


@pytest.mark.parametrize("skew", [1e-12, slow(1e-6), slow(1e9), 1e12])
@pytest.mark.parametrize("iterations", [1, slow(3), 5, slow(7)])
def test_skewed_targets(skew, iterations):
    features, codebook = points(300, 7, 8)
    target = torch.ones(7, dtype=torch.float64)
    target[2] = skew
    arguments = {"epsilon": 300.0, "iterations": iterations, "normalization": "zscore"}
    log_plan = exact_iteration(torch.cdist(features.double(), codebook.double()), target_marginals=target, **arguments)
    codes = sinkhorn_assign(features, codebook, target_marginals=target, **arguments).codes
    assert (codes == log_plan.argmax(1))[margins(log_plan) > 1e-2].all()
    large = torch.full((7,), 1e4, dtype=torch.float16)  # their sum is beyond float16
    assert sinkhorn_assign(features, codebook, target_marginals=large, **arguments).potentials.isfinite().all()


@pytest.mark.parametrize("normalization", ["zscore", "robust", "sqrt_dim", "none"])
def test_target_marginals(normalization):
    features, codebook = points(600, 20, 4, torch.float64)
    target = torch.linspace(1, 9, 20)
    arguments = {"epsilon": 10.0, "iterations": 300, "normalization": normalization}
    result = sinkhorn_assign(features, codebook, target_marginals=target, **arguments)
    shares = plan_rows(features, codebook, result.potentials, result.scale).mean(0)
    torch.testing.assert_close(shares, target.double() / target.sum(), rtol=0, atol=1e-6)
    if normalization != "robust":
        cost = torch.cdist(features, codebook)
        log_plan = exact_iteration(cost, dim=4, target_marginals=target, **arguments)
        assert (result.codes == log_plan.argmax(1))[margins(log_plan) > 1e-6].all()


def test_robust_normalization():
    """It is the standard deviation of normal distances, and no outlier changes it."""
    features, codebook = points(2048, 256, 8)
    spread = {n: PAPER["epsilon"] / solve.scale for n, solve in _solve_both(features, codebook).items()}
    deviation = torch.cdist(features, codebook[::4])
    deviation = (deviation - deviation.median()).abs().median() / 0.6745
    torch.testing.assert_close(spread["robust"], deviation, rtol=5e-3, atol=0)
    torch.testing.assert_close(spread["robust"], spread["zscore"], rtol=0.05, atol=0)

    features[:8] *= 100
    solutions = _solve_both(features, codebook)
    torch.testing.assert_close(PAPER["epsilon"] / solutions["robust"].scale, spread["robust"], rtol=0.01, atol=0)
    used = {name: len(solution.codes.unique()) for name, solution in solutions.items()}
    assert used["robust"] == 256 > used["zscore"]
    plan = sinkhorn_plan(torch.cdist(features, codebook) - 3, **{**PAPER, "normalization": "robust"})
    torch.testing.assert_close(plan.argmax(1), solutions["robust"].codes)


def test_robust_normalization_of_distances_that_hardly_differ():
    """Far features, and a collapsed codebook: what counts is the spread, not the size."""
    features, codebook = points(2048, 256, 8)
    for far, near in (
        (features + 1000, codebook),
        (5 * features / features.norm(dim=1, keepdim=True), 1e-3 * codebook),
    ):
        spread = PAPER["epsilon"] / _solve_both(far, near)["robust"].scale
        deviation = torch.cdist(far.double(), near[::4].double(), compute_mode="donot_use_mm_for_euclid_dist")
        deviation = (deviation - deviation.median()).abs().median() / 0.6745
        torch.testing.assert_close(spread.double(), deviation, rtol=0.02, atol=2e-6)
    assert (
        sinkhorn_plan(torch.tensor([[0.0, 1.0], [-0.0, 2.0]]), **{**PAPER, "normalization": "robust"}).isfinite().all()
    )


def test_a_constant_in_the_cost_changes_nothing():
    cost = torch.randint(64, (200, 40), generator=torch.Generator().manual_seed(0)) / 64
    plans = [sinkhorn_plan(cost + constant, epsilon=100.0, iterations=5, normalization="none") for constant in (0, 1e4)]
    torch.testing.assert_close(*plans)


def _solve_both(features, codebook):
    return {n: sinkhorn_assign(features, codebook, **{**PAPER, "normalization": n}) for n in ("zscore", "robust")}


def test_agrees_with_pot():
    """Python Optimal Transport's log-domain solver, run to convergence, as an independent oracle."""
    ot = pytest.importorskip("ot")
    features, codebook = points(96, 32, 4, torch.float64)
    cost = torch.cdist(features, codebook)
    uniform = [torch.full((n,), 1 / n, dtype=torch.float64) for n in cost.shape]
    theirs = ot.bregman.sinkhorn_log(*uniform, cost, reg=1 / 8.0, numItermax=5000, stopThr=1e-12)
    ours = sinkhorn_plan(cost, epsilon=8.0, iterations=2000, normalization="none") / len(cost)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_transport_cost_tends_to_the_unregularised_optimum():
    ot = pytest.importorskip("ot")
    features, codebook = points(64, 16, 3, torch.float64)
    cost = torch.cdist(features, codebook)
    uniform = [torch.full((n,), 1 / n, dtype=torch.float64) for n in cost.shape]
    best = ot.emd2(*uniform, cost)
    gaps = [
        ((sinkhorn_plan(cost, epsilon=e, iterations=3000, normalization="none") / 64 * cost).sum() - best).item()
        for e in (1, 10, 100)
    ]
    assert gaps[0] > gaps[1] > gaps[2] > -1e-3
    assert gaps[2] < 0.01 * best


def test_without_any_round_codes_are_the_nearest():
    features, codebook = points(500, 50, 4)
    result = sinkhorn_assign(features, codebook, **{**PAPER, "iterations": 0})
    assert torch.equal(result.codes, nearest_assign(features, codebook))
    assert result.iterations == 0 and 0 < result.marginal_error < 2


def test_every_code_is_used_where_nearest_neighbour_collapses():
    features, codebook = points(4096, 512, 8)
    far = codebook + 5  # a codebook away from the data: the start of a collapse
    assert len(nearest_assign(features, far).unique()) < 150
    assert len(sinkhorn_assign(features, far, **{**PAPER, "epsilon": 100.0}).codes.unique()) > 500


# ---- invariants ------------------------------------------------------------------------------------------------------

sizes = st.tuples(st.integers(2, 60), st.integers(1, 40), st.integers(1, 6))
scales = st.sampled_from([1e-4, 1e-2, 1.0, 1e2, 1e4])


@settings(max_examples=40, deadline=None)
@given(size=sizes, scale=scales, seed=st.integers(0, 1000), iterations=st.integers(1, 8))
def test_always_finite_and_valid(size, scale, seed, iterations):
    features, codebook = (scale * x for x in points(*size, seed=seed))
    result = sinkhorn_assign(features, codebook, **{**PAPER, "iterations": iterations})
    assert result.codes.shape == (size[0],) and result.codes.dtype == torch.int64
    assert result.codes.min() >= 0 and result.codes.max() < size[1]
    assert result.potentials.isfinite().all() and result.scale.isfinite() and 0 <= result.marginal_error <= 2 + 1e-5
    plan = sinkhorn_plan(torch.cdist(features, codebook), **PAPER)
    torch.testing.assert_close(plan.sum(1), torch.ones(size[0]))


@settings(max_examples=25, deadline=None)
@given(size=sizes, seed=st.integers(0, 1000))
def test_permutations_and_rigid_motions(size, seed):
    """Reordering rows or codes reorders the result; moving, turning and scaling both sets together changes nothing."""
    features, codebook = points(*size, dtype=torch.float64, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(n, generator=generator) for n in size[:2])
    rotation = torch.linalg.qr(torch.randn(size[2], size[2], generator=generator, dtype=torch.float64)).Q
    arguments = {**PAPER, "epsilon": 5.0}
    reference = sinkhorn_assign(features, codebook, **arguments)
    log_plan = -reference.scale * torch.cdist(features, codebook) + reference.potentials
    decided = margins(log_plan) > 1e-6 if size[1] > 1 else torch.ones(size[0], dtype=torch.bool)

    permuted = sinkhorn_assign(features[rows], codebook[columns], **arguments)
    assert (columns[permuted.codes] == reference.codes[rows])[decided[rows]].all()
    # 1e-6 in the normalisation is not scale invariant, so the scaling is kept moderate.
    moved = sinkhorn_assign(3 * features @ rotation + 7, 3 * codebook @ rotation + 7, **arguments)
    torch.testing.assert_close(moved.potentials, reference.potentials, rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), epsilon=st.sampled_from([1.0, 10.0, 50.0]))
def test_marginal_error_falls_with_rounds(seed, epsilon):
    features, codebook = points(200, 30, 4, torch.float64, seed)
    arguments = {"epsilon": epsilon, "normalization": "zscore"}
    errors = [sinkhorn_assign(features, codebook, iterations=i, **arguments).marginal_error for i in (2, 5, 10, 40)]
    assert all(later <= earlier + 1e-9 for earlier, later in zip(errors, errors[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_streamed_equals_cached_equals_one_block(monkeypatch, dtype):
    features, codebook = points(777, 50, 6, dtype)
    results = [sinkhorn_assign(features, codebook, **PAPER)]
    monkeypatch.setitem(distances.BLOCK_ELEMENTS, "cpu", 50 * 100)  # 8 blocks, the last one shorter
    monkeypatch.setattr(distances, "MIN_BLOCK_ROWS", 1)
    half = 390 * codebook.shape[0] * dtype.itemsize  # 3 blocks are kept
    results += [sinkhorn_assign(features, codebook, memory_budget=b, **PAPER) for b in (None, half, 0)]
    for result in results[1:]:
        assert torch.equal(result.codes, results[0].codes)
        torch.testing.assert_close(result.potentials, results[0].potentials)
        torch.testing.assert_close(result.scale, results[0].scale)


def test_calls_do_not_disturb_each_other():
    """Memory is kept from call to call: of other sizes, other types, and from other threads."""
    cases = [points(n, k, 8, dtype, n) for n, k, dtype in ((900, 64, torch.float32), (300, 16, torch.float64)) * 3]
    expected = [sinkhorn_assign(*case, **PAPER) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda case: sinkhorn_assign(*case, **PAPER), cases * 8))
    for result, other in zip(found, expected * 8):
        assert torch.equal(result.codes, other.codes) and torch.equal(result.potentials, other.potentials)


def test_after_inference_mode_and_under_another_default_device():
    features, codebook = points(300, 64, 8)
    with torch.inference_mode():
        expected = sinkhorn_assign(features, codebook, **PAPER).codes.clone()
    assert torch.equal(sinkhorn_assign(features, codebook, **PAPER).codes, expected)
    with torch.device("meta"):
        assert torch.equal(sinkhorn_assign(features, codebook, **PAPER).codes, expected)


def test_the_precision_of_other_matrix_products_does_not_matter():
    features, codebook = points(2000, 128, 16)
    expected = sinkhorn_assign(features, codebook, **PAPER), nearest_assign(features, codebook)
    backend = torch.backends.mkldnn.matmul
    before, backend.fp32_precision = backend.fp32_precision, "bf16"
    try:
        result, nearest = sinkhorn_assign(features, codebook, **PAPER), nearest_assign(features, codebook)
        assert backend.fp32_precision == "bf16"
    finally:
        backend.fp32_precision = before
    assert torch.equal(result.codes, expected[0].codes) and torch.equal(nearest, expected[1])


def test_strided_and_transposed_inputs_give_identical_results():
    features, codebook = points(64, 32, 8)
    reference = sinkhorn_assign(features, codebook, **PAPER)
    strided = sinkhorn_assign(features.repeat_interleave(2, 0)[::2], codebook.T.contiguous().T, **PAPER)
    assert torch.equal(strided.codes, reference.codes)


# ---- balance, warm start, tolerance ----------------------------------------------------------------------------------


def test_balance_goes_from_nearest_neighbour_to_balanced_transport():
    features, codebook = points(2000, 100, 4)
    codebook = codebook * 2  # wider than the data: some codes are nearest to nothing
    codes = {rho: sinkhorn_assign(features, codebook, balance=rho, **PAPER).codes for rho in (0.0, 0.3, 1.0)}
    assert torch.equal(codes[0.0], nearest_assign(features, codebook))
    used = [len(c.unique()) for c in codes.values()]
    assert used[0] < used[1] < used[2]


def test_balance_enters_every_round():
    features, codebook = points(200, 20, 4, torch.float64)
    cost = torch.cdist(features, codebook)
    log_plan = exact_iteration(cost, balance=0.5, **PAPER)
    result = sinkhorn_assign(features, codebook, balance=0.5, **PAPER)
    torch.testing.assert_close(
        (-result.scale * cost + result.potentials).softmax(1), log_plan.softmax(1), rtol=1e-5, atol=1e-8
    )


def test_warm_start_continues_where_the_potentials_stand():
    features, codebook = points(500, 40, 4, torch.float64)
    whole = sinkhorn_assign(features, codebook, **{**PAPER, "iterations": 7})
    first = sinkhorn_assign(features, codebook, **{**PAPER, "iterations": 4})
    rest = sinkhorn_assign(features, codebook, potentials=first.potentials + 3.0, **{**PAPER, "iterations": 3})
    torch.testing.assert_close(rest.potentials - 3.0, whole.potentials)
    assert rest.iterations == 3
    warm = sinkhorn_assign(features, codebook, potentials=whole.potentials, **{**PAPER, "iterations": 1})
    eighth = sinkhorn_assign(features, codebook, **{**PAPER, "iterations": 8})
    torch.testing.assert_close(warm.marginal_error, eighth.marginal_error)


def test_tolerance_stops_early_and_reports_rounds():
    features, codebook = points(500, 40, 4)
    result = sinkhorn_assign(features, codebook, tolerance=0.05, **{**PAPER, "iterations": 500})
    assert 1 < result.iterations < 500 and result.marginal_error < 0.05
    log_plan = -result.scale * torch.cdist(features, codebook) + result.potentials
    error = (log_plan.softmax(1).mean(0) - 1 / 40).abs().sum()
    torch.testing.assert_close(error, result.marginal_error, rtol=1e-2, atol=1e-5)
