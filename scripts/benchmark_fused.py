"""Measures the fused solver on a GPU beside what it competes with, all in one run.

    python scripts/benchmark_fused.py --output-dir runs/fused            # a few minutes
    python scripts/benchmark_fused.py --output-dir runs/fused --quick    # a minute, small sizes
    python scripts/benchmark_fused.py --output-dir runs/fused --tune     # a minute: sizes of tiles, for sinkhorn_blocks.py

Whole assignments (5 rounds, epsilon 10, z-score) with Triton's kernels and in torch; nearest codes with both and by
torch.cdist(...).argmin(1); each pass of the fused solver alone; how exact it is beside float64; and whether the rounds wait for
the device. Times are medians by CUDA events; memory is the peak beyond the inputs. A case that fails is reported, and the
others go on. Writes fused.json and fused.md, which keep what other runs with the same folder measured.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from optvq_hf.costs import Points
from optvq_hf.distances import Distances
from optvq_hf.sinkhorn import _iterate, nearest_assign, potentials_assign, sinkhorn_assign
from optvq_hf.sinkhorn_blocks import Blocks, Method, candidates, default_blocks, default_method
from optvq_hf.sinkhorn_fused import FusedRows, Tiles, decided_codes
from optvq_hf.sinkhorn_kernels import top_two_kernel
from optvq_hf.solver_inputs import log_target


PAPER = {"epsilon": 10.0, "iterations": 5, "normalization": "zscore"}
CASES = [
    (16384, 1024, 8),
    (16384, 4096, 4),
    (32768, 16384, 8),
    (32768, 16384, 16),
    (32768, 16384, 64),
    (32768, 16384, 256),
    (65536, 65536, 8),
]
QUICK_CASES = [(16384, 1024, 8), (32768, 16384, 8), (32768, 16384, 64)]
PRODUCTS: tuple[Method, ...] = ("ieee", "bf16x6")
QUICK_WIDTHS = (1, 8, 64, 256)
PRECISE_WIDTHS = (1, 2, 3, 8, 16, 32, 64, 100, 256, 768)


def points(num_rows: int, num_codes: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    return tuple(torch.randn(n, width, generator=generator, device="cuda") for n in (num_rows, num_codes))


def milliseconds(function: Callable[[], Any], repeats: int = 11) -> float:
    """Median time on the device."""
    for _ in range(2):
        function()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def peak_megabytes(function: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def attempt(results: dict[str, Any], name: str, measure: Callable[[], Any]) -> None:
    """Adds a figure, or what went wrong in its place."""
    try:
        results[name] = measure()
    except Exception as error:
        results[name] = f"failed: {type(error).__name__}: {str(error)[:300]}"
        traceback.print_exc()
    torch.cuda.empty_cache()
    print(f"    {name}: {results[name]}", flush=True)


# ---- what is measured ------------------------------------------------------------------------------------------------


def time_methods(features: torch.Tensor, codebook: torch.Tensor, repeats: int) -> dict[str, Any]:
    solution = sinkhorn_assign(features, codebook, solver="torch", **PAPER)
    stored = solution.potentials, solution.scale
    methods = {
        "sinkhorn fused": lambda: sinkhorn_assign(features, codebook, solver="fused", **PAPER),
        "sinkhorn torch": lambda: sinkhorn_assign(features, codebook, solver="torch", **PAPER),
        "nearest fused": lambda: nearest_assign(features, codebook, solver="fused"),
        "nearest torch": lambda: nearest_assign(features, codebook, solver="torch"),
        "potentials fused": lambda: potentials_assign(features, codebook, *stored, solver="fused"),
        "potentials torch": lambda: potentials_assign(features, codebook, *stored, solver="torch"),
        "cdist + argmin": lambda: torch.cdist(features, codebook).argmin(1),
    }
    results: dict[str, Any] = {}
    for name, method in methods.items():
        attempt(results, f"{name} (ms)", lambda method=method: milliseconds(method, repeats))
        attempt(results, f"{name} (MB)", lambda method=method: peak_megabytes(method))
    return results


def time_passes(features: torch.Tensor, codebook: torch.Tensor, repeats: int) -> dict[str, Any]:
    """Of FusedRows: each of its passes, and the two halves of a round."""
    results: dict[str, Any] = {}
    distances = Distances(Points(features, codebook))
    with FusedRows(distances) as rows:
        attempt(results, "statistics (ms)", lambda: milliseconds(rows.statistics, repeats))
        statistics_ = rows.statistics()
        deviation = (statistics_.squared_deviations / (statistics_.count - 1)).sqrt()
        rows.set_scale((PAPER["epsilon"] / deviation).float())
        g = log_target(None, codebook) - rows.log_column_sums()
        for _ in range(3):
            g = g - (rows.log_mass(g) - rows.log_num_rows - log_target(None, codebook))
        tiles, factor = rows._tiles, rows._factor
        weights = tiles.codes.weights(g.float())
        of_rows = tiles.balancing_weights(tiles.features, tiles.codes, weights, factor)
        passes = {
            "rows": lambda: tiles.balancing_weights(tiles.features, tiles.codes, weights, factor),
            "columns": lambda: tiles.log_sums(tiles.codes, tiles.features, of_rows, weights, factor),
            "log_column_sums": rows.log_column_sums,
            "log_mass": lambda: rows.log_mass(g),
            "top_two": lambda: tiles.top_two(weights, factor),
            "top_two, nearest": lambda: tiles.top_two(weights, factor, root=False),
            "most_likely": lambda: rows.most_likely(g),
            "packing": lambda: FusedRows(distances),
            "rounds": lambda: _iterate(rows, log_target(None, codebook), 5),
        }
        for name, function in passes.items():
            attempt(results, f"{name} (ms)", lambda function=function: milliseconds(function, repeats))
        tie = 16 * torch.finfo(torch.float32).eps * (1 + rows._scaled_nearest)
        potentials = rows._centred(g)

        def open_share(*arguments: Any) -> float:
            return 100 * (1 - decided_codes(Points(features, codebook), *arguments)[1].float().mean().item())

        attempt(results, "open rows, most_likely (%)", lambda: open_share(potentials, rows._scale, tie))
        attempt(results, "open rows, nearest (%)", open_share)
        attempt(results, "rounds without waiting for the device", lambda: runs_ahead(rows, codebook))
    return results


def runs_ahead(rows: FusedRows, codebook: torch.Tensor) -> bool:
    """Whether nothing in the rounds makes the host wait for the device; what does, raises."""
    target = log_target(None, codebook)
    _iterate(rows, target, 2)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows.set_scale(rows._scale)
        _iterate(rows, target, 5)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return True


def compare_with_float64(width: int) -> dict[str, Any]:
    """Largest differences of potentials and of log masses to float64, and codes that differ from torch's."""
    features, codebook = points(8192, 1024, width)
    results: dict[str, Any] = {}
    exact = sinkhorn_assign(features.double(), codebook.double(), **PAPER)
    for solver in ("fused", "torch"):

        def difference(solver: str = solver) -> float:
            found = sinkhorn_assign(features, codebook, solver=solver, **PAPER)
            return (found.potentials.double() - exact.potentials).abs().max().item()

        attempt(results, f"potentials, {solver}", difference)
    scores = -exact.scale * torch.cdist(features.double(), codebook.double())
    g = exact.potentials
    mass = (scores + g).log_softmax(1).logsumexp(0)

    def mass_error(method: Method) -> float:
        with FusedRows(Distances(Points(features, codebook)), method=method) as rows:
            rows.statistics()
            rows.set_scale(exact.scale.float())
            return (rows.log_mass(g) - mass).abs().max().item()

    for method in methods_of(width):
        attempt(results, f"log_mass, {method}", partial(mass_error, method))
        attempt(results, f"squares, {method} (u)", partial(square_error, features, codebook, method))

    def other_codes(assign: Callable[..., torch.Tensor], *arguments: Any) -> int:
        ours, theirs = (assign(features, codebook, *arguments, solver=s) for s in ("fused", "torch"))
        return (ours != theirs).sum().item()

    attempt(results, "other nearest codes", lambda: other_codes(nearest_assign))
    attempt(
        results,
        "other codes by potentials",
        lambda: other_codes(potentials_assign, exact.potentials.float(), exact.scale.float()),
    )
    attempt(results, "other codes", lambda: other_codes(lambda z, c, solver: solve(z, c, solver)))
    attempt(results, "repeats", lambda: torch.equal(*(solve(features, codebook, "fused", 1) for _ in range(2))))
    return results


