import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from peak_memory import needs_proc


REPOSITORY = Path(__file__).parents[2]


def test_small_pictures():
    script = runpy.run_path(str(REPOSITORY / "scripts/benchmark_tiles.py"))
    image = script["make_picture"](64)
    assert image.shape == (1, 3, 64, 64) and image.std() > 0.1
    assert script["steps"](image, 64) == ["-", "-", "-"] and "nan" not in script["steps"](image, 32)


@needs_proc
@pytest.mark.long
def test_the_plain_cnn_is_the_same_in_less_memory():
    words = ["--models", "plain_cnn", "--sizes", "768", "--tile-size", "128"]
    words = [sys.executable, str(REPOSITORY / "scripts/benchmark_tiles.py"), *words]
    shown = subprocess.run(
        words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    rows = [line.strip("| ").split(" | ") for line in shown.stdout.splitlines() if line.startswith("| plain_cnn")]
    whole, tiled, difference, *steps = rows
    assert (whole[2], tiled[2]) == ("whole", "128 px")
    assert float(tiled[3].removesuffix(" GB")) < float(whole[3].removesuffix(" GB"))
    assert difference[2:] == ["0.000 %", "0.0e+00", "0.0e+00"]
    assert [row[2] for row in steps] == ["whole", "128 px"] and steps[0][3:] == steps[1][3:]
