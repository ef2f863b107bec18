"""The five row passes in Triton beside those in torch and in float64, and codes of both solvers.

Kernels run in Triton's interpreter, in a process of its own: it has to be chosen before anything imports triton. With
OPTVQ_DEVICE=cuda they are compiled, and run on a GPU.
"""

import os
import subprocess
import sys
import warnings
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from grids import slow
from optvq_hf import solver_choice
from optvq_hf.costs import Points
from optvq_hf.distances import Distances
from optvq_hf.sinkhorn import nearest_assign, potentials_assign, sinkhorn_assign
from optvq_hf.sinkhorn_rows import BlockedRows
from reference import PAPER, margins, points


DEVICE = os.environ.get("OPTVQ_DEVICE", "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="in the process of the interpreter")


@pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="kernels run here")
def test_in_the_interpreter(request):
    """All the others, of the same marks."""
    pytest.importorskip("triton")
    marks = request.config.getoption("markexpr")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", marks, __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, env=environment, cwd=request.config.rootpath, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def on_device(num_rows, num_codes, dim, seed=0):
    return tuple(x.to(DEVICE) for x in points(num_rows, num_codes, dim, seed=seed))


def distances_of(features, codebook):
    return (features.double()[:, None] - codebook.double()).norm(dim=2)


def fused(distances, **arguments):
    from optvq_hf.sinkhorn_fused import FusedRows

    return FusedRows(distances, **arguments)


