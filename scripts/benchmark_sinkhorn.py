"""Measures the transport solver beside what it competes with, all in one run on one machine.

    python scripts/benchmark_sinkhorn.py            # about 6 minutes on 2 cores; needs 12 GB
    python scripts/benchmark_sinkhorn.py --quick    # a minute, small sizes: whether everything runs, not how fast
    python scripts/benchmark_sinkhorn.py --before ../earlier/src    # beside the version in that folder

Methods, all with the paper's settings (5 rounds, epsilon 10, z-score):

    cached, streamed    optvq_hf.sinkhorn.sinkhorn_assign, with and without an N x K matrix
    partly kept         the same with a memory budget of 512 MiB for the matrix
    nearest_assign      optvq_hf's nearest-neighbour search
    cdist_argmin        torch.cdist(...).argmin(1), the yardstick
    exponential         Sinkhorn-Knopp as usually written: exp(-epsilon D) as a full matrix, columns and rows scaled in turn
    pot                 Python Optimal Transport's log-domain solver on the full matrix

Times are medians over several turns in which every method runs once; memory is the highest resident set of a process that
does nothing else, less its inputs. With --before, an earlier version's cached, streamed and nearest_assign run in the same
turns, and the tables have the ratios to these. Writes results.json, results.md and time.png to the output folder.
"""

import argparse
import importlib
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from benchmark_report import COMPARED, draw, earlier, markdown

from optvq_hf import OptVQConfig, OptVQModel
from optvq_hf.model_quantizer_optvq import OptVQModelQuantizer
from optvq_hf.sinkhorn import Assignment, nearest_assign, plan_rows, sinkhorn_assign
from optvq_hf.training.optimization import make_optimizer


PAPER = {"epsilon": 10.0, "iterations": 5, "normalization": "zscore"}
LARGEST_POT = 2**24

# N, K, d and the methods to time.
SOLVERS = ("cdist_argmin", "nearest_assign", "cached", "streamed", "exponential")
CASES = [
    (16384, 1024, 2, (*SOLVERS, "pot")),
    (1024, 1024, 8, (*SOLVERS, "pot")),
    (2048, 1024, 64, (*SOLVERS, "pot")),
    *((n, 4096, 64, (*SOLVERS, "pot") if n == 2048 else SOLVERS) for n in (1024, 2048, 4096, 8192, 16384, 32768)),
    (2048, 16384, 64, SOLVERS),
    (2048, 65536, 64, SOLVERS),
    (2048, 262144, 64, ("cdist_argmin", "nearest_assign", "streamed")),
    (32768, 16384, 64, (*SOLVERS, "partly_kept")),
]
QUICK_CASES = [
    (512, 128, 2, (*SOLVERS, "pot")),
    (256, 512, 8, SOLVERS),
    (1024, 512, 8, SOLVERS),
    (1024, 1024, 8, SOLVERS),
    (2048, 1024, 8, SOLVERS),
]
MEMORY = [(32768, 16384, 64, (*SOLVERS, "partly_kept")), (8192, 262144, 64, ("nearest_assign", "streamed"))]
QUICK_MEMORY = [(1024, 512, 8, ("cdist_argmin", "cached"))]


# ---- the methods -----------------------------------------------------------------------------------------------------


def exponential_assign(features, codebook, *, epsilon, iterations, **_) -> Assignment:
    """Sinkhorn-Knopp as usually written, but in place, which spares it memory and time."""
    cost = torch.cdist(features, codebook)
    plan = cost.sub_(cost.min()).div_(cost.std() + 1e-6).mul_(-epsilon).exp_()
    num_rows, num_codes = plan.shape
    plan /= plan.sum()
    for _ in range(iterations):
        plan /= plan.sum(dim=0, keepdim=True) * num_codes
        plan /= plan.sum(dim=1, keepdim=True) * num_rows
    marginal_error = (plan.sum(dim=0) - 1 / num_codes).abs().sum()
    return Assignment(plan.argmax(dim=1), torch.zeros(num_codes), torch.ones(()), marginal_error, iterations)