def solve(features: torch.Tensor, codebook: torch.Tensor, solver: str, index: int = 0) -> torch.Tensor:
    return sinkhorn_assign(features, codebook, solver=solver, **PAPER)[index]


def square_error(features: torch.Tensor, codebook: torch.Tensor, method: Method) -> float:
    """Largest error of the smallest squared distances, in units of u (||z||^2 + ||c||^2) with u = 2^-24."""
    tiles = Tiles(features, codebook, method=method)
    ones = torch.ones((), device="cuda")
    arguments = (tiles.features, tiles.codes, tiles.codes.zeros, ones, [torch.float32, torch.int32, torch.float32])
    best, index, _ = tiles._launch(top_two_kernel, "top_two", *arguments, root=False)
    found, split = best[:, : len(features)].max(dim=0, keepdim=True)
    found, codes = found[0], index.gather(0, split)[0].long()
    z, c = features.double(), codebook.double()[codes]
    origin = codebook[:: max(1, len(codebook) // 256)].median(dim=0).values.double()
    squares = (z - origin).square().sum(1) + (c - origin).square().sum(1)
    return ((-found.double() - (z - c).square().sum(1)).abs() / (2**-24 * squares)).max().item()


# ---- sizes of tiles --------------------------------------------------------------------------------------------------


def compile_ahead(jobs: list[tuple[int, Method, Blocks | None]]) -> None:
    """Fills Triton's cache on the disk, in as many processes as there are cores."""
    processes = max(1, min(12, (os.cpu_count() or 2) - 2, len(jobs)))
    start = time.perf_counter()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_tiles, jobs, chunksize=2))
    print(f"compiled {len(jobs)} tiles in {time.perf_counter() - start:.0f} s", flush=True)


