"""Grids of parameters: thin in the fast set, whole under the marks `slow` and `long`."""

import pytest


def slow(*values, id=None):
    """An entry of a grid that only `make test-slow` runs, with all that it is combined with."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


def long(*values, id=None):
    """One that only `make test-long` runs."""
    return pytest.param(*values, marks=pytest.mark.long, id=id)
