"""Writes the report of an evaluation: metrics.json and pictures."""

import json
from pathlib import Path

import torch
import transformers

from ..image_processing_optvq import OptVQImageProcessor
from .evaluator import Evaluation
from .pictures import save_codebook_usage, save_reconstructions
from .results import METRICS_FILE, RECONSTRUCTIONS_FILE, USAGE_FILE


def write_report(
    evaluations: dict[str, Evaluation], image_processor: OptVQImageProcessor, folder: Path, settings: dict
) -> dict:
    """Writes `metrics.json`, `reconstructions.png` and `codebook_usage.png`, the pictures of the first assignment.

    Args:
        evaluations: By assignment.
        folder: Made if missing.
        settings: Entries of metrics.json that say what was evaluated (dataset, split, number of images, ...).

    Returns:
        The content of metrics.json: `settings`, the metrics of the first assignment at the top level, those of all under
        "by_assignment", and the versions of torch and transformers. Usage is in percent.
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
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    save_reconstructions(first.originals, first.reconstructions, image_processor, folder / RECONSTRUCTIONS_FILE)
    save_codebook_usage(first.code_counts, folder / USAGE_FILE)
    (folder / METRICS_FILE).write_text(text)  # last: it says whose the pictures are
    return report
