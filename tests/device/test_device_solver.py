"""The solver beside float64 on the CPU.

The score of a code may fall short of the best of its row by LARGEST_TIE, as the solver says, and by the rounding of distances
in float32. In rows whose two best scores differ by more, the codes are therefore those of the CPU.
"""

import math
import threading

import pytest
import torch

from grids import slow
from optvq_hf.distances import BLOCK_ELEMENTS
from optvq_hf.sinkhorn import nearest_assign, plan_rows, potentials_assign, sample_assign, sinkhorn_assign
from optvq_hf.sinkhorn_rows import LARGEST_TIE


PAPER = {"epsilon": 10.0, "iterations": 5, "normalization": "zscore"}
TIE = 1.02 * LARGEST_TIE
SIZES = [(0, 5), (1, 1), (7, 1), (1, 9), (300, 50), (50, 300), (1025, 257)]


def points(num_rows, num_codes, width):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(number, width, generator=generator) for number in (num_rows, num_codes))


def scores_of(features, codebook, potentials, scale):
    """g - s D, (N, K) in float64 on the CPU."""
    distances = torch.cdist(features.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return potentials.double().cpu() - scale.double().cpu() * distances


def score_error(features, codebook, scale):
    """How far a score of float32 may be off, as its distance comes from an expanded square."""
    squares = features.double().square().sum(1).max() + codebook.double().square().sum(1).max()
    nearest = torch.cdist(features.double(), codebook.double()).min()
    off = 10 * torch.finfo(torch.float32).eps * squares
    return (scale.double().cpu() * off / torch.maximum(nearest, off.sqrt())).item()


def centred(potentials):
    """A constant in them changes nothing."""
    return potentials.double().cpu() - potentials.double().mean().cpu()


def shortfall(codes, scores):
    """How far below the best score of its row a code is, at most."""
    best = scores.amax(dim=1) if len(scores) else scores.new_zeros(1)
    return (best - scores.gather(1, codes.cpu()[:, None]).squeeze(1)).amax().item()


@pytest.mark.parametrize("width", [2, slow(1), slow(8), slow(64)])
@pytest.mark.parametrize("epsilon", [10.0, slow(1.0), slow(100.0)])
@pytest.mark.parametrize("normalization", ["zscore", "robust", "sqrt_dim", "none"])
def test_codes_and_potentials_of_float64(normalization, epsilon, width, device):
    settings = {"epsilon": epsilon, "iterations": 5, "normalization": normalization}
    for size in SIZES:
        features, codebook = points(*size, width)
        found = sinkhorn_assign(features.to(device), codebook.to(device), **settings)
        expected = sinkhorn_assign(features.double(), codebook.double(), **settings)
        assert found.codes.device.type == found.potentials.device.type == device.type
        torch.testing.assert_close(found.scale.cpu().double(), expected.scale, rtol=1e-5, atol=0)
        if len(features) == 0:
            assert found.codes.shape == (0,) and found.potentials.isfinite().all()
            continue
        off = score_error(features, codebook, found.scale)
        shift = (centred(found.potentials) - centred(expected.potentials)).abs().max().item()
        assert shift <= 1e-5 * max(1, centred(expected.potentials).abs().max().item()) + off
        scores = scores_of(features, codebook, expected.potentials, expected.scale)
        assert shortfall(found.codes, scores) <= TIE + 2 * (off + shift)
        assert shortfall(found.codes, scores_of(features, codebook, found.potentials, found.scale)) <= TIE
        assert abs(found.marginal_error.item() - expected.marginal_error.item()) <= 1e-4


@pytest.mark.parametrize(
    "settings", [{"balance": 0.5}, {"iterations": 0}, {"tolerance": 0.3, "iterations": 50}], ids=str
)
def test_other_settings(settings, device):
    features, codebook = points(700, 90, 4)
    found = sinkhorn_assign(features.to(device), codebook.to(device), **{**PAPER, **settings})
    expected = sinkhorn_assign(features, codebook, **{**PAPER, **settings})
    assert found.iterations == expected.iterations
    torch.testing.assert_close(found.potentials.cpu(), expected.potentials, rtol=1e-5, atol=1e-5)
    scores = scores_of(features, codebook, expected.potentials, expected.scale)
    assert shortfall(found.codes, scores) <= TIE + 1e-4


def test_results_repeat_to_the_last_bit(device):
    features, codebook = (tensor.to(device) for tensor in points(3000, 500, 8))
    first, second = (sinkhorn_assign(features, codebook, **PAPER) for _ in range(2))
    for name in ("codes", "potentials", "scale", "marginal_error"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, slow(torch.float16), slow(torch.float64)], ids=str)
