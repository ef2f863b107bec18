"""Results in a model card: its table, its metadata, and the check that both state the results on record."""

import re

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, eval_result_entries_to_yaml

from ..evaluation.protocols import METRICS, columns_of
from ..evaluation.results import COLUMNS


REPORTED_COLUMNS = {
    "ssim": ("SSIM", "{:.3f}"),
    "psnr": ("PSNR dB", "{:.2f}"),
    "lpips": ("LPIPS", "{:.3f}"),
    "rfid": ("rFID", "{:.2f}"),
}
REMEDY = "correct README.md, or rewrite it with --card-only"


# ---- measured here ---------------------------------------------------------------------------------------------------


def measured_metrics(metrics: dict) -> list[str]:
    """The metrics of images that any assignment was measured with, in the order of their tables.

    Without Frechet distances of networks that the user named: a name may be a folder, and the published record has none.
    """
    by_assignment = metrics["by_assignment"].values()
    return [name for name in METRICS if any(name in values for values in by_assignment)]


def results_rows(metrics: dict) -> list[str]:
    """The results as a Markdown table, one row per assignment."""
    by_assignment, columns = metrics["by_assignment"], _columns(metrics)
    rows = [_row(["assignment", *(title for title, _ in columns.values())]), _row(["-"] * (len(columns) + 1))]
    for assignment, values in by_assignment.items():
        cells = ["-" if values.get(key) is None else form.format(values[key]) for key, (_, form) in columns.items()]
        rows.append(_row([assignment, *cells]))
    return rows


def head_rows(metrics: dict) -> list[str]:
    """How the first assignment uses each code of a token, as a Markdown table; empty with one code or without these records."""
    figures = [metrics.get(f"{name}_per_head", ()) for name in ("codebook_usage", "perplexity", "entropy")]
    if len(figures[0]) < 2:
        return []
    rows = [_row(["code of a token", "usage %", "perplexity", "entropy in bits"]), _row(["-"] * 4)]
    for number, (usage, perplexity, entropy) in enumerate(zip(*figures), start=1):
        rows.append(_row([f"{number}", f"{usage:.1f}", f"{perplexity:.0f}", f"{entropy:.2f}"]))
    return rows


def level_rows(metrics: dict) -> list[str]:
    """Results of the first assignment from the first levels alone, as a Markdown table; empty with one level."""
    if "mse_per_level" not in metrics:
        return []
    columns = [metrics[f"{key}_per_level"] for key in ("mse", "psnr", "codebook_usage", "perplexity")]
    forms = [COLUMNS[key] for key in ("mse", "psnr", "codebook_usage", "perplexity")]
    rows = [_row(["levels", *(title for title, _ in forms)]), _row(["-"] * 5)]
    for level, values in enumerate(zip(*columns), start=1):
        rows.append(_row([f"{level}", *(form.format(value) for value, (_, form) in zip(values, forms))]))
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
        for key, (title, _) in _columns(metrics).items()
        if metrics.get(key) is not None
    ]


def eval_results_yaml(metrics: dict, dataset_id: str) -> str:
    """The same results as a file of the folder `.eval_results`."""
    notes = f"split {metrics['split']}, {metrics['num_images']} images, {metrics['assignment']} codes"
    entries = [
        EvalResultEntry(dataset_id=dataset_id, task_id=f"reconstruction_{key}", value=metrics[key], notes=notes)
        for key in _columns(metrics)
        if metrics.get(key) is not None
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)


def _columns(metrics: dict) -> dict[str, tuple[str, str]]:
    """Key, title and format of the metrics that were measured, then usage and perplexity."""
    measured = measured_metrics(metrics)
    return {name: column for name, column in columns_of(measured).items() if name in (*measured, *COLUMNS)}


# ---- reported by the authors of converted weights --------------------------------------------------------------------


def reported_rows(reported: dict) -> list[str]:
    """The reported results as a Markdown table of one row."""
    values = [form.format(reported["metrics"][name]) for name, (_, form) in REPORTED_COLUMNS.items()]
    return [_row([title for title, _ in REPORTED_COLUMNS.values()]), _row(["-"] * len(values)), _row(values)]


def reported_model_index(reported: dict) -> list[EvalResult]:
    """The reported results for the card's metadata, with their source."""
    return [
        EvalResult(
            task_type="image-to-image",
            task_name="reconstruction through codes (sinkhorn)",
            dataset_type=reported["dataset_id"],
            dataset_name=reported["dataset_id"],
            dataset_split="validation",
            metric_type=name,
            metric_name=f"{REPORTED_COLUMNS[name][0]}, reported by the authors",
            metric_value=value,
            source_name="reported by the authors",
            source_url=reported["url"],
        )
        for name, value in reported["metrics"].items()
    ]


def reported_eval_results_yaml(reported: dict) -> str:
    """The reported results as a file of the folder `.eval_results`."""
    source = {"source_url": reported["url"], "source_name": "reported by the authors"}
    entries = [
        EvalResultEntry(reported["dataset_id"], f"reconstruction_{name}", value, notes=reported["protocol"], **source)
        for name, value in reported["metrics"].items()
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)


# ---- the check -------------------------------------------------------------------------------------------------------


def check_results(card: ModelCard, expected: ModelCard) -> None:
    """Raises ValueError, with the first difference, unless a card states exactly the results of the expected card.

    Compares the results in the metadata, with dataset, split and source, and the tables of the section "Results".
    """
    stated, true = (_results_in_metadata(one) for one in (card, expected))
    for result in [*stated, *true]:
        if stated.count(result) != true.count(result):
            where = "the records beside it do not" if result in stated else "its metadata does not"
            name, value, dataset, split, _ = result
            raise ValueError(
                f"the model card and the results on record differ: {'the card' if result in stated else 'the record'} says "
                f"{name} is {value} on split {split} of {dataset}, {where}: {REMEDY}"
            )
    stated, true = (_result_tables(one) for one in (card, expected))
    for row in [*stated, *true]:
        if stated.count(row) != true.count(row):
            problem = "has a row that is not on record" if row in stated else "lacks a row that is on record"
            raise ValueError(f"the section Results of the model card {problem}: {row!r}: {REMEDY}")


def _results_in_metadata(card: ModelCard) -> list[tuple]:
    results: list[EvalResult] = card.data.get("eval_results") or []
    return [
        (result.metric_type, result.metric_value, result.dataset_type, result.dataset_split, result.source_url)
        for result in results
    ]


def _result_tables(card: ModelCard) -> list[str]:
    section = re.search(r"^## Results$(.*?)(?=^## |\Z)", card.content, re.MULTILINE | re.DOTALL)
    return [line.strip() for line in section[1].splitlines() if line.lstrip().startswith("|")] if section else []


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
