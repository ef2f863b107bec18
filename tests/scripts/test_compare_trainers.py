"""`scripts/compare_trainers.py` runs both trainers on the same batches."""

import runpy
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_trainers.py"


@pytest.mark.long
def test_both_trainers_run(fresh_run):
    results = runpy.run_path(str(SCRIPT))["main"](["--max-steps", "2"])
    assert list(results) == ["optvq train", "transformers.Trainer"]
    assert (
        all(0 < result["mse"] < 4 for result in results.values()) and results["transformers.Trainer"]["eval_loss"] > 0
    )
