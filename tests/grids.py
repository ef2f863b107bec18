"""Grids of parameters: thin in the fast set, whole under the mark `slow`."""

import pytest


def slow(*values, id=None):
    """An entry of a grid that only `make test-slow` runs, with all that it is combined with."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)
