"""Everything wrong that the solver and the row-by-row assignments may be given is a ValueError or TypeError of one line."""

import math

import numpy as np
import pytest
import torch

from optvq_hf.sinkhorn import (
    nearest_assign,
    plan_rows,
    potentials_assign,
    sample_assign,
    sinkhorn_assign,
    sinkhorn_plan,
)
from reference import PAPER, points


FEATURES, CODEBOOK = points(6, 8, 4)
POTENTIALS = torch.zeros(8)
FUNCTIONS = {
    "sinkhorn_assign": lambda z, c: sinkhorn_assign(z, c, **PAPER),
    "nearest_assign": nearest_assign,
    "potentials_assign": lambda z, c: potentials_assign(z, c, POTENTIALS, 1.0),
    "sample_assign": lambda z, c: sample_assign(z, c, POTENTIALS, 1.0),
    "plan_rows": lambda z, c: plan_rows(z, c, POTENTIALS, 1.0),
}
WRONG_TENSORS = {
    "list": [[1.0] * 4],
    "array": np.zeros((3, 4), np.float32),
    "None": None,
    "string": "codes",
    "scalar": torch.tensor(1.0),
    "1 dimension": torch.zeros(4),
    "3 dimensions": torch.zeros(2, 3, 4),
    "int64": torch.ones(6, 4, dtype=torch.int64),
    "bool": torch.ones(6, 4, dtype=torch.bool),
    "complex": torch.ones(6, 4, dtype=torch.complex64),
    "8 bits": FEATURES.to(torch.float8_e4m3fn),
    "NaN": FEATURES * math.nan,
    "inf": FEATURES / 0,
    "squares overflow": FEATURES * 1e30,
    "squares overflow in float64": FEATURES.double() * 1e200,
    "width 5": torch.zeros(6, 5),
    "width 0": torch.zeros(6, 0),
    "no data": FEATURES.to("meta"),
    "sparse": FEATURES.to_sparse(),
}
WRONG_POTENTIALS = {
    "3 of 8": torch.zeros(3),
    "list": [0.0] * 8,
    "int64": torch.zeros(8, dtype=torch.int64),
    "complex": torch.zeros(8, dtype=torch.complex64),
    "NaN": POTENTIALS * math.nan,
    "inf": POTENTIALS + math.inf,
    "too large": POTENTIALS + 1e30,
    "too large for float32": POTENTIALS.double() + 1e100,
    "no data": POTENTIALS.to("meta"),
    "2 dimensions": torch.zeros(8, 1),
}
WRONG_SETTINGS = {
    "epsilon": [0, -1, math.nan, math.inf, 2**1024, "10", None, True, torch.tensor(10.0), 1j],
    "iterations": [-1, 2.5, math.nan, math.inf, "5", None, True, torch.tensor(5)],
    "normalization": ["all", "", None, 5, ["zscore"]],
    "balance": [-0.1, 1.1, math.nan, "1", None, True],
    "tolerance": [-1, math.nan, "1", True],
    "memory_budget": [-1, math.nan, "1", True],
    "target_marginals": [
        POTENTIALS,
        POTENTIALS - 1,
        POTENTIALS + math.nan,
        POTENTIALS + math.inf,
        torch.ones(3),
        [1.0] * 8,
        torch.ones(8, dtype=torch.complex64),
        torch.ones(8, device="meta"),
    ],
    "potentials": list(WRONG_POTENTIALS.values()),
}
WRONG_SCALES = [
    *(-1, math.nan, math.inf, 1e300, 1e-300, "1", None, True, 1j),
    *(torch.tensor(-1.0), torch.tensor(math.nan), torch.tensor(1j), torch.ones(2), torch.zeros(0)),
    torch.ones((), device="meta"),
]
WRONG_COSTS = {
    **{name: value for name, value in WRONG_TENSORS.items() if not name.startswith("width")},
    "no columns": torch.zeros(3, 0),
}


def refuse(call):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    assert type(caught.value).__module__ == "builtins"
    # Raised by a check, not by Python or torch somewhere deep inside.
    assert caught.traceback[-1].path.name in ("solver_inputs.py", "sinkhorn.py")


@pytest.mark.parametrize("name", WRONG_TENSORS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_features_and_codes(function, name):
    refuse(lambda: FUNCTIONS[function](WRONG_TENSORS[name], CODEBOOK))
    refuse(lambda: FUNCTIONS[function](FEATURES, WRONG_TENSORS[name]))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_codes(function):
    refuse(lambda: FUNCTIONS[function](FEATURES, CODEBOOK[:0]))


@pytest.mark.parametrize("setting", WRONG_SETTINGS)
def test_settings(setting):
    for value in WRONG_SETTINGS[setting]:
        refuse(lambda: sinkhorn_assign(FEATURES, CODEBOOK, **{**PAPER, setting: value}))  # noqa: B023, it is called at once
        if setting in PAPER:
            refuse(lambda: sinkhorn_plan(torch.rand(4, 4), **{**PAPER, setting: value}))  # noqa: B023


@pytest.mark.parametrize("function", [potentials_assign, sample_assign, plan_rows])
def test_potentials_and_scales(function):
    for potentials in WRONG_POTENTIALS.values():
        refuse(lambda: function(FEATURES, CODEBOOK, potentials, 1.0))  # noqa: B023
    for scale in WRONG_SCALES:
        refuse(lambda: function(FEATURES, CODEBOOK, POTENTIALS, scale))  # noqa: B023


@pytest.mark.parametrize("name", WRONG_COSTS)
def test_costs(name):
    refuse(lambda: sinkhorn_plan(WRONG_COSTS[name], **PAPER))


@pytest.mark.parametrize("dim", [None, 0, -1, 2.5, "4"])
def test_widths_behind_a_cost(dim):
    refuse(lambda: sinkhorn_plan(torch.rand(3, 3), epsilon=1.0, iterations=1, normalization="sqrt_dim", dim=dim))
