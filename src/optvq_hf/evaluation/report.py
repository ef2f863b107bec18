"""Writes what an evaluation found: metrics.json for machines, pictures and a table for people."""

import json
from pathlib import Path

import torch
import transformers

from ..image_processing_optvq import OptVQImageProcessor
from .evaluator import Evaluation
from .pictures import save_codebook_usage, save_reconstructions


METRICS_FILE, RECONSTRUCTIONS_FILE, USAGE_FILE = "metrics.json", "reconstructions.png", "codebook_usage.png"

# Key in metrics.json, column title, format.
COLUMNS = {
    "mse": ("MSE [-1, 1]", "{:.4f}"),
    "psnr": ("PSNR dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "codebook_usage": ("usage %", "{:.1f}"),
    "perplexity": ("perplexity", "{:.0f}"),
}


def write_report(
    evaluations: dict[str, Evaluation], image_processor: OptVQImageProcessor, folder: Path, settings: dict
) -> dict:
    """Writes `metrics.json`, `reconstructions.png` and `codebook_usage.png`, the pictures of the first assignment.

    Args:
        evaluations: By assignment.
        folder: Made if missing.
        settings: What was evaluated (dataset, split, number of images, ...); goes to metrics.json as it is.

    Returns:
        What metrics.json holds: `settings`, the metrics of the first assignment at the top level, those of all under
        "by_assignment", and the versions that made them. Usage is in percent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    assignment, first = next(iter(evaluations.items()))
    report = {
        **settings,
        "assignment": assignment,
        **first.metrics,
        "by_assignment": {name: evaluation.metrics for name, evaluation in evaluations.items()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (folder / METRICS_FILE).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    save_reconstructions(first.originals, first.reconstructions, image_processor, folder / RECONSTRUCTIONS_FILE)
    save_codebook_usage(first.code_counts, folder / USAGE_FILE)
    return report


def format_table(by_assignment: dict[str, dict]) -> str:
    """One line per assignment."""
    lines = [" | ".join(["assignment".ljust(10)] + [title.rjust(11) for title, _ in COLUMNS.values()])]
    for assignment, metrics in by_assignment.items():
        cells = ["-" if metrics[key] is None else form.format(metrics[key]) for key, (_, form) in COLUMNS.items()]
        cells = [cell.rjust(11) for cell in cells]
        lines.append(" | ".join([assignment.ljust(10), *cells]))
    return "\n".join(lines)