def guarded_assign(features, codebook, *, epsilon, iterations, **_) -> Assignment:
    """The same with a new matrix in every step, and a guard in every division."""
    cost = torch.cdist(features, codebook)
    cost = (cost - cost.mean()) / (cost.std() + 1e-6)
    plan = torch.exp(-epsilon * (cost - cost.min()))
    num_rows, num_codes = plan.shape
    plan = plan / (plan.sum() + 1e-8)
    for _ in range(iterations):
        plan = plan / (plan.sum(dim=0, keepdim=True) + 1e-8) / num_codes
        plan = plan / (plan.sum(dim=1, keepdim=True) + 1e-8) / num_rows
    codes = (plan * num_rows).argmax(dim=1)
    return Assignment(codes, torch.zeros(num_codes), torch.ones(()), torch.zeros(()), iterations)


def pot_assign(features, codebook, *, epsilon, iterations, **_) -> Assignment:
    import ot

    cost = torch.cdist(features, codebook)
    uniform = [torch.full((n,), 1 / n, dtype=cost.dtype) for n in cost.shape]
    spread = cost.std() + 1e-6
    plan = ot.bregman.sinkhorn_log(*uniform, cost / spread, 1 / epsilon, numItermax=iterations, stopThr=0, warn=False)
    error = (plan.sum(dim=0) - uniform[1]).abs().sum()
    return Assignment(plan.argmax(dim=1), uniform[1], 1 / spread, error, iterations)


def cdist_argmin(features, codebook, **_) -> torch.Tensor:
    return torch.cdist(features, codebook).argmin(dim=1)


METHODS = {
    "cdist_argmin": cdist_argmin,
    "nearest_assign": lambda z, c, **_: nearest_assign(z, c),
    "cached": lambda z, c, **kw: sinkhorn_assign(z, c, **kw, memory_budget=2**40),
    "streamed": lambda z, c, **kw: sinkhorn_assign(z, c, **kw, memory_budget=0),
    "partly_kept": lambda z, c, **kw: sinkhorn_assign(z, c, **kw, memory_budget=2**29),
    "exponential": exponential_assign,
    "pot": pot_assign,
}


def add_earlier_methods(source: Path) -> None:
    """Adds the methods of the package in this folder, which is imported under another name, and only its solver.

    What torch.compile calls has one name in all versions, so that from now on it is the earlier version's.
    """
    if not (source / "optvq_hf" / "sinkhorn.py").is_file():
        raise FileNotFoundError(f"--before: there is no optvq_hf/sinkhorn.py in {source}")
    package = ModuleType("earlier_optvq_hf")
    package.__path__ = [str(source / "optvq_hf")]
    sys.modules[package.__name__] = package
    solver = importlib.import_module(f"{package.__name__}.sinkhorn")
    METHODS[earlier("nearest_assign")] = lambda z, c, **_: solver.nearest_assign(z, c)
    METHODS[earlier("cached")] = lambda z, c, **kw: solver.sinkhorn_assign(z, c, **kw, memory_budget=2**40)
    METHODS[earlier("streamed")] = lambda z, c, **kw: solver.sinkhorn_assign(z, c, **kw, memory_budget=0)


def beside_earlier(cases: list[tuple]) -> list[tuple]:
    """The cases with every method of ours followed by that of the earlier version."""
    return [
        (*size, [name for m in methods for name in ((m, earlier(m)) if m in COMPARED else (m,))])
        for *size, methods in cases
    ]


def points(num_rows, num_codes, dim):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, dim, generator=generator), torch.randn(num_codes, dim, generator=generator)


def side_by_side(functions: dict, turns: int) -> dict[str, float]:
    """Median seconds of each, after one run to warm up; a slow method gets fewer turns, always beside the others.

    Every turn has another order: a method that leaves much memory behind, or a codebook in the cache, changes the next one.
    """
    seconds = {name: [] for name in functions}
    shuffled = random.Random(0)
    for turn in range(turns + 1):
        for name in shuffled.sample(list(functions), len(functions)):
            start = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - start)
        if turn >= 2 and sum(s[-1] for s in seconds.values()) > 15:
            break
    return {name: statistics.median(s[1:]) for name, s in seconds.items()}


# ---- measurements ----------------------------------------------------------------------------------------------------


def measure_times(cases, turns) -> list[dict]:
    rows = []
    for num_rows, num_codes, dim, methods in cases:
        z, c = points(num_rows, num_codes, dim)
        times = side_by_side({m: partial(METHODS[m], z, c, **PAPER) for m in methods}, turns)
        rows.append({"N": num_rows, "K": num_codes, "d": dim, "seconds": times})
        print(rows[-1], flush=True)
    return rows


