"""Names, columns and table of evaluation results, and what may replace them."""

from pathlib import Path

from ..modeling_optvq import OptVQModel
from ..parsing import parse_json
from ..training.digests import DIGEST, weights_digest


METRICS_FILE, RECONSTRUCTIONS_FILE, USAGE_FILE = "metrics.json", "reconstructions.png", "codebook_usage.png"

# Entries of metrics.json that say which images were evaluated, but for their number.
IMAGES = ("dataset", "dataset_config", "data_dir", "image_column", "split")
# Key in metrics.json, column title, format.
COLUMNS = {
    "mse": ("MSE [-1, 1]", "{:.4f}"),
    "psnr": ("PSNR dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "codebook_usage": ("usage %", "{:.1f}"),
    "perplexity": ("perplexity", "{:.0f}"),
}


def format_table(by_assignment: dict[str, dict]) -> str:
    """The results as a table of text, one line per assignment."""
    lines = [" | ".join(["assignment".ljust(10)] + [title.rjust(11) for title, _ in COLUMNS.values()])]
    for assignment, metrics in by_assignment.items():
        cells = ["-" if metrics[key] is None else form.format(metrics[key]) for key, (_, form) in COLUMNS.items()]
        cells = [cell.rjust(11) for cell in cells]
        lines.append(" | ".join([assignment.ljust(10), *cells]))
    return "\n".join(lines)


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


def check_loses_nothing(earlier: dict, settings: dict, num_images: float, assignments: list[str], folder: Path) -> None:
    """Refuses a result of other weights than an earlier one, or one that says less: the earlier one would be lost.

    Args:
        earlier: Content of metrics.json; empty if there is none.
        settings, num_images, assignments: Entries of the new one, its images, as far as they are known, and its assignments.

    Raises:
        ValueError: If the new result is of other weights, of other images, of fewer, or lacks an assignment.
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


def _describe(settings: dict, num_images: float, assignments: list[str]) -> str:
    number = f"{num_images:,}" if num_images != float("inf") else "all"
    return f"{number} images of {settings.get('dataset')}, split {settings.get('split')} ({', '.join(assignments)})"
