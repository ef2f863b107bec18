"""The report of a comparison, from the files of its runs: tables, the curve over learning rates, reconstructions."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

from ..parsing import parse_json
from ..training.checkpoints import write_whole
from .comparison import SHOWN, Images, RunSettings
from .pictures import save_labelled_strips, save_strip
from .rivals import find_rival


IMAGES_FILE, RUNS_FOLDER = "images.safetensors", "runs"
# What results.json has of each run.
NOTED = (
    *("rival", "learning_rate", "seed", "diverged_at", "validation", "test", "train", "curve"),
    *("num_parameters", "seconds", "device", "versions"),
)


def read_runs(folder: Path, wanted: Iterable[RunSettings] | None = None) -> list[dict[str, Any]]:
    """The results of runs; by default of all in the folder.

    Raises:
        ValueError: For a file that is no result.
    """
    names = {f"{settings.name}.json" for settings in wanted} if wanted is not None else None
    paths = [path for path in sorted(folder.glob("*.json")) if names is None or path.name in names]
    try:
        return [parse_json(path.read_text()) for path in paths]
    except ValueError as error:
        raise ValueError(f"{folder} holds a broken result, remove it to run it again: {error}") from error


def best_rates(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The learning rate of each rival with the lowest error on the validation images, over the seeds that all rates have."""
    best: dict[str, float] = {}
    for rival, of_rival in _grouped(runs, "rival").items():
        by_rate = _grouped(of_rival, "learning_rate")
        common = set.intersection(*({run["seed"] for run in of_rate} for of_rate in by_rate.values()))
        errors = {}
        for rate, of_rate in by_rate.items():
            found = [run["validation"]["mse"] for run in of_rate if run["seed"] in common]
            if found and None not in found:
                errors[rate] = statistics.fmean(found)
        if errors:
            best[rival] = min(errors, key=errors.__getitem__)
    return best


def summarise(runs: list[dict[str, Any]], rivals: list[str]) -> list[dict[str, Any]]:
    """A row for each rival: its results at its best rate, over the seeds that did not diverge, and its errors at all rates."""
    best, rows = best_rates(runs), []
    for rival in rivals:
        of_rival = [run for run in runs if run["rival"] == rival]
        if rival not in best:
            continue
        tried = sorted((run for run in of_rival if run["learning_rate"] == best[rival]), key=lambda run: run["seed"])
        of_best = [run for run in tried if run["test"]["mse"] is not None]
        row: dict[str, Any] = {"rival": rival, "title": find_rival(rival).title, "learning_rate": best[rival]}
        row["seeds"] = [run["seed"] for run in of_best]
        row["diverged_seeds"] = [run["seed"] for run in tried if run not in of_best]
        for name in ("mse", "psnr", "ssim", "codebook_usage", "perplexity"):
            row[name] = statistics.fmean(run["test"][name] for run in of_best)
        errors = [run["test"]["mse"] for run in of_best]
        row["mse_of_seeds"] = errors
        row["mse_standard_error"] = statistics.stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 else None
        row["train_mse"] = statistics.fmean(run["train"]["mse"] for run in of_best)
        row["seconds"] = statistics.median(run["seconds"] for run in of_best)
        row["devices"] = sorted({run["device"] for run in of_best})
        by_rate = _grouped(of_rival, "learning_rate")
        row["mse_of_rates"] = {
            f"{rate:g}": [run["test"]["mse"] for run in of_rate] for rate, of_rate in sorted(by_rate.items())
        }
        rows.append(row)
    return rows


def tables(rows: list[dict[str, Any]]) -> str:
    """Both tables in Markdown: each rival at its best rate, and its error at every rate."""
    lines = [
        "| quantizer | best rate | MSE | +- | PSNR | SSIM | usage % | perplexity | train MSE | seeds | s |",
        "| - " * 11 + "|",
    ]
    for row in rows:
        error = f"{row['mse_standard_error']:.4f}" if row["mse_standard_error"] is not None else "-"
        cells = [row["title"], f"{row['learning_rate']:g}", f"{row['mse']:.4f}", error, f"{row['psnr']:.2f}"]
        cells += [f"{row['ssim']:.3f}", f"{row['codebook_usage']:.1f}", f"{row['perplexity']:.0f}"]
        cells += [f"{row['train_mse']:.4f}", _number_of_seeds(row), f"{row['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    rates = sorted({rate for row in rows for rate in row["mse_of_rates"]}, key=float)
    lines += ["", f"| MSE at rate | {' | '.join(rates)} |", "| - " * (len(rates) + 1) + "|"]
    for row in rows:
        cells = [row["title"], *(_mean_or_dash(row["mse_of_rates"].get(rate)) for rate in rates)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_comparison(folder: Path, runs: list[dict[str, Any]], rivals: list[str], settings: dict[str, Any]) -> str:
    """Writes results.json, results.md, rates.png and reconstructions.png to the folder; returns the tables.

    Args:
        folder: Its `images.safetensors` are the images, and `runs` holds a picture of each run.
        settings: Of all runs, for results.json.

    Raises:
        ValueError: If every run diverged.
    """
    rows = summarise(runs, rivals)
    if not rows:
        raise ValueError(f"every run in {folder} diverged: try lower --learning-rates")
    shown = tables(rows)
    short = [{name: run[name] for name in NOTED} for run in runs if run["rival"] in rivals]
    write_whole(folder / "results.json", to_json({"settings": settings, "rows": rows, "runs": short}) + "\n")
    write_whole(folder / "results.md", shown + "\n")
    draw_rates(rows, folder / "rates.png")
    originals = folder / ".originals.png"
    save_strip(Images.load(folder / IMAGES_FILE, torch.device("cpu")).test[:SHOWN], originals)
    strips = [("originals", Image.open(originals).copy())]
    originals.unlink()
    for row in rows:
        name = f"{row['rival']}-lr{row['learning_rate']:g}-seed{row['seeds'][0]}.png"
        strips.append((f"{row['title']}\nMSE {row['mse']:.4f}", Image.open(folder / RUNS_FOLDER / name).copy()))
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
    """Error of every rival over the learning rate; a gap is a run that diverged."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(rows):
        errors = {float(rate): [e for e in of_rate if e is not None] for rate, of_rate in row["mse_of_rates"].items()}
        rates = [rate for rate, found in errors.items() if found]
        means = [statistics.fmean(errors[rate]) for rate in rates]
        style = "-" if row["rival"].startswith(("transport", "default")) else "--"
        axes.plot(rates, means, style, marker="os^Dv"[number % 5], label=row["title"])
    axes.set(xscale="log", yscale="log", xlabel="peak learning rate", ylabel="MSE on [-1, 1], test images")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _number_of_seeds(row: dict[str, Any]) -> str:
    number, diverged = len(row["seeds"]), len(row["diverged_seeds"])
    return f"{number} of {number + diverged}" if diverged else str(number)


def _mean_or_dash(errors: list[float | None] | None) -> str:
    found = [error for error in errors or () if error is not None]
    return f"{statistics.fmean(found):.4f}" if found else "-"


def _grouped(runs: list[dict[str, Any]], name: str) -> dict[Any, list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run[name], []).append(run)
    return groups