def peak_memory(cases, flags: list[str]) -> list[dict]:
    """Each in a process of its own, in bytes. The flags are for these processes."""
    rows = []
    for num_rows, num_codes, dim, methods in cases:
        peaks = {}
        for method in methods:
            size = map(str, (num_rows, num_codes, dim))
            command = [sys.executable, __file__, *flags, "--peak-of", method, *size]
            peaks[method] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        rows.append({"N": num_rows, "K": num_codes, "d": dim, "bytes": peaks})
        print(rows[-1], flush=True)
    return rows


def print_peak(method: str, num_rows: int, num_codes: int, dim: int):
    z, c = points(num_rows, num_codes, dim)
    METHODS[method](z[:64], c[:64], **PAPER)  # loads libraries and starts threads
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = highest_resident_set()
    METHODS[method](z, c, **PAPER)
    print(highest_resident_set() - before)


def highest_resident_set() -> int:
    """In bytes. Not from getrusage, which begins with the parent's; of Linux alone."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def exact_log_plan(z, c, *, epsilon, iterations):
    """The module docstring's iteration, dense and in float64."""
    cost = torch.cdist(z.double(), c.double(), compute_mode="donot_use_mm_for_euclid_dist")
    scores = cost.mul_(-epsilon / (cost.std() + 1e-6))
    g = -scores.logsumexp(dim=0)
    for _ in range(iterations - 1):
        g = g - (scores + g).log_softmax(dim=1).logsumexp(dim=0)
    return scores + g


def measure_accuracy(sizes, epsilons) -> list[dict]:
    """Percentage of the rows that are no near-tie (margin above 1e-3) whose code is that of the float64 iteration."""
    rows = []
    for num_rows, num_codes, dim in sizes:
        z, c = points(num_rows, num_codes, dim)
        for epsilon in epsilons:
            settings = {**PAPER, "epsilon": epsilon}
            log_plan = exact_log_plan(z, c, epsilon=epsilon, iterations=PAPER["iterations"])
            top = log_plan.topk(2, dim=1)
            decided = top.values[:, 0] - top.values[:, 1] > 1e-3
            exact_error = (log_plan.softmax(dim=1).mean(dim=0) - 1 / num_codes).abs().sum().item()
            agreement, errors = {}, {"exact": exact_error}
            for method in ("cached", "exponential", *(("pot",) if num_rows * num_codes <= LARGEST_POT else ())):
                result = METHODS[method](z, c, **settings)
                agreement[method] = 100 * (result.codes == top.indices[:, 0])[decided].float().mean().item()
                errors[method] = result.marginal_error.item()
            # The solver reports the error behind its last update; that of the plan itself is comparable.
            result = sinkhorn_assign(z, c, **settings)
            shares = plan_rows(z, c, result.potentials, result.scale).mean(dim=0)
            errors["cached"] = (shares - 1 / num_codes).abs().sum().item()
            errors = {name: error if math.isfinite(error) else None for name, error in errors.items()}
            size = {"N": num_rows, "K": num_codes, "d": dim, "epsilon": epsilon}
            rows.append({**size, "agreement": agreement, "marginal_error": errors})
            print(rows[-1], flush=True)
    return rows


def measure_busy(turns) -> dict:
    """The small case with another process at work on one of the cores."""
    z, c = points(16384, 1024, 2)
    functions = {m: partial(METHODS[m], z, c, **PAPER) for m in ("cdist_argmin", "cached", "nearest_assign")}
    quiet = side_by_side(functions, turns)
    rival = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        return {"quiet": quiet, "busy": side_by_side(functions, turns)}
    finally:
        rival.kill()
        rival.wait()


def measure_compiled(turns) -> dict:
    """The small case, and the same as one graph of torch.compile."""
    solve = partial(METHODS["cached"], *points(16384, 1024, 2), **PAPER)
    return side_by_side({"eager": solve, "compiled": torch.compile(solve)}, turns)


class PlainSearch(OptVQModelQuantizer):
    def _nearest(self, features, codebook):
        return cdist_argmin(features, codebook)


class Exponential(OptVQModelQuantizer):
    def _transport(self, features, codebook, start):
        return exponential_assign(features, codebook, epsilon=self.epsilon, iterations=self.iterations)


class Guarded(OptVQModelQuantizer):
    def _transport(self, features, codebook, start):
        return guarded_assign(features, codebook, epsilon=self.epsilon, iterations=self.iterations)


