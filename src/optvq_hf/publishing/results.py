"""Results in a model card: rows of its table, its metadata, and the check that they are those of metrics.json."""

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, eval_result_entries_to_yaml

from ..evaluation.results import COLUMNS


def results_rows(metrics: dict) -> list[str]:
    """A Markdown table, one row per assignment."""
    rows = [
        f"| assignment | {' | '.join(title for title, _ in COLUMNS.values())} |",
        "| - " * (len(COLUMNS) + 1) + "|",
    ]
    for assignment, values in metrics["by_assignment"].items():
        cells = ["-" if values[key] is None else form.format(values[key]) for key, (_, form) in COLUMNS.items()]
        rows.append(f"| {assignment} | {' | '.join(cells)} |")
    return rows


def model_index(metrics: dict, dataset_name: str) -> list[EvalResult]:
    """The results of the first assignment for the card's metadata, unrounded."""
    return [
        EvalResult(
            task_type="image-to-image",
            task_name=f"reconstruction through codes ({metrics['assignment']})",
            dataset_type=dataset_name,
            dataset_name=dataset_name,
            dataset_split=metrics["split"],
            metric_type=key,
            metric_name=title,
            metric_value=metrics[key],
        )
        for key, (title, _) in COLUMNS.items()
        if metrics[key] is not None
    ]


def reported_model_index(reported: dict) -> list[EvalResult]:
    """What the authors of converted weights reported, for the card's metadata, with its source."""
    return [
        EvalResult(
            task_type="image-to-image",
            task_name="reconstruction through codes (sinkhorn)",
            dataset_type=reported["dataset_id"],
            dataset_name=reported["dataset_id"],
            dataset_split="validation",
            metric_type=name,
            metric_name=f"{REPORTED_NAMES[name]}, reported by the authors",
            metric_value=value,
            source_name="reported by the authors",
            source_url=reported["url"],
        )
        for name, value in reported["metrics"].items()
    ]


def reported_eval_results_yaml(reported: dict) -> str:
    """The same as a file of the folder `.eval_results`."""
    source = {"source_url": reported["url"], "source_name": "reported by the authors"}
    entries = [
        EvalResultEntry(reported["dataset_id"], f"reconstruction_{name}", value, notes=reported["protocol"], **source)
        for name, value in reported["metrics"].items()
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)


def eval_results_yaml(metrics: dict, dataset_id: str) -> str:
    """The measured results as a file of the folder `.eval_results`."""
    notes = f"split {metrics['split']}, {metrics['num_images']} images, {metrics['assignment']} codes"
    entries = [
        EvalResultEntry(dataset_id=dataset_id, task_id=f"reconstruction_{key}", value=metrics[key], notes=notes)
        for key in COLUMNS
        if metrics[key] is not None
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)


def check_results(card: ModelCard, metrics: dict | None, reported: dict | None = None):
    """Raises ValueError, with the first number that differs, unless the card has the results on record, and no others.

    Args:
        metrics: What metrics.json holds.
        reported: What the authors of converted weights reported.
    """
    results = card.data.eval_results or ()
    measured = {key: metrics[key] for key in COLUMNS if metrics[key] is not None} if metrics else {}
    stated = {result.metric_type: result.metric_value for result in results if not result.source_url}
    _check_equal(stated, measured, "metrics.json")
    quoted = {result.metric_type: result.metric_value for result in results if result.source_url}
    _check_equal(quoted, reported["metrics"] if reported else {}, "what the authors reported")
    lines = card.content.splitlines()
    for row in results_rows(metrics) if metrics else ():
        if row not in lines:
            raise ValueError(f"the model card lacks the row {row!r} of metrics.json's results: {REMEDY}")


def _check_equal(stated: dict, true: dict, where: str):
    for name in sorted(stated.keys() | true.keys()):
        if stated.get(name) != true.get(name):
            raise ValueError(
                f"the model card's metadata says {name} is {stated.get(name, 'nothing')}, {where} "
                f"{true.get(name, 'nothing')}: {REMEDY}"
            )


REPORTED_NAMES = {"ssim": "SSIM", "psnr": "PSNR dB", "lpips": "LPIPS", "rfid": "rFID"}
REMEDY = "correct README.md, or write it anew with --card-only"
