"""The report of a comparison, from the files of its runs: tables, the curve over learning rates, reconstructions."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

from ..parsing import parse_json
from ..training.checkpoints import write_whole
from .comparison import OF_ALL, SHOWN, Images, run_name
from .pictures import save_labelled_strips, save_strip
from .rivals import find_rival


IMAGES_FILE, RUNS_FOLDER = "images.safetensors", "runs"
# What results.json has of each run.
NOTED = (
    *("rival", "learning_rate", "seed", "diverged_at", "validation", "test", "train", "curve"),
    *("num_parameters", "seconds", "device", "versions"),
)


# Means over seeds that a row has, beside the errors.
MEANS = ("mse", "psnr", "ssim", "codebook_usage", "perplexity")


def read_runs(folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of all runs in a folder.

    Args:
        settings: What the runs must have in common, with `images_sha256`.

    Raises:
        ValueError: For a file that is no result, or one with other settings or of other images.
    """
    runs = []
    for path in sorted(folder.glob("*.json")):
        try:
            runs.append(parse_json(path.read_text()))
        except ValueError as error:
            raise ValueError(f"{path} is a broken result, remove it to run it again: {error}") from error
        for name in ("images_sha256", *OF_ALL):
            if runs[-1].get(name) != settings.get(name):
                raise ValueError(f"{path} is of another comparison, by its {name}: remove it to run it again")
    return runs


def searched_seeds(runs: list[dict[str, Any]]) -> set[int]:
    """Of the runs of one rival, the seeds of the search over rates: those that the most rates have."""
    counts = Counter(seed for seed, _ in {(run["seed"], run["learning_rate"]) for run in runs})
    return {seed for seed, count in counts.items() if count == max(counts.values())}


def errors_of_rates(runs: list[dict[str, Any]], part: str) -> dict[float, list[float | None]]:
    """Of the runs of one rival, errors by rate, of the seeds of the search; None for a run that diverged."""
    seeds, errors = searched_seeds(runs), {}
    for run in sorted(runs, key=lambda run: (run["learning_rate"], run["seed"])):
        if run["seed"] in seeds:
            errors.setdefault(run["learning_rate"], []).append(run[part]["mse"])
    return errors