def measure_training_step(turns) -> dict:
    """Forward, backward and update of the MNIST recipe with 4 heads: batch 64, 16,384 features, 1,024 codes, d 2."""
    pixels = torch.rand(64, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    errors = {}

    def make_step(name, assignment, kind, **fields):
        torch.manual_seed(0)
        config = OptVQConfig(
            backbone="plain_cnn", image_size=32, num_channels=1, codebook_size=1024, codebook_dim=8,
            num_codebook_heads=4, training_assignment=assignment, **fields,
        )  # fmt: skip
        model = OptVQModel(config).train()
        model.quantizer.__class__ = kind
        optimizer = make_optimizer(model, 2e-3, 0.05, 0.99)

        def step():
            output = model(pixels)
            difference = output.reconstruction - pixels
            error = difference.abs().mean() + difference.square().mean()
            (error + output.loss).backward()
            errors[name] = error.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    warm = {"sinkhorn_warm_start": True, "sinkhorn_iterations": 2}
    variants = [
        ("nearest", "nearest", OptVQModelQuantizer, {}),
        ("nearest, `cdist` + `argmin`", "nearest", PlainSearch, {}),
        ("sinkhorn", "sinkhorn", OptVQModelQuantizer, {}),
        ("sinkhorn, warm start, 2 rounds", "sinkhorn", OptVQModelQuantizer, warm),
        ("exponential", "sinkhorn", Exponential, {}),
        ("exponential, guarded, not in place", "sinkhorn", Guarded, {}),
    ]
    steps = {name: make_step(name, assignment, kind, **fields) for name, assignment, kind, fields in variants}
    return {"seconds": side_by_side(steps, turns), "error": errors}


def exponents(times) -> dict[str, float]:
    """Slopes of the logarithm of the streamed solver's time over log K and log N, where the other sizes are the same.

    Over N, of N >= K: with fewer features than codes every row is a tie, which costs time of its own.
    """
    fits = {}
    for axis, fixed in (("K", ("N", "d")), ("N", ("K", "d"))):
        groups = {}
        for row in times:
            if "streamed" in row["seconds"] and (axis == "K" or row["N"] >= row["K"]):
                groups.setdefault(tuple(row[f] for f in fixed), []).append((row[axis], row["seconds"]["streamed"]))
        sizes, seconds = torch.tensor(max(groups.values(), key=len), dtype=torch.float64).log().unbind(dim=1)
        sizes = sizes - sizes.mean()
        fits[axis] = ((sizes * seconds).sum() / sizes.square().sum()).item()
    return fits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, one turn")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/benchmark_sinkhorn"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--before", type=Path, help="the src folder of a checkout of an earlier version")
    parser.add_argument("--peak-of", nargs=4, metavar=("METHOD", "N", "K", "D"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    turns = 1 if arguments.quick else 5
    is_whole = not (arguments.quick or arguments.peak_of)
    compiled = measure_compiled(turns) if is_whole else None  # first: see add_earlier_methods
    if arguments.before is not None:
        add_earlier_methods(arguments.before)
    if arguments.peak_of:
        print_peak(arguments.peak_of[0], *map(int, arguments.peak_of[1:]))
        return

    cases, memory = (QUICK_CASES, QUICK_MEMORY) if arguments.quick else (CASES, MEMORY)
    flags = []
    if arguments.before is not None:
        cases, memory, flags = beside_earlier(cases), beside_earlier(memory), ["--before", str(arguments.before)]
    times = measure_times(cases, turns)
    sizes = [(256, 64, 8)] if arguments.quick else [(8192, 1024, 8), (16384, 1024, 2)]
    with torch.enable_grad():
        training_step = measure_training_step(turns if arguments.quick else 15)
    torch_version = torch.__version__.split("+")[0]
    results = {
        "machine": f"{os.cpu_count()} {platform.machine()} cores, {arguments.threads} threads, torch {torch_version}",
        "settings": PAPER,
        "times": times,
        "exponents": exponents(times),
        "memory": peak_memory(memory, flags),
        "accuracy": measure_accuracy(sizes, (1.0, 10.0, 30.0, 100.0, 300.0)),
        "busy": measure_busy(turns),
        "compiled": compiled,
        "training_step": training_step,
    }
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.output_dir / "results.md").write_text(markdown(results))
    draw(times, arguments.output_dir / "time.png")
    print(f"\n{markdown(results)}\nwritten to {arguments.output_dir}")


if __name__ == "__main__":
    main()
