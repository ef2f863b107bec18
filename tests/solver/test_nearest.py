import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from optvq_hf.nearest import nearest_assign, top_two
from reference import points


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4])
def test_distances_stay_right_far_from_the_origin(offset):
    features, codebook = points(2048, 256, 8, torch.float64)
    # Multiples of 1/64 are exact in float32 even at 1e4, so float64 on the same numbers is the truth.
    features, codebook = (torch.round(x * 64) / 64 + offset for x in (features, codebook))
    truth = torch.cdist(features, codebook, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    codes = nearest_assign(features.float(), codebook.float())
    wrong = codes != truth
    distance = (features - codebook[codes]).norm(dim=1)
    best = (features - codebook[truth]).norm(dim=1)
    assert not (wrong & (distance > best + 1e-6)).any()


@pytest.mark.parametrize(
    ("separation", "spread", "dim"), [(100, 0.1, 8), (10, 0.01, 2), (1, 0.001, 64)], ids=["wide", "plane", "deep"]
)
def test_nearest_is_exact_where_codes_crowd_together(separation, spread, dim):
    """Two tight clusters far apart: distances within one are smaller than the rounding of a matrix product."""
    generator = torch.Generator().manual_seed(0)
    features, codebook = (spread * torch.randn(n, dim, generator=generator) for n in (600, 200))
    features[::2] += separation
    codebook[::2] += separation
    truth = torch.cdist(features.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    codes = nearest_assign(features, codebook)
    excess = truth.gather(1, codes[:, None]).squeeze(1) - truth.amin(1)
    assert (excess <= 1e-6 * separation).all() and (codes == truth.argmin(1)).float().mean() > 0.995
    assert torch.equal(torch.cat([nearest_assign(row[None], codebook) for row in features[:100]]), codes[:100])


def test_one_far_code_does_not_blur_the_others():
    features, codebook = points(500, 100, 4)
    codebook[7] = 1e6
    assert torch.equal(nearest_assign(features, codebook), torch.cdist(features.double(), codebook.double()).argmin(1))


def test_nearest_breaks_ties_towards_the_lowest_index():
    codebook = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert nearest_assign(torch.tensor([[2.0, 0.0], [0.0, 0.0], [-3.0, 0.1]]), codebook).tolist() == [0, 0, 1]


@pytest.mark.parametrize("angle", [1.0, 1e-3, 1e-6])
def test_nearest_directions_are_exact_and_those_of_single_rows(angle):
    """Whatever the lengths, and whether a vector of zeros is in the batch; also where 1 - cos has few digits left."""
    features, codebook = (1 + angle * x for x in points(300, 100, 8))
    lengths = torch.logspace(-12, 12, 300)[:, None]
    directions, of_codes = (F.normalize(x.double(), dim=1) for x in (features * lengths, codebook * 3))
    truth = (directions[:, None] - of_codes).norm(dim=2)
    codes = nearest_assign(features * lengths, codebook * 3, cost="cosine")
    excess = truth.gather(1, codes[:, None]).squeeze(1) - truth.amin(1)
    assert excess.max() <= 1e-15
    with_zeros = torch.cat([features * lengths, torch.zeros(1, 8)])
    assert torch.equal(nearest_assign(with_zeros, codebook * 3, cost="cosine")[:300], codes)
    alone = [nearest_assign(row[None], codebook * 3, cost="cosine") for row in (features * lengths)[::10]]
    assert torch.equal(torch.cat(alone), codes[::10])


def test_squares_have_the_same_nearest_codes():
    features, codebook = points(300, 100, 8)
    assert torch.equal(nearest_assign(features, codebook, cost="squared_euclidean"), nearest_assign(features, codebook))


@given(
    num_rows=st.integers(0, 5), num_columns=st.integers(1, 100), distinct=st.integers(1, 50), seed=st.integers(0, 99)
)
def test_top_two(num_rows, num_columns, distinct, seed):
    """Any number of columns, also primes; repeated values too."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(distinct, (num_rows, num_columns), generator=generator).float()
    best, column, runner_up = top_two(scores.clone())
    expected = torch.cat([scores, torch.full((num_rows, 1), -torch.inf)], 1).topk(2, dim=1).values
    assert torch.equal(best, expected[:, 0]) and torch.equal(runner_up, expected[:, 1])
    assert torch.equal(scores.gather(1, column[:, None]).squeeze(1), best)


def test_codes_much_smaller_than_the_features():
    """As codebooks often start. Distances agree in most of their digits, and are told apart all the same."""
    features, codebook = points(1000, 500, 16)
    codebook *= 1e-4
    truth = torch.cdist(features.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    assert torch.equal(nearest_assign(features, codebook), truth)
    doubled = codebook.repeat_interleave(2, 0)
    assert torch.equal(nearest_assign(features, doubled), 2 * truth)
