"""Writes the report of an evaluation: metrics.json and pictures; of several models, the table of all."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from ..image_processing_optvq import OptVQImageProcessor
from ..training.checkpoints import write_whole
from .evaluator import Evaluation
from .pictures import save_codebook_usage, save_reconstructions
from .results import EXAMPLES_FILE, METRICS_FILE, RECONSTRUCTIONS_FILE, USAGE_FILE
from .tables import STYLES, Row, format_table


# Entries of metrics.json that say how images were encoded; which images, and which model, is said by digests of their own.
HOW = ("protocol", "batch_size", "dtype")


def make_report(evaluations: dict[str, Evaluation], settings: dict) -> dict:
    """The content of metrics.json: `settings`, the metrics of the first assignment at the top level, those of all under
    "by_assignment", the conventions of the metrics, digests, and the versions of torch and transformers. Usage is in percent.

    Args:
        evaluations: By assignment.
        settings: Entries that say what was evaluated (dataset, split, number of images, ...).
    """
    assignment, first = next(iter(evaluations.items()))
    how = {name: settings.get(name) for name in HOW} | {"assignments": [*evaluations], "conventions": first.conventions}
    return {
        **settings,
        "images_sha256": first.images_digest,
        "settings_sha256": hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest(),
        "assignment": assignment,
        **first.metrics,
        "by_assignment": {name: evaluation.metrics for name, evaluation in evaluations.items()},
        "conventions": first.conventions,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def write_report(report: dict, first: Evaluation, image_processor: OptVQImageProcessor, folder: Path) -> None:
    """Writes the pictures of the first assignment, and last `metrics.json`, as a whole.

    Args:
        folder: Made if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_reconstructions(first.originals, first.reconstructions, image_processor, folder / RECONSTRUCTIONS_FILE)
    originals, reconstructions = first.examples
    save_reconstructions(originals, reconstructions, image_processor, folder / EXAMPLES_FILE, len(originals) // 3)
    save_codebook_usage(first.code_counts, folder / USAGE_FILE)
    write_whole(folder / METRICS_FILE, json.dumps(report, indent=2, allow_nan=False) + "\n")


def write_tables(rows: Sequence[Row], metrics: Sequence[str], folder: Path) -> None:
    """Writes `table.txt`, `table.md` and `table.tex`, each as a whole."""
    for style, ending in STYLES.items():
        write_whole(folder / f"table.{ending}", format_table(rows, metrics, style) + "\n")