@pytest.mark.parametrize("width", [8, slow(1), slow(2), slow(64)])
@pytest.mark.parametrize("magnitude", [1.0, slow(1e-3), slow(100.0)])
def test_nearest_and_potentials_exactly_as_on_the_cpu(magnitude, width, dtype, device):
    for size in SIZES:
        features, codebook = (magnitude * tensor for tensor in points(*size, width))
        codebook[1:] = torch.where(torch.arange(1, len(codebook))[:, None] % 3 == 0, codebook[:-1], codebook[1:])
        features, codebook = features.to(dtype), codebook.to(dtype)  # with ties, where the first code wins
        potentials = torch.randn(len(codebook), generator=torch.Generator().manual_seed(2))
        there = [tensor.to(device) for tensor in (features, codebook, potentials)]
        assert torch.equal(nearest_assign(*there[:2]).cpu(), nearest_assign(features, codebook))
        scale = 3.0 / magnitude
        expected = potentials_assign(features, codebook, potentials, scale)
        assert torch.equal(potentials_assign(*there, scale).cpu(), expected)


def test_nearest_codes_do_not_depend_on_the_batch(device):
    features, codebook = (tensor.to(device) for tensor in points(2000, 300, 8))
    codebook[100:200] = codebook[:100] + 1e-7  # near-ties
    codes = nearest_assign(features, codebook)
    for start, stop in ((0, 1), (5, 12), (1000, 2000), (3, 2000)):
        assert torch.equal(nearest_assign(features[start:stop], codebook), codes[start:stop])


def test_samples_follow_the_plan(device):
    features, codebook = points(4, 20, 3)
    solved = sinkhorn_assign(features.to(device), codebook.to(device), **PAPER)
    number = 20_000
    torch.manual_seed(0)
    many = features.to(device).repeat(number, 1)
    codes = sample_assign(many, codebook.to(device), solved.potentials, solved.scale).view(number, 4).T.cpu()
    plan = plan_rows(features, codebook, solved.potentials.cpu(), solved.scale.cpu()).double()
    shares = torch.stack([row.bincount(minlength=20) for row in codes]) / number
    deviation = (plan * (1 - plan) / number).sqrt()
    assert ((shares - plan).abs() <= 5 * deviation + 1e-4).all()


# ---- precision of the process ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_settings_of_tf32_are_restored_and_do_not_matter(precision, device):
    features, codebook = (tensor.to(device) for tensor in points(2000, 300, 64))
    expected = sinkhorn_assign(features, codebook, **PAPER)
    torch.backends.cuda.matmul.fp32_precision = precision
    found = sinkhorn_assign(features, codebook, **PAPER)
    assert torch.backends.cuda.matmul.fp32_precision == precision
    assert torch.equal(found.potentials, expected.potentials) and torch.equal(found.codes, expected.codes)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(sinkhorn_assign(features, codebook, **PAPER).codes, expected.codes)
    with pytest.raises(ValueError, match="NaN"):
        sinkhorn_assign(features * math.nan, codebook, **PAPER)
    assert torch.backends.cuda.matmul.fp32_precision == precision


def test_the_older_setting_of_tf32(device):
    """As users write it, before and after: torch refuses to read what was set in two ways that disagree."""
    features, codebook = (tensor.to(device) for tensor in points(2000, 300, 64))
    expected = sinkhorn_assign(features, codebook, **PAPER)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        found = sinkhorn_assign(features, codebook, **PAPER)
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.potentials, expected.potentials) and torch.equal(found.codes, expected.codes)


def test_threads(device):
    features, codebook = (tensor.to(device) for tensor in points(1000, 100, 8))
    expected, found = sinkhorn_assign(features, codebook, **PAPER), []
    threads = [
        threading.Thread(target=lambda: found.append(sinkhorn_assign(features, codebook, **PAPER))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(result.codes, expected.codes) for result in found)


# ---- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_budget", [0, 2**29, 2**31])
def test_memory_stays_within_the_budget(memory_budget, cuda, record_property):
    """The rows that are kept, and four blocks of 64 MiB: one in use, one of scratch, and copies of open rows."""
    features, codebook = (tensor.to(cuda) for tensor in points(32768, 16384, 8))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sinkhorn_assign(features, codebook, **PAPER, memory_budget=memory_budget)
    peak = torch.cuda.max_memory_allocated() - before
    record_property("peak above the budget (MiB)", round((peak - memory_budget) / 2**20))
    assert peak <= memory_budget + 4 * 4 * BLOCK_ELEMENTS["other"]


def test_a_large_case(device, record_property):
    """Potentials beside float64 on the same device, codes beside a sample of rows on the CPU."""
    num_rows, num_codes = (32768, 16384) if device.type == "cuda" else (2048, 1024)
    features, codebook = points(num_rows, num_codes, 8)
    there = features.to(device), codebook.to(device)
    found = sinkhorn_assign(*there, **PAPER)
    exact = sinkhorn_assign(*(tensor.double() for tensor in there), **PAPER)
    difference = (found.potentials.double() - exact.potentials).abs().max().item()
    record_property("largest difference of potentials", difference)
    assert difference <= 1e-5 * exact.potentials.abs().max().item()
    rows = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1))[:512]
    scores = scores_of(features[rows], codebook, found.potentials, found.scale)
    assert shortfall(found.codes[rows.to(device)], scores) <= TIE
    nearest = nearest_assign(*there)[rows.to(device)]
    assert torch.equal(nearest.cpu(), nearest_assign(features[rows], codebook))
