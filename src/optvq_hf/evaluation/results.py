"""Names and columns of evaluation results, and what may replace them."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..modeling_optvq import OptVQModel
from ..parsing import parse_json
from ..training.digests import DIGEST, weights_digest
from .protocols import BASIC, columns_of


METRICS_FILE, RECONSTRUCTIONS_FILE, USAGE_FILE = "metrics.json", "reconstructions.png", "codebook_usage.png"
EXAMPLES_FILE = "examples.png"

# Entries of metrics.json that say which images were evaluated, but for their number.
IMAGES = ("dataset", "dataset_config", "data_dir", "image_column", "split", "eval_fraction_seed")
# Key in metrics.json, column title, format: what every result has, and cards show.
COLUMNS = {name: columns_of(BASIC)[name] for name in (*BASIC, "codebook_usage", "perplexity")}


def read_result(folder: Path) -> dict:
    """The content of the metrics.json in a folder, if it is whole; otherwise empty."""
    try:
        result = parse_json((folder / METRICS_FILE).read_text())
    except (OSError, ValueError):
        return {}
    is_whole = type(result.get("num_images")) is int and isinstance(result.get("by_assignment"), dict)
    return result if is_whole else {}


def read_result_of(model: OptVQModel, folder: Path) -> dict:
    """The same, if it is of these weights."""
    result = read_result(folder)
    return result if result.get(DIGEST) in (None, weights_digest(model)) else {}


def check_loses_nothing(
    earlier: dict, settings: dict, num_images: float, assignments: list[str], metrics: Iterable[str], folder: Path
) -> None:
    """Refuses a result that would lose an earlier one: of other weights or images, measured otherwise, or with less in it.

    Called before the work with what is known by then, and after it with all.

    Args:
        earlier: Content of metrics.json; empty if there is none.
        settings: Entries of the new one, as far as they are known.
        num_images, assignments, metrics: Its images, at most, its assignments and its metrics.

    Raises:
        ValueError: If the new result is of other weights, of other images, of fewer, lacks an assignment or a metric, or was
            measured otherwise.
    """
    if not earlier:
        return
    if earlier.get(DIGEST) not in (None, settings[DIGEST]):
        raise ValueError(
            f"{folder / METRICS_FILE} is the result of other weights than those of {settings['model']}: pass --overwrite to "
            "replace it and its pictures, or another --output-dir"
        )
    of_others = any(earlier.get(name) != settings.get(name) for name in IMAGES)
    before, measured = earlier["num_images"], list(earlier["by_assignment"])
    if of_others or num_images < before or set(measured) - set(assignments):
        raise ValueError(
            f"{folder / METRICS_FILE} has {_describe(earlier, before, measured)}; the new result would have "
            f"{_describe(settings, num_images, assignments)}: pass --overwrite to replace it, or another --output-dir"
        )

    pair = [result.get("images_sha256") for result in (earlier, settings)]
    if num_images == before and None not in pair and pair[0] != pair[1]:
        raise ValueError(
            f"{folder / METRICS_FILE} is of {before:,} other images than these (images_sha256 differs): pass --overwrite to "
            "replace it, or another --output-dir"
        )
    for name, before, now in _measured_otherwise(earlier, settings):
        raise ValueError(
            f"{folder / METRICS_FILE} was measured with {name} {before!r}, not {now!r}: pass --overwrite to replace it, or "
            "another --output-dir"
        )

    lacking = set(earlier.get("conventions") or ()) - set(metrics) - COLUMNS.keys()
    if lacking:
        raise ValueError(
            f"{folder / METRICS_FILE} has {', '.join(sorted(lacking))}, which the new result would lack: add it to --metrics, "
            "pass --overwrite to replace it, or another --output-dir"
        )


def _measured_otherwise(earlier: dict, settings: dict) -> Iterator[tuple[str, Any, Any]]:
    """What differs in how the figures of two results were measured, as far as both say it: name, earlier and new value.

    These are the entries behind `settings_sha256`, without those of figures that only one of them has.
    """
    of_batch = ["batch_size"] if "sinkhorn" in earlier["by_assignment"] else []  # other codes do not depend on it
    pairs = [(name, earlier.get(name), settings.get(name)) for name in ("dtype", *of_batch)]
    conventions = [result.get("conventions") or {} for result in (earlier, settings)]
    pairs += [(f"{name} as", conventions[0][name], conventions[1].get(name)) for name in conventions[0]]
    yield from (pair for pair in pairs if None not in pair and pair[1] != pair[2])


def _describe(settings: dict, num_images: float, assignments: list[str]) -> str:
    number = f"{num_images:,}" if num_images != float("inf") else "all"
    return f"{number} images of {settings.get('dataset')}, split {settings.get('split')} ({', '.join(assignments)})"