def compile_tiles(job: tuple[int, Method, Blocks | None]) -> None:
    width, method, blocks = job
    names = ("log_sums", "top_two", "moments")
    tiles = Tiles(*points(512, 512, width), dict.fromkeys(names, blocks) if blocks else None, method)
    number, weights = torch.ones((), device="cuda"), tiles.codes.zeros
    functions = [
        lambda: tiles.balancing_weights(tiles.features, tiles.codes, weights, number),
        lambda: tiles.top_two(weights, number),
        lambda: tiles.moments(number),
    ]
    if blocks is None:  # in use, not for a comparison
        functions += [
            lambda: tiles.log_sums(tiles.features, tiles.codes, weights, tiles.features.zeros, number),
            lambda: tiles.top_two(weights, number, root=False),
        ]
    for function in functions:
        try:
            function()
        except Exception as error:
            print(f"{job}: {type(error).__name__}: {str(error)[:100]}", flush=True)


def methods_of(width: int) -> tuple[Method, ...]:
    return ("direct", *PRODUCTS) if width <= 16 else PRODUCTS


def jobs_of_tuning(widths: list[int]) -> list[tuple[int, Method, Blocks | None]]:
    """Without "ieee", which is for devices that have nothing faster."""
    methods = {width: [method for method in methods_of(width) if method != "ieee"] for width in widths}
    return [(w, method, blocks) for w in widths for method in methods[w] for blocks in candidates(w, method)]