def best_rates(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The learning rate of each rival at which the fewest seeds diverged, and of these that with the lowest mean error on the
    validation images, over all seeds that it was run with.

    So a rate that luck made the best of the search loses that place when further seeds fail at it. A rival all of whose runs
    diverged has none.
    """
    best: dict[str, float] = {}
    for rival, of_rival in _grouped(runs, "rival").items():
        places: dict[float, tuple[float, float]] = {}
        for rate, of_rate in _grouped(of_rival, "learning_rate").items():
            errors = [run["validation"]["mse"] for run in of_rate]
            numbers = [error for error in errors if error is not None]
            if numbers:
                places[rate] = (1 - len(numbers) / len(errors), statistics.fmean(numbers))
        if places:
            best[rival] = min(places, key=places.__getitem__)
    return best


def summarise(runs: list[dict[str, Any]], rivals: Sequence[str], codebook_size: int) -> list[dict[str, Any]]:
    """A row for each rival: its results at its best rate, over the seeds that did not diverge, and its errors at all rates."""
    best, of_rivals, rows = best_rates(runs), _grouped(runs, "rival"), []
    for name in rivals:
        of_rival, rival = of_rivals.get(name, []), find_rival(name)
        tried = [run for run in of_rival if run["learning_rate"] == best.get(name)]
        tried.sort(key=lambda run: run["seed"])
        of_best = [run for run in tried if run["test"]["mse"] is not None]
        errors = [run["test"]["mse"] for run in of_best]
        row: dict[str, Any] = {
            "rival": name,
            "title": rival.title,
            "bits_per_token": math.log2(rival.count_tokens(codebook_size)),
            "learning_rate": best.get(name),
            "seeds": [run["seed"] for run in of_best],
            "diverged_seeds": [run["seed"] for run in tried if run not in of_best],
            **{of: _mean([run["test"][of] for run in of_best]) for of in MEANS},
            "mse_of_seeds": errors,
            "mse_standard_error": statistics.stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 else None,
            "held_out_mse": _mean([run["validation"]["mse"] for run in of_best]),
            "held_out_usage": _mean([run["validation"]["codebook_usage"] for run in of_best]),
            "train_mse": _mean([run["train"]["mse"] for run in of_best]),
            "seconds": statistics.median(run["seconds"] for run in of_best) if of_best else None,
            "devices": sorted({run["device"] for run in of_best}),
            "mse_of_rates": {repr(rate): errors for rate, errors in errors_of_rates(of_rival, "test").items()},
        }
        rows.append(row)
    return rows


def tables(rows: list[dict[str, Any]]) -> str:
    """Both tables in Markdown: each rival at its best rate, and its error at every rate."""
    lines = [
        "| quantizer | bits | best rate | MSE | +- | PSNR | SSIM | usage % | perplexity "
        "| held-out MSE | held-out usage % | train MSE | seeds |",
        "| - " * 13 + "|",
    ]
    for row in rows:
        digits = {"mse_standard_error": 4, "psnr": 2, "ssim": 3, "codebook_usage": 1, "perplexity": 0}
        digits |= {"held_out_mse": 4, "held_out_usage": 1, "train_mse": 4}
        cells = [row["title"], f"{row['bits_per_token']:.2f}", str(row["learning_rate"] or "-"), error_cell(row)]
        cells += [number_cell(row[name], places) for name, places in digits.items()]
        cells.append(str(len(row["seeds"]) + len(row["diverged_seeds"])))
        lines.append(f"| {' | '.join(cells)} |")
    rates = sorted({rate for row in rows for rate in row["mse_of_rates"]}, key=float)
    lines += ["", f"| MSE at rate | {' | '.join(rates)} |", "| - " * (len(rates) + 1) + "|"]
    for row in rows:
        cells = [row["title"], *(_mean_cell(row["mse_of_rates"].get(rate, [])) for rate in rates)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def error_cell(row: dict[str, Any]) -> str:
    """The error of a row at its best rate: `0.0123`, `0.0123 (1 of 3)` if two seeds diverged, `diverged` or `not run`."""
    if row["learning_rate"] is None:
        return "diverged" if row["mse_of_rates"] else "not run"
    return _mean_cell([*row["mse_of_seeds"], *[None] * len(row["diverged_seeds"])])


def number_cell(number: float | None, places: int) -> str:
    """A number, or `-` where there is none."""
    return "-" if number is None else f"{number:.{places}f}"


def different_versions(runs: list[dict[str, Any]]) -> str:
    """A sentence about libraries of which the runs had several versions; empty if there is none."""
    found: dict[str, set[str]] = {}
    for run in runs:
        for library, version in run["versions"].items():
            found.setdefault(library, set()).add(version)
    mixed = [f"{library} {', '.join(sorted(versions))}" for library, versions in found.items() if len(versions) > 1]
    return f"Runs had different versions: {'; '.join(mixed)}." if mixed else ""


def write_comparison(folder: Path, runs: list[dict[str, Any]], rivals: Sequence[str], settings: dict[str, Any]) -> str:
    """Writes results.json, results.md, rates.png and reconstructions.png to the folder; returns the tables.

    Args:
        folder: Its `images.safetensors` are the images, and `runs` holds a picture of each run.
        rivals: Those that come first; others of which there are runs follow.
        settings: Of all runs, for results.json.
    """
    rivals = list(dict.fromkeys([*rivals, *(run["rival"] for run in runs)]))
    rows = summarise(runs, rivals, settings["codebook_size"])
    shown = "\n\n".join(part for part in (tables(rows), different_versions(runs)) if part)
    short = [{name: run[name] for name in NOTED} for run in runs]
    write_whole(folder / "results.json", to_json({"settings": settings, "rows": rows, "runs": short}) + "\n")
    write_whole(folder / "results.md", shown + "\n")
    draw_rates(rows, folder / "rates.png")
    originals = folder / ".originals.png"
    save_strip(Images.load(folder / IMAGES_FILE, torch.device("cpu")).test[:SHOWN], originals)
    strips = [("originals", Image.open(originals).copy())]
    originals.unlink()
    for row in rows:
        names = [run_name(row["rival"], row["learning_rate"], seed) for seed in row["seeds"]]
        paths = [path for name in names if (path := folder / RUNS_FOLDER / f"{name}.png").is_file()]
        if paths:
            strips.append((f"{row['title']}\nMSE {row['mse']:.4f}", Image.open(paths[0]).copy()))
    save_labelled_strips(strips, folder / "reconstructions.png")
    return shown


def to_json(results: dict[str, Any]) -> str:
    """Indented, but every run and every row of the curves in one line."""
    parts = [f' "{name}": {json.dumps(value)}' for name, value in results.items() if not isinstance(value, list)]
    for name, value in results.items():
        if isinstance(value, list):
            parts.append(f' "{name}": [\n' + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n ]")
    return "{\n" + ",\n".join(parts) + "\n}"


def draw_rates(rows: list[dict[str, Any]], path: Path) -> None:
    """Error of every rival over the learning rate; crosses at the top are rates at which all runs diverged."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(row for row in rows if row["mse_of_rates"]):
        errors = {float(rate): [e for e in of_rate if e is not None] for rate, of_rate in row["mse_of_rates"].items()}
        rates = [rate for rate, found in errors.items() if found]
        means = [statistics.fmean(errors[rate]) for rate in rates]
        color, marker = f"C{number % 10}", "os^DvPX"[number % 7]  # of 70 lines, no two look alike
        style = "-" if row["rival"].startswith(("transport", "default")) else "--"
        axes.plot(rates, means, color=color, marker=marker, linestyle=style, label=row["title"])
        diverged = [rate for rate, found in errors.items() if not found]
        at_top = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(diverged, [1.0] * len(diverged), "x", color=color, **at_top)
    axes.set(
        xscale="log", yscale="log", xlabel="peak learning rate", ylabel="MSE on [-1, 1], test images (x: diverged)"
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _mean_cell(errors: list[float | None]) -> str:
    found = [error for error in errors if error is not None]
    if not found:
        return "diverged" if errors else "not run"
    part = f" ({len(found)} of {len(errors)})" if len(found) < len(errors) else ""
    return f"{statistics.fmean(found):.4f}{part}"


def _mean(numbers: list[float | None]) -> float | None:
    """The mean; None if there is no number, or one that is not known."""
    known = [number for number in numbers if number is not None]
    return statistics.fmean(known) if known and len(known) == len(numbers) else None


def _grouped(runs: list[dict[str, Any]], name: str) -> dict[Any, list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run[name], []).append(run)
    return groups
