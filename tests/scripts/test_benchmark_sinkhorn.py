import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "benchmark_sinkhorn.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(
        sys, "path", [*sys.path, str(SCRIPT.parent)]
    )  # last: evaluate.py would hide the `evaluate` library
    return runpy.run_path(str(SCRIPT))


def run(*flags):
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.long
def test_quick(script, tmp_path):
    shown = run("--quick", "--output-dir", str(tmp_path), "--before", str(REPOSITORY / "src"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["N"] for row in results["times"]] == [case[0] for case in script["QUICK_CASES"]]
    assert all(seconds > 0 for row in results["times"] for seconds in row["seconds"].values())
    assert all(row["agreement"]["cached"] >= 99.9 and row["agreement"]["pot"] >= 99.9 for row in results["accuracy"])
    assert all(-5 < results["exponents"][axis] < 5 for axis in ("K", "N"))
    assert all(f"{m} before" in results["times"][0]["seconds"] for m in ("nearest_assign", "cached", "streamed"))
    assert results["memory"][0]["bytes"]["cached before"] > 0
    assert (tmp_path / "results.md").read_text() == script["markdown"](results)
    assert script["markdown"](results).count("ours, cached, to before |") == 2
    assert script["markdown"](results) in shown
    assert (tmp_path / "time.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc, of Linux alone")
def test_no_matrix_of_features_by_codes():
    """8,192 x 16,384 distances are 537 MB; searching and streaming need a few blocks of 8 MB."""
    for method, limit in (("nearest_assign", 60e6), ("streamed", 100e6)):
        assert int(run("--peak-of", method, "8192", "16384", "8")) < limit
    assert 537e6 < int(run("--peak-of", "cached", "8192", "16384", "8")) < 700e6


def test_the_documented_tables_are_those_of_the_stored_results(script):
    results = json.loads((REPOSITORY / "docs" / "solver_benchmark.json").read_text())
    page = (REPOSITORY / "docs" / "solver.md").read_text()
    tables = page.split("<!-- tables of the benchmark: begin -->\n")[1].split("<!-- tables of the benchmark: end -->")[
        0
    ]
    assert tables.strip() == script["markdown"](results).strip()
