import os
import subprocess
import sys
from pathlib import Path

import pytest

from peak_memory import needs_proc


REPOSITORY = Path(__file__).parents[2]


@needs_proc
@pytest.mark.slow
def test_the_plain_cnn_is_the_same_in_less_memory():
    words = ["--models", "plain_cnn", "--sizes", "256", "1024", "--tile-size", "128", "--memory-limit", "3.5"]
    words = [sys.executable, str(REPOSITORY / "scripts/benchmark_tiles.py"), *words]
    shown = subprocess.run(
        words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    rows = [line.strip("| ").split(" | ") for line in shown.stdout.splitlines() if line.startswith("| plain_cnn")]
    costs, differences, seams = rows[:4], rows[4:6], rows[6:]
    assert [row[1:3] for row in costs] == [["256", "whole"], ["256", "128 px"], ["1024", "whole"], ["1024", "128 px"]]
    assert [row[1:] for row in differences] == [[side, "0.000 %", "0.0e+00", "0.0e+00"] for side in ("256", "1024")]
    assert [row[3:] for row in seams[::2]] == [row[3:] for row in seams[1::2]] and len(seams) == 4
    whole, tiled = (float(row[3].removesuffix(" GB")) for row in costs[2:])
    assert tiled < whole
