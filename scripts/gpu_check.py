# /// script
# requires-python = ">=3.11"
# dependencies = ["optvq_hf[train]", "pytest>=9.2", "pytest-timeout>=2.4", "pytest-xdist>=3.8"]
# [tool.uv.sources]
# optvq_hf = { path = "..", editable = true }
# ///
"""Proves the package on a GPU: the tests of tests/device, then what everything costs there, in one report.

    make gpu                                            # under 10 minutes on one GPU
    uv run scripts/gpu_check.py --quick                 # about 4 minutes
    python scripts/gpu_check.py --device cpu --quick    # the same in small sizes: whether it runs, not how fast

Writes report.json and report.md, and nothing else, to the output folder. Every part runs, whatever became of the others; the
exit status is 1 if a test or a part failed. Without a GPU it lists what it would do.
"""

import argparse
import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


REPOSITORY = Path(__file__).resolve().parents[1]
# Python puts this folder first on its path, where evaluate.py would hide the `evaluate` library.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != REPOSITORY / "scripts"]
sys.path += [str(REPOSITORY / "src"), str(REPOSITORY / "scripts" / "gpu")]

import costs  # noqa: E402, F401 (costs and proofs register their parts)
import proofs  # noqa: E402, F401
from parts import PARTS, Rows, Settings, one_line  # noqa: E402


# What must hold comes first: parts that begin after the time is over are skipped.
ORDER = ("tests", "training", "solver", "quantizer", "encoding", "model", "compiled model")
PACKAGES = ("torch", "triton", "torchvision", "transformers", "accelerate", "datasets", "numpy", "optvq_hf")


def describe(device: torch.device) -> dict:
    """Device, driver and versions."""
    found = {"device": platform.processor() or platform.machine(), "python": platform.python_version()}
    if device.type == "cuda":
        of_device = torch.cuda.get_device_properties(device)
        found["device"] = f"{of_device.name}, {of_device.total_memory / 2**30:.0f} GiB"
        found["devices"] = torch.cuda.device_count()
        found["capability"] = f"{of_device.major}.{of_device.minor}"
        found["CUDA"], found["cuDNN"] = torch.version.cuda, torch.backends.cudnn.version()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            found["driver"] = "unknown"
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def markdown(report: dict) -> str:
    """The report as a page."""
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    sections = [f"Measured by `{report['command']}`. {machine}."]
    for title, found in report["parts"].items():
        lines = [f"## {title}", f"{found['what']} ({found['seconds']:.0f} s)."]
        if "error" in found:
            lines.append(f"Failed: {found['error']}")
        rows = found.get("rows", [])
        if title == "tests":
            lines.append(f"{count(rows)}. Those that failed, were skipped, or measured something:")
            rows = [row for row in rows if row["outcome"] != "passed" or row["note"]]
        if rows:
            lines.append(table(rows))
        sections += lines
    return "\n\n".join(sections) + "\n"


def table(rows: Rows) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
        return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")

    lines = [names, ["-"] * len(names), *([cell(row.get(name)) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def count(rows: Rows) -> str:
    outcomes = [row["outcome"] for row in rows]
    return ", ".join(f"{outcomes.count(name)} {name}" for name in ("passed", "failed", "skipped"))


def summary(title: str, found: dict) -> str:
    """One line about a part."""
    if "error" in found:
        return f"{title}: failed: {found['error']}"
    rows = found["rows"]
    if title == "tests":
        return f"{title}: {count(rows)}"
    failed = sum("error" in row for row in rows)
    return f"{title}: {len(rows)} rows{f', {failed} of them failed' if failed else ''}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, help="Device; by default the first GPU")
    parser.add_argument("--quick", action="store_true", help="About 4 minutes instead of 9")
    parser.add_argument("--minutes", type=float, help="Parts that would begin after so many minutes are skipped")
    parser.add_argument("--only", nargs="+", choices=ORDER, help="Parts to run; by default all")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/gpu_check"), help="Folder of the report")
    settings = parser.parse_args(argv, namespace=Settings())
    if settings.device is None and not torch.cuda.is_available():
        print("There is no GPU here. On one, this would run:")
        for title in ORDER:
            print(f"  {title}: {PARTS[title][0]}")
        return 0
    settings.device = settings.device or torch.device("cuda")
    settings.is_gpu = settings.device.type == "cuda"
    settings.turns = (5 if settings.quick else 20) if settings.is_gpu else 1
    settings.deadline = time.monotonic() + 60 * (settings.minutes or (4 if settings.quick else 9))
    settings.output_dir = settings.output_dir.resolve()
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(prefix="gpu_check_")
    settings.scratch = Path(scratch.name)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes started in the background would ignore it

    command = " ".join(["scripts/gpu_check.py", *(sys.argv[1:] if argv is None else argv)])
    report = {"command": command, "machine": describe(settings.device), "parts": {}}
    print(json.dumps(report["machine"], indent=1), flush=True)
    for title in settings.only or ORDER:
        what, function = PARTS[title]
        found, start = {"what": what}, time.monotonic()
        try:
            if settings.left < 0:
                raise TimeoutError("skipped, the time is over")
            found["rows"] = function(settings)
        except (Exception, SystemExit) as error:
            found["error"], found["traceback"] = one_line(error), traceback.format_exc()
        found["seconds"] = time.monotonic() - start
        report["parts"][title] = found
        # After every part, so that a run that is stopped leaves a report.
        (settings.output_dir / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        (settings.output_dir / "report.md").write_text(markdown(report))
        print(f"[{found['seconds']:.0f} s] {summary(title, found)}", flush=True)
        if settings.is_gpu:
            torch.cuda.empty_cache()
    print(f"\n{markdown(report)}")
    print("\n".join(summary(title, found) for title, found in report["parts"].items()))
    print(f"report: {settings.output_dir / 'report.md'}")
    return int(any(is_failure(found) for found in report["parts"].values()))


def is_failure(found: dict) -> bool:
    return "error" in found or any("error" in row or row.get("outcome") == "failed" for row in found["rows"])


if __name__ == "__main__":
    sys.exit(main())
