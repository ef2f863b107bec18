"""The parts of `scripts/gpu_check.py`, what they are told, and the clocks with which they measure."""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


REPOSITORY = Path(__file__).resolve().parents[2]
PARTS: dict[str, tuple[str, Callable]] = {}  # by title: what it does, and the function that does it

Rows = list[dict]


def part(title: str, what: str) -> Callable:
    """Registers a part of the report: a function of [`Settings`] that returns the rows of a table."""

    def register(function: Callable) -> Callable:
        PARTS[title] = (what, function)
        return function

    return register


class Settings(argparse.Namespace):
    """The command line.

    Attributes:
        device: The device.
        is_gpu: Whether sizes are those of a GPU.
        turns: Calls of which the median is taken.
        scratch: Folder for what the parts write.
        deadline: Value of the clock at which the time of the whole run is over.
    """

    device: torch.device
    quick: bool
    is_gpu: bool
    turns: int
    scratch: Path
    output_dir: Path
    deadline: float

    @property
    def left(self) -> float:
        """Seconds to the end of the run."""
        return self.deadline - time.monotonic()


def milliseconds(device: torch.device, function: Callable) -> float:
    """Of one call: between two events of the GPU, or on the clock of a CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def side_by_side(device: torch.device, functions: dict[str, Callable], turns: int) -> dict[str, float]:
    """Median milliseconds of each, after one call to warm up; every turn has another order."""
    times = {name: [] for name in functions}
    shuffled = random.Random(0)
    for _ in range(turns + 1):
        for name in shuffled.sample(list(functions), len(functions)):
            times[name].append(milliseconds(device, functions[name]))
    return {name: statistics.median(of_one[1:]) for name, of_one in times.items()}


def peak_memory(device: torch.device, function: Callable) -> float | None:
    """MiB that a call takes above what was allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)


def one_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else ''}"
