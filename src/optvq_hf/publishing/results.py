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


def eval_results_yaml(metrics: dict, dataset_id: str) -> str:
    """The same as a file of the folder `.eval_results`."""
    notes = f"split {metrics['split']}, {metrics['num_images']} images, {metrics['assignment']} codes"
    entries = [
        EvalResultEntry(dataset_id=dataset_id, task_id=f"reconstruction_{key}", value=metrics[key], notes=notes)
        for key in COLUMNS
        if metrics[key] is not None
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)


def check_results(card: ModelCard, metrics: dict | None):
    """Raises ValueError, with the first number that differs, unless the card has the results of `metrics`, and no others."""
    stated = {result.metric_type: result.metric_value for result in card.data.eval_results or ()}
    measured = {key: metrics[key] for key in COLUMNS if metrics[key] is not None} if metrics else {}
    for name in stated.keys() | measured.keys():
        if stated.get(name) != measured.get(name):
            raise ValueError(
                f"the model card's metadata says {name} is {stated.get(name, 'nothing')}, metrics.json "
                f"{measured.get(name, 'nothing')}: {REMEDY}"
            )
    lines = card.content.splitlines()
    for row in results_rows(metrics) if metrics else ():
        if row not in lines:
            raise ValueError(f"the model card lacks the row {row!r} of metrics.json's results: {REMEDY}")


REMEDY = "correct README.md, or write it anew with --card-only"
