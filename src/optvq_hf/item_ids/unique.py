"""Gives every item an id of its own: the last codes of items that share all others are shared out among them.

A group is all items that share all codes but the last. In a group in which ids collide, n items get n different last codes,
such that the sum of the squared distances between what the last level quantizes and its codes is least: transport with
capacity 1, solved exactly. If a group has as many items as codes or more, its items keep their last codes, and all are
numbered by a further code, each among those that share a last one. No id is the beginning of another.

Ids that were given before stay. Their items take no part, and new items get what is free. One code of every group is free or
of numbered ids, so that no group is ever full.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm


class Ids(NamedTuple):
    """Ids of N items.

    Attributes:
        codes: (N, levels) int64.
        numbers: (N,) int64, the further code of items that have one, -1 otherwise.
    """

    codes: np.ndarray
    numbers: np.ndarray

    @classmethod
    def of_levels(cls, codes: np.ndarray) -> "Ids":
        """Ids without further codes."""
        return cls(codes, np.full(len(codes), -1))

    def whole(self) -> np.ndarray:
        """(N, levels + 1) int64, with -1 where there is no further code."""
        return np.column_stack([self.codes, self.numbers])


def number_rows(rows: np.ndarray) -> np.ndarray:
    """(N,) int64: equal rows of integers (N, width) have equal numbers, from 0 on."""
    numbers = np.zeros(len(rows), dtype=np.int64)
    for column in rows.T:  # there are at most N different numbers so far, so the product does not overflow
        values, column = np.unique(column, return_inverse=True)
        numbers = np.unique(numbers * len(values) + column, return_inverse=True)[1]
    return numbers


def make_unique(
    codes: np.ndarray, rest: Callable[[np.ndarray], np.ndarray], codebook: np.ndarray, given: Ids | None = None
) -> Ids:
    """Different ids for all items; items of groups without a collision, and with a code to spare, keep their codes.

    Args:
        codes: (N, levels) int64, in the order of the keys, which decides between equally good assignments.
        rest: rest(positions) is what the last level quantizes of these items, (n, dim).
        codebook: (codebook_size, dim) of the last level.
        given: Ids that other items have.

    Raises:
        ImportError: If scipy is not installed.
        ValueError: If a group with new items has no code left, because ids that were given before, without this function,
            hold all of them.
    """
    given = Ids.of_levels(codes[:0]) if given is None else given
    together = np.concatenate([codes, given.codes])
    ids, groups = number_rows(together), number_rows(together[:, :-1])
    changes = np.bincount(ids)[ids] > 1
    of_groups = groups[np.unique(ids, return_index=True)[1]]  # once for every different id
    changes |= np.bincount(of_groups)[groups] == len(codebook)  # no code would be left for later items
    changes[len(codes) :] = False  # given ids stay
    wanted = np.flatnonzero(np.isin(groups, np.unique(groups[changes])))
    wanted = wanted[np.argsort(groups[wanted], kind="stable")]  # by group, new items before given ones, in order
    parts = np.split(wanted, np.flatnonzero(np.diff(groups[wanted])) + 1) if len(wanted) else []
    result = Ids(codes.copy(), np.full(len(codes), -1))
    for part in tqdm(parts, desc="resolving collisions", unit="group", disable=None):
        items, others = part[part < len(codes)], part[part >= len(codes)] - len(codes)
        prefix = tuple(codes[items[0], :-1].tolist())
        _share_out(result, items, rest, codebook, Ids(given.codes[others], given.numbers[others]), prefix)
    return result


def _share_out(
    result: Ids,
    items: np.ndarray,
    rest: Callable[[np.ndarray], np.ndarray],
    codebook: np.ndarray,
    given: Ids,
    prefix: tuple[int, ...],
) -> None:
    """Changes the last codes of the items of one group, and gives them numbers if there are too many."""
    try:
        from scipy.optimize import linear_sum_assignment
        from scipy.spatial.distance import cdist
    except ImportError as error:
        raise ImportError('--unique needs scipy: run pip install "optvq_hf[train]"') from error
    is_numbered = given.numbers >= 0
    is_free = np.ones(len(codebook), dtype=bool)
    is_free[given.codes[:, -1]] = False
    free = np.flatnonzero(is_free)
    if len(items) < len(free) and not is_numbered.any():
        costs = cdist(rest(items).astype(np.float64), codebook[free].astype(np.float64), "sqeuclidean")
        result.codes[items, -1] = free[linear_sum_assignment(costs)[1]]
        return
    is_open = is_free.copy()
    is_open[given.codes[is_numbered, -1]] = True
    if not is_open.any():
        raise ValueError(
            f"items that have ids already hold all {len(codebook)} ids of group {prefix}, and {len(items)} new ones belong "
            "to it: give all ids anew, without --quantizer"
        )
    lasts = result.codes[items, -1]
    moved = np.flatnonzero(~is_open[lasts])
    if len(moved):
        opened = np.flatnonzero(is_open)
        costs = cdist(rest(items[moved]).astype(np.float64), codebook[opened].astype(np.float64), "sqeuclidean")
        lasts[moved] = opened[costs.argmin(axis=1)]
    result.codes[items, -1] = lasts
    for last in np.unique(lasts):
        of_code = items[lasts == last]
        start = given.numbers[given.codes[:, -1] == last].max(initial=-1) + 1
        result.numbers[of_code] = np.arange(start, start + len(of_code))
