"""Writes the report of an evaluation: metrics.json and pictures."""

import json
from pathlib import Path

import torch
import transformers

from ..image_processing_optvq import OptVQImageProcessor
from ..training.checkpoints import write_whole
from .evaluator import Evaluation
from .pictures import save_codebook_usage, save_reconstructions
from .results import METRICS_FILE, RECONSTRUCTIONS_FILE, USAGE_FILE


def make_report(evaluations: dict[str, Evaluation], settings: dict) -> dict:
    """The content of metrics.json: `settings`, the metrics of the first assignment at the top level, those of all under
    "by_assignment", and the versions of torch and transformers. Usage is in percent.

    Args:
        evaluations: By assignment.
        settings: Entries that say what was evaluated (dataset, split, number of images, ...).
    """
    assignment, first = next(iter(evaluations.items()))
    return {
        **settings,
        "assignment": assignment,
        **first.metrics,
        "by_assignment": {name: evaluation.metrics for name, evaluation in evaluations.items()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def write_report(report: dict, first: Evaluation, image_processor: OptVQImageProcessor, folder: Path) -> None:
    """Writes `reconstructions.png` and `codebook_usage.png` of the first assignment, and last `metrics.json`, as a whole.

    Args:
        folder: Made if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_reconstructions(first.originals, first.reconstructions, image_processor, folder / RECONSTRUCTIONS_FILE)
    save_codebook_usage(first.code_counts, folder / USAGE_FILE)
    write_whole(folder / METRICS_FILE, json.dumps(report, indent=2, allow_nan=False) + "\n")
