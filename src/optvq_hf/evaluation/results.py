"""Names and columns of evaluation results, and what may replace them."""

from collections.abc import Iterable
from pathlib import Path

from ..modeling_optvq import OptVQModel
from ..parsing import parse_json
from ..training.digests import DIGEST, weights_digest


METRICS_FILE, RECONSTRUCTIONS_FILE, USAGE_FILE = "metrics.json", "reconstructions.png", "codebook_usage.png"
EXAMPLES_FILE = "examples.png"

# Entries of metrics.json that say which images were evaluated, but for their number.
IMAGES = ("dataset", "dataset_config", "data_dir", "image_column", "split")
# Key in metrics.json, column title, format: what every result has, and cards show.
COLUMNS = {
    "mse": ("MSE [-1, 1]", "{:.4f}"),
    "psnr": ("PSNR dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "codebook_usage": ("usage %", "{:.1f}"),
    "perplexity": ("perplexity", "{:.0f}"),
}


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
    """Refuses a result of other weights than an earlier one, or one that says less: the earlier one would be lost.

    Args:
        earlier: Content of metrics.json; empty if there is none.
        settings, num_images, assignments, metrics: Entries of the new one, its images, as far as they are known, its
            assignments and its metrics.

    Raises:
        ValueError: If the new result is of other weights, of other images, of fewer, or lacks an assignment or a metric.
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

    lacking = set(earlier.get("conventions") or ()) - set(metrics) - COLUMNS.keys()
    if lacking:
        raise ValueError(
            f"{folder / METRICS_FILE} has {', '.join(sorted(lacking))}, which the new result would lack: add it to --metrics, "
            "pass --overwrite to replace it, or another --output-dir"
        )


def _describe(settings: dict, num_images: float, assignments: list[str]) -> str:
    number = f"{num_images:,}" if num_images != float("inf") else "all"
    return f"{number} images of {settings.get('dataset')}, split {settings.get('split')} ({', '.join(assignments)})"
