"""Unique ids: exact transport within groups, ids that were given before, further codes."""

import itertools

import numpy as np
import pytest

from optvq_hf.item_ids.unique import Ids, make_unique, number_rows


def random_items(items, levels, size, seed, dim=3):
    random = np.random.default_rng(seed)
    vectors, codebook = random.standard_normal((items, dim)), random.standard_normal((size, dim))
    nearest = ((vectors[:, None] - codebook) ** 2).sum(2).argmin(1)
    prefixes = random.integers(0, 2, (items, levels - 1))
    return np.column_stack([prefixes, nearest]), vectors, codebook


def resolve(codes, vectors, codebook, given=None):
    return make_unique(codes, lambda positions: vectors[positions], codebook, given)


def check(ids: Ids, given: Ids | None = None):
    """All are different, and none is the beginning of another."""
    whole = [tuple(row[row >= 0]) for part in (ids, given) if part is not None for row in part.whole()]
    assert len(set(whole)) == len(whole)
    assert not {row[:-1] for row in whole} & set(whole)


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_solved_exactly(seed):
    """By trying all ways to give 5 codes to up to 5 items."""
    codes, vectors, codebook = random_items(9, 2, 5, seed)
    ids = resolve(codes, vectors, codebook)
    check(ids)
    for prefix in (0, 1):
        group = np.flatnonzero(codes[:, 0] == prefix)
        if len(group) >= 5:  # one code stays open
            assert (ids.numbers[group] >= 0).all() and (ids.codes[group] == codes[group]).all()
            continue
        costs = ((vectors[group][:, None] - codebook) ** 2).sum(2)
        rows = np.arange(len(group))
        best = min(costs[rows, list(way)].sum() for way in itertools.permutations(range(5), len(group)))
        assert costs[rows, ids.codes[group, -1]].sum() == pytest.approx(best, rel=1e-12)
        assert (ids.codes[group, 0] == prefix).all() and (ids.numbers[group] == -1).all()


def test_groups_without_a_collision_keep_their_ids():
    codes = np.array([[0, 1], [0, 2], [1, 3], [1, 3]])
    codebook = np.arange(4.0)[:, None]
    vectors = np.array([[2.0], [1.0], [3.0], [2.9]])  # the first two would rather swap
    ids = resolve(codes, vectors, codebook)
    assert ids.codes.tolist() == [[0, 1], [0, 2], [1, 3], [1, 2]] and (ids.numbers == -1).all()


def test_equal_items_are_told_apart_by_their_order():
    codes = np.zeros((3, 2), dtype=np.int64)
    ids = [resolve(codes, np.zeros((3, 1)), np.arange(4.0)[:, None]).codes.tolist() for _ in range(2)]
    assert ids[0] == ids[1] and sorted(ids[0]) == [[0, 0], [0, 1], [0, 2]]


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_new_items_leave_given_ids(levels, seed):
    """Batch after batch, until groups overflow: ids stay different, and none is the beginning of another."""
    codes, vectors, codebook = random_items(60, levels, 16, seed)
    given, later = None, np.split(np.arange(60), [4, 10, 20, 40])
    for part in later:
        ids = make_unique(codes[part], lambda positions, part=part: vectors[part][positions], codebook, given)
        check(ids, given)
        joined = [ids] if given is None else [given, ids]
        given = Ids(*(np.concatenate(parts) for parts in zip(*joined)))
    assert len(given.codes) == 60 and (given.codes[:, :-1] == codes[:, :-1]).all()
    assert (given.numbers >= 0).any() == (levels < 3 or np.bincount(number_rows(codes[:, :-1])).max() > 15)


def test_no_group_is_ever_full():
    """Of 2 codes, item by item, also where none collides."""
    given = Ids.of_levels(np.zeros((0, 2), dtype=np.int64))
    for last in (0, 1, 1, 0):
        ids = resolve(np.array([[5, last]]), np.full((1, 1), float(last)), np.arange(2.0)[:, None], given)
        check(ids, given)
        given = Ids(np.concatenate([given.codes, ids.codes]), np.concatenate([given.numbers, ids.numbers]))
    assert given.whole().tolist() == [[5, 0, -1], [5, 1, 0], [5, 1, 1], [5, 1, 2]]
    together = resolve(np.array([[5, 0], [5, 1]]), np.zeros((2, 1)), np.arange(2.0)[:, None])
    assert together.whole().tolist() == [[5, 0, 0], [5, 1, 0]]


def test_a_group_whose_ids_are_all_given():
    """By a run that did not ask for unique ids."""
    given = Ids.of_levels(np.array([[5, 0], [5, 1]]))
    with pytest.raises(ValueError, match=r"already hold all 2 ids of group \(5,\), and 1 new ones belong to it"):
        resolve(np.array([[5, 1]]), np.ones((1, 1)), np.arange(2.0)[:, None], given)
    other = resolve(np.array([[4, 1]]), np.ones((1, 1)), np.arange(2.0)[:, None], given)
    assert other.codes.tolist() == [[4, 1]]


def test_rows_are_numbered_without_overflow():
    rows = np.random.default_rng(0).integers(0, 3, (500, 40)) * 2**40
    numbers = number_rows(rows)
    assert numbers.max() + 1 == len(np.unique(rows, axis=0))
    same = (rows[:, None] == rows).all(2)
    assert ((numbers[:, None] == numbers) == same).all()
    assert number_rows(rows[:, :0]).tolist() == [0] * 500