def tune(jobs: list[tuple[int, Method, Blocks | None]], num_rows: int, num_codes: int) -> list[dict[str, Any]]:
    """Times of the kernels at some sizes of tiles."""
    found: list[dict[str, Any]] = []
    for width, method, blocks in jobs:
        assert blocks is not None
        found.append({"width": width, "method": method, **blocks._asdict()})
        tiles = Tiles(*points(num_rows, num_codes, width), dict.fromkeys(TUNED.values(), blocks), method)
        factor, codes, rows = torch.full((), 10.0, device="cuda"), tiles.codes.zeros, tiles.features.zeros
        passes = {
            "rows": partial(tiles.balancing_weights, tiles.features, tiles.codes, codes, factor),
            "columns": partial(tiles.balancing_weights, tiles.codes, tiles.features, rows, factor),
            "top_two": partial(tiles.top_two, codes, factor),
            "moments": partial(tiles.moments, factor),
        }
        for name, function in passes.items():
            try:
                found[-1][name] = milliseconds(function, 3)
            except Exception as error:
                found[-1][name] = f"failed: {type(error).__name__}: {str(error)[:100]}"
        print(*found[-1].values(), flush=True)
    return found


TUNED = {"rows": "log_sums", "columns": "log_sums", "top_two": "top_two", "moments": "moments"}


def fastest(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each width and pass: the fastest tiles of each method, and the default."""
    lines = []
    for width in dict.fromkeys(row["width"] for row in found):
        for name, kernel in TUNED.items():
            line: dict[str, Any] = {"width": width, "pass": name}
            rows = [row for row in found if row["width"] == width and isinstance(row[name], float)]
            for method in dict.fromkeys(row["method"] for row in rows):
                best = min((row for row in rows if row["method"] == method), key=lambda row: row[name])
                line[method] = f"{best[name]:.3f} {blocks_of(best)}"
            method = default_method(width, has_units=True)
            blocks = default_blocks(kernel, width, method, large_tiles=True)
            time = next(
                (r[name] for r in rows if r["method"] == method and blocks_of(r) == blocks_of(blocks._asdict())), ""
            )
            line["default"] = f"{time if time == '' else f'{time:.3f}'} {method} {blocks_of(blocks._asdict())}"
            lines.append(line)
    return lines


def blocks_of(row: dict[str, Any]) -> str:
    return "{outer}x{inner}x{depth} w{num_warps} s{num_stages}".format(**row)


# ---- the report ------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cell = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)  # noqa: E731
    lines = [names, ["---"] * len(names), *([cell(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def environment() -> dict[str, str]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "multiprocessors": str(properties.multi_processor_count),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="Small sizes: whether everything runs")
    parser.add_argument("--tune", action="store_true", help="Only times of the kernels at some sizes of tiles")
    parser.add_argument("--tune-widths", type=int, nargs="+", default=[64, 8, 16])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(message="There is no GPU here: nothing to measure.\n")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    report = arguments.output_dir / "fused.json"
    sections: dict[str, list[dict[str, Any]]] = json.loads(report.read_text()) if report.exists() else {}
    sections["environment"] = [environment()]
    print(sections["environment"][0], flush=True)

    def write() -> None:
        report.write_text(json.dumps(sections, indent=1))
        text = "\n\n".join(f"## {title}\n\n{table(rows)}" for title, rows in sections.items())
        report.with_suffix(".md").write_text(text + "\n")

    if arguments.tune:
        compile_ahead(jobs_of_tuning(arguments.tune_widths))
        sections["tiles"] = []
        for width in arguments.tune_widths:
            size = (8192, 4096) if arguments.quick else (32768, 16384)
            sections["tiles"] += tune(jobs_of_tuning([width]), *size)
            sections["fastest tiles"] = fastest(sections["tiles"])
            write()
        print(table(sections["fastest tiles"]))
        return
    cases, widths = (QUICK_CASES, QUICK_WIDTHS) if arguments.quick else (CASES, PRECISE_WIDTHS)
    compile_ahead([(width, method, None) for width in widths for method in methods_of(width)])
    for title, measure, inputs in (
        ("exactness", compare_with_float64, [(w,) for w in widths]),
        ("methods", time_methods, cases),
        ("passes", time_passes, cases),
    ):
        rows = sections[title] = []
        for case in inputs:
            print(title, case, flush=True)
            row: dict[str, Any] = {"width": case[0]} if len(case) == 1 else dict(zip("NKd", case))
            rows.append(row)
            try:
                row |= measure(*case) if len(case) == 1 else measure(*points(*case), 5 if arguments.quick else 11)
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
                traceback.print_exc()
            torch.cuda.empty_cache()
            write()
    print(report.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
