"""`make gpu` on a machine that has none, and as a whole in small sizes on the CPU."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch


SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    return runpy.run_path(str(SCRIPT))


def test_without_a_gpu_it_lists_what_it_would_do(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script["main"]([]) == 0
    shown = capsys.readouterr().out
    assert "no GPU" in shown and set(script["ORDER"]) == set(script["PARTS"])
    assert [line.split(":")[0].strip() for line in shown.splitlines()[1:]] == list(script["ORDER"])


def test_a_part_that_fails_does_not_stop_the_others(script, monkeypatch, tmp_path, capsys):
    def fails(settings):
        raise RuntimeError("out | of memory\nsecond line")

    monkeypatch.setitem(script["PARTS"], "quantizer", ("fails", fails))
    flags = ["--device", "cpu", "--quick", "--output-dir", str(tmp_path), "--only", "quantizer", "solver"]
    assert script["main"](flags) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["parts"]["quantizer"]["error"] == "RuntimeError: out | of memory"
    assert all(row["ms"] > 0 for row in report["parts"]["solver"]["rows"])
    page = (tmp_path / "report.md").read_text()
    assert (
        page == script["markdown"](report) and "Failed: RuntimeError" in page and "| sinkhorn_assign, torch |" in page
    )
    assert "quantizer: failed" in capsys.readouterr().out


def test_time_that_is_over(script, tmp_path):
    flags = ["--device", "cpu", "--minutes", "1e-9", "--output-dir", str(tmp_path), "--only", "solver"]
    assert script["main"](flags) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["parts"]["solver"]["error"] == "TimeoutError: skipped, the time is over"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_whole_on_a_cpu(script, tmp_path):
    flags = ["--device", "cpu", "--quick", "--minutes", "10", "--output-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags], env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["parts"].keys() == script["PARTS"].keys()
    assert {row["outcome"] for row in report["parts"]["tests"]["rows"]} == {"passed", "skipped"}
    [trained] = report["parts"]["training"]["rows"]
    assert trained["how"] == "optvq train" and trained["PSNR (dB)"] > 5 and trained["usage (%)"] > 5
    assert (tmp_path / "report.md").read_text() in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md"}