def changed(features, codebook, change):
    """Inputs at which float32 has few digits left, or sizes of numbers."""
    if change == "coinciding codes":
        codebook[1::3] = codebook[::3][: len(codebook[1::3])]
    elif change == "on a code":
        features[3 % len(features)] = codebook[len(codebook) // 2]
    elif change == "far away":
        features, codebook = features * 1e-2 + 1e3, codebook * 1e-2 + 1e3
    elif change != "none":
        features, codebook = float(change) * features, float(change) * codebook
    return features, codebook


def as_parameters(values):
    return values if hasattr(values, "marks") else pytest.param(*values)


# ---- the passes ------------------------------------------------------------------------------------------------------

SHAPES = [
    (777, 50, 8),
    (300, 130, 1),
    (300, 130, 16),
    (300, 130, 64),
    *(slow(n, k, d) for n, k, d in ((777, 50, 2), (65, 700, 3), (1025, 513, 8), (300, 130, 17), (300, 130, 100))),
    *(slow(n, k, d) for n, k, d in ((129, 65, 256), (257, 33, 768))),
]
CHANGES = ("coinciding codes", "on a code", "far away", "1e-4", "1e4")


@runs_kernels
@pytest.mark.parametrize(
    ("num_rows", "num_codes", "dim", "change"),
    [
        *(pytest.param(*shape.values, "none", marks=shape.marks) for shape in map(as_parameters, SHAPES)),
        *(slow(300, 130, dim, change) for change in CHANGES for dim in (8, 40)),
    ],
)
@pytest.mark.parametrize("epsilon", [10.0, slow(300.0)])
def test_passes_equal_the_dense_formulas(num_rows, num_codes, dim, change, epsilon):
    features, codebook = changed(*on_device(num_rows, num_codes, dim), change)
    cost = distances_of(features, codebook)
    scale = (epsilon / cost.std()).float()
    scores = -scale.double() * cost
    # Scores are as exact as distances in float32 are: by differences, or by products.
    squares = features.double().square().sum(1).max() + codebook.double().square().sum(1).max()
    ulp = torch.finfo(torch.float32).eps
    from_products = (4 * ulp * squares / cost.clamp_min(1e-30)).clamp_max((4 * ulp * squares).sqrt())
    error = 1e-5 + scale.item() * ((4 * ulp * cost).max() if dim <= 16 else from_products.max()).item()
    with fused(Distances(Points(features, codebook))) as rows:
        statistics = rows.statistics()
        assert statistics.count == cost.numel() and rows.log_num_rows.exp().item() == pytest.approx(num_rows)
        torch.testing.assert_close(statistics.mean, cost.mean(), rtol=2e-6, atol=0)
        deviations = (cost - cost.mean()).square().sum()
        torch.testing.assert_close(statistics.squared_deviations, deviations, rtol=2e-5, atol=0)
        nearest = statistics.nearest.double()
        assert (nearest - cost.amin(0)).abs().max() <= error / scale

        rows.set_scale(scale)
        assert (rows.log_column_sums() - scores.logsumexp(0)).abs().max() <= error
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(num_codes, generator=generator, dtype=torch.float64).to(DEVICE)
        for g in (-scores.logsumexp(0), 3e3 + 10 * noise, 100 * noise):
            expected = (scores + g).log_softmax(1).logsumexp(0)
            rounding = error + 2 * ulp * g.abs().max().item()
            found = rows.log_mass(g)
            assert (found - expected)[expected > -700].abs().max() <= rounding
            assert torch.equal(found, rows.log_mass(g))
            codes = rows.most_likely(g)
            plan = scores + g
            chosen = plan.gather(1, codes[:, None]).squeeze(1)
            assert (plan.amax(1) - chosen <= 5.1e-4).all()
            is_clear = margins(plan) > 1e-2 if num_codes > 1 else torch.ones_like(codes, dtype=torch.bool)
            assert torch.equal(codes[is_clear], plan.argmax(1)[is_clear])


@runs_kernels
@pytest.mark.parametrize(
    ("num_rows", "num_codes", "dim"), [(0, 5, 3), (3, 1, 3), (0, 1, 40), (1, 1, 40), slow(1, 600, 3), slow(1, 600, 40)]
)
def test_no_rows_and_one_code(num_rows, num_codes, dim):
    features, codebook = on_device(num_rows, num_codes, dim)
    with fused(Distances(Points(features, codebook))) as rows:
        statistics = rows.statistics()
        assert statistics.count == num_rows * num_codes and statistics.nearest.isfinite().all()
        rows.set_scale(torch.tensor(10.0, device=DEVICE))
        g = torch.zeros(num_codes, dtype=torch.float64, device=DEVICE)
        assert rows.log_column_sums().isfinite().all() and rows.log_mass(g).isfinite().all()
        assert rows.most_likely(g).shape == (num_rows,)
    result = sinkhorn_assign(features, codebook, solver="fused", **PAPER)
    assert result.codes.shape == (num_rows,) and result.potentials.isfinite().all()
    assert nearest_assign(features, codebook, solver="fused").shape == (num_rows,)


@runs_kernels
def test_splits_and_blocks_change_nothing_but_rounding(monkeypatch):
    from optvq_hf import sinkhorn_fused
    from optvq_hf.sinkhorn_blocks import Blocks

    features, codebook = on_device(300, 200, 8)
    g = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    masses = []
    for blocks, warps in ((None, 8192), (Blocks(256, 32), 1), (Blocks(512, 16), 64)):
        monkeypatch.setattr(sinkhorn_fused, "WARPS", warps)
        names = ("log_sums", "top_two", "moments")
        with fused(Distances(Points(features, codebook)), blocks=blocks and dict.fromkeys(names, blocks)) as rows:
            rows.statistics()
            rows.set_scale(torch.tensor(10.0, device=DEVICE))
            masses.append((rows.log_mass(g), rows.most_likely(g)))
    for mass, codes in masses[1:]:
        torch.testing.assert_close(mass, masses[0][0], rtol=1e-6, atol=1e-5)
        assert torch.equal(codes, masses[0][1])


@runs_kernels
@pytest.mark.parametrize(
    ("dim", "method"), [(16, "ieee"), (16, "bf16x6"), slow(3, "ieee"), slow(16, "direct"), slow(64, "bf16x6")]
)
def test_every_way_to_the_distances(dim, method):
    from optvq_hf.sinkhorn_fused import Tiles, decided_codes

    if method == "bf16x6" and INTERPRETED:
        pytest.skip("the interpreter does not know it")
    features, codebook = on_device(300, 130, dim)
    g = torch.randn(130, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with fused(Distances(Points(features, codebook)), method=method) as rows:
        rows.statistics()
        rows.set_scale(torch.tensor(10.0, device=DEVICE))
        plan = g - 10 * distances_of(features, codebook)
        torch.testing.assert_close(rows.log_mass(g), plan.log_softmax(1).logsumexp(0), rtol=1e-5, atol=1e-4)
        is_clear = margins(plan) > 1e-2
        assert torch.equal(rows.most_likely(g)[is_clear], plan.argmax(1)[is_clear])
    codes, is_decided = decided_codes(Points(features, codebook), tiles=Tiles(features, codebook, method=method))
    assert is_decided.float().mean() > 0.9
    assert torch.equal(codes[is_decided], distances_of(features, codebook).argmin(1)[is_decided])


# ---- both solvers ----------------------------------------------------------------------------------------------------


@runs_kernels
@pytest.mark.parametrize("normalization", ["zscore", slow("robust"), slow("sqrt_dim"), slow("none")])
@pytest.mark.parametrize("epsilon", [10.0, slow(1.0), slow(100.0), slow(300.0)])
@pytest.mark.parametrize("dim", [8, 64, *map(slow, (1, 2, 3, 16, 100, 256))])
def test_both_solvers_find_the_same(normalization, epsilon, dim):
    features, codebook = on_device(300, 64, dim)
    arguments = {"epsilon": epsilon, "iterations": 5, "normalization": normalization}
    ours, theirs = (sinkhorn_assign(features, codebook, solver=s, **arguments) for s in ("fused", "torch"))
    torch.testing.assert_close(ours.scale, theirs.scale, rtol=1e-5, atol=0)
    exact = sinkhorn_assign(features.double(), codebook.double(), **arguments)
    torch.testing.assert_close(ours.potentials.double(), exact.potentials, rtol=1e-5, atol=2e-4 * max(1, epsilon / 10))
    assert abs(ours.marginal_error - exact.marginal_error) <= 1e-3
    plan = exact.potentials - exact.scale * distances_of(features, codebook)
    is_clear = margins(plan) > 1e-2
    assert torch.equal(ours.codes[is_clear], plan.argmax(1)[is_clear])


@runs_kernels
@pytest.mark.parametrize("dim", [8, 40, slow(1), slow(16), slow(256)])
@pytest.mark.parametrize(
    "change", ["none", "coinciding codes", slow("on a code"), slow("far away"), slow("1e-4"), slow("1e4"), slow("1e16")]
)
def test_nearest_codes_and_those_by_potentials_are_torchs(dim, change):
    features, codebook = changed(*on_device(500, 130, dim), change)
    nearest = nearest_assign(features, codebook, solver="fused")
    assert torch.equal(nearest, nearest_assign(features, codebook, solver="torch"))
    scale = 10 / distances_of(features, codebook).std().float()
    potentials = torch.randn(130, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    codes = (potentials_assign(features, codebook, potentials, scale, solver=s) for s in ("fused", "torch"))
    assert torch.equal(*codes)


@runs_kernels
def test_all_arguments_of_the_solver():
    features, codebook = on_device(300, 64, 8)
    start = torch.linspace(-1, 1, 64, device=DEVICE) + 1e3
    for arguments in (
        {"balance": 0.0},
        {"balance": 0.5},
        {"iterations": 0},
        {"potentials": start},
        {"tolerance": 0.1, "iterations": 50},
        {"target_marginals": torch.logspace(-12, 0, 64, dtype=torch.float64, device=DEVICE)},
    ):
        results = [sinkhorn_assign(features, codebook, solver=s, **{**PAPER, **arguments}) for s in ("fused", "torch")]
        torch.testing.assert_close(*(r.potentials for r in results), rtol=1e-5, atol=1e-3)
        assert torch.equal(results[0].codes, results[1].codes) and results[0].iterations == results[1].iterations


@runs_kernels
@pytest.mark.parametrize("are_few", [True, False])
def test_open_rows_are_decided_as_blocked_rows_does(are_few, monkeypatch):
    """Fewer features than codes: rows share their mass among many codes."""
    from optvq_hf import sinkhorn_fused

    if not are_few:
        monkeypatch.setattr(sinkhorn_fused, "FEW_PAIRS", 0)
    features, codebook = on_device(40, 300, 4)
    g = 8.0 * distances_of(features, codebook).amin(0)
    answers = []
    for rows in (kind(Distances(Points(features, codebook))) for kind in (fused, BlockedRows)):
        with rows:
            rows.statistics()
            rows.set_scale(torch.tensor(8.0, device=DEVICE))
            answers.append(rows.most_likely(g))
    assert torch.equal(*answers)


@runs_kernels
@pytest.mark.parametrize(
    "change", ["none", slow("on a code"), slow("far away"), slow("coinciding codes"), slow("1e-4")]
)
@pytest.mark.parametrize("shape", [(300, 130, 8), (300, 130, 40), slow((1025, 257, 3)), slow((40, 300, 16))])
@pytest.mark.parametrize("cost", ["squared_euclidean", "cosine"])
def test_other_costs(cost, shape, change):
    features, codebook = changed(*on_device(*shape), change)
    if cost == "cosine":
        features[7], codebook[9] = 0, 0
    ours, theirs, exact = (
        sinkhorn_assign(*inputs, cost=cost, solver=solver, **PAPER)
        for solver, inputs in (
            ("fused", (features, codebook)),
            ("torch", (features, codebook)),
            ("torch", (features.double(), codebook.double())),
        )
    )
    difference = ours.potentials.double() - exact.potentials
    assert (difference - difference.median()).abs().max() <= 1e-3
    torch.testing.assert_close(ours.scale.double(), exact.scale, rtol=1e-5, atol=0)
    plan = exact.potentials - exact.scale * _costs(features, codebook, cost)
    for codes in (ours.codes, theirs.codes):
        assert (plan.amax(1) - plan.gather(1, codes[:, None]).squeeze(1)).max() <= 3e-3
    nearest, same = (nearest_assign(features, codebook, cost=cost, solver=solver) for solver in ("fused", "torch"))
    assert torch.equal(nearest, same)
    by_potentials = (
        potentials_assign(features, codebook, exact.potentials.float(), ours.scale, cost=cost, solver=solver)
        for solver in ("fused", "torch")
    )
    assert torch.equal(*by_potentials)


def _costs(features, codebook, cost):
    features, codebook = features.double(), codebook.double()
    if cost == "squared_euclidean":
        return (features[:, None] - codebook).square().sum(dim=2)
    return 1 - torch.cosine_similarity(features[:, None], codebook, dim=2, eps=1e-300)


@runs_kernels
def test_results_repeat_to_the_last_bit():
    features, codebook = on_device(700, 100, 8)
    first, again = (sinkhorn_assign(features, codebook, solver="fused", **PAPER) for _ in range(2))
    assert torch.equal(first.potentials, again.potentials) and torch.equal(first.codes, again.codes)


@runs_kernels
def test_float64_stays_with_torch():
    features, codebook = (x.double() for x in on_device(100, 20, 4))
    ours, theirs = (sinkhorn_assign(features, codebook, solver=s, **PAPER) for s in ("fused", "torch"))
    assert torch.equal(ours.potentials, theirs.potentials) and torch.equal(ours.codes, theirs.codes)


# ---- several ranks ---------------------------------------------------------------------------------------------------

SHARES = (200, 0, 87)


def solve_share(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(SHARES))
    torch.set_num_threads(1)
    features, codebook = points(sum(SHARES), 40, 3)
    features = features.split(SHARES)[rank]
    far = 100.0 * features  # whose sums of columns underflow on every rank
    group, counts = dist.group.WORLD, []
    count = mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce)
    for rows in (fused(Distances(Points(x, codebook)), process_group=group) for x in (features, far)):
        with rows:
            rows.statistics()
            rows.set_scale(torch.tensor(10.0))
            for call in (rows.log_column_sums, partial(rows.log_mass, torch.zeros(40, dtype=torch.float64))):
                with count as reduce:
                    counts.append((call(), reduce.call_count))
    result = sinkhorn_assign(features, codebook, solver="fused", process_group=group, **PAPER)
    torch.save((counts, result.codes, result.potentials, result.scale), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@runs_kernels
@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="one GPU")
def test_ranks_of_unequal_shares_are_as_one(tmp_path):
    """With one all-reduce for each pass."""
    mp.spawn(solve_share, args=(tmp_path,), nprocs=len(SHARES))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(SHARES))]
    features, codebook = points(sum(SHARES), 40, 3)
    alone = sinkhorn_assign(features, codebook, solver="fused", **PAPER)
    assert torch.equal(torch.cat([codes for _, codes, _, _ in found]), alone.codes)
    for answers, _, potentials, scale in found:
        torch.testing.assert_close(potentials, alone.potentials, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(scale, alone.scale)
        for (answer, num_collectives), (first, _) in zip(answers, found[0][0]):
            assert torch.equal(answer, first) and num_collectives == 1
    cost = distances_of(features, codebook)
    far = distances_of(100 * features, codebook)
    for (sums, _), (mass, _), scores in ((*found[0][0][:2], -10 * cost), (*found[0][0][2:], -10 * far)):
        torch.testing.assert_close(sums, scores.logsumexp(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mass, scores.log_softmax(1).logsumexp(0), rtol=1e-5, atol=1e-4)


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_fused_without_a_gpu_is_one_clear_line(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    features, codebook = points(10, 5, 4)
    for assign in (nearest_assign, lambda z, c, solver: sinkhorn_assign(z, c, solver=solver, **PAPER)):
        with pytest.raises(ValueError, match='solver "fused" needs'):
            assign(features, codebook, solver="fused")
        with pytest.raises(ValueError, match="solver must be one of"):
            assign(features, codebook, solver="cuda")
        assign(features, codebook, solver="auto")


def test_auto_warns_once_and_uses_torch_where_the_check_fails(monkeypatch):
    features = points(10, 5, 4)[0]
    monkeypatch.setattr(solver_choice, "_what_is_missing", lambda device: "")
    monkeypatch.setattr(solver_choice, "_check", lambda device: "gives other codes than torch")
    solver_choice._is_trusted.cache_clear()
    with pytest.warns(UserWarning, match='gives other codes than torch. "auto" uses torch'):
        assert not solver_choice._is_trusted(features.device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not solver_choice._is_trusted(features.device)
    solver_choice._is_trusted.cache_clear()


@runs_kernels
@pytest.mark.slow
def test_the_check_passes():
    assert solver_choice._check(torch.device(DEVICE)) == ""
