import os
import subprocess
import sys
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parents[2]


@pytest.mark.long
def test_the_errors_of_one_step(tmp_path):
    words = ["--config", str(REPOSITORY / "scripts/recipes/quickstart.yaml"), "--max-steps", "10", "--num-workers", "0"]
    words = [sys.executable, str(REPOSITORY / "scripts/benchmark_warm_start.py"), *words, "--output-dir", str(tmp_path)]
    shown = subprocess.run(
        words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    header, _, row = shown.stdout.strip().splitlines()[-3:]
    errors = dict(zip(header.strip("| ").split(" | "), map(float, row.strip("| ").split(" | "))))
    assert errors["step"] == 10
    assert 2 >= errors["1 cold"] > errors["5 cold"] > errors["30 cold"] >= 0
    assert errors["5 warm"] < errors["5 cold"]
