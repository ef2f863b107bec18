"""What is measured, by name: protocols, their metrics, and the columns of tables."""

from collections.abc import Sequence
from dataclasses import dataclass

from .feature_networks import FID, check_name, is_frechet
from .image_metrics import BASIC, IMAGE_METRICS
from .results import COLUMNS


@dataclass(frozen=True)
class Protocol:
    """Metrics that belong together, since one work reports them.

    Attributes:
        metrics: Names, in the order of the table.
        assignment: How codes are assigned; None for what the model does at inference.
    """

    metrics: tuple[str, ...]
    assignment: str | None = None


PROTOCOLS = {
    "rgb": Protocol(BASIC),
    # The evaluation of the original implementation: its metrics, and codes by transport over each batch.
    "optvq": Protocol(("psnr_luma", "ssim_luma", "lpips_alex", FID), assignment="sinkhorn"),
}
# Key in metrics.json, column title, format: the columns of every table after those of the metrics.
OF_CODES = {
    "codebook_usage": COLUMNS["codebook_usage"],
    "perplexity": COLUMNS["perplexity"],
    "bits_per_token": ("bits/token", "{:.1f}"),
    "bits_per_pixel": ("bits/pixel", "{:.3f}"),
    "entropy_bits_per_pixel": ("bits/pixel by entropy", "{:.3f}"),
    "codebook_usage_per_head": ("usage % per head", "{:.1f}"),
}


def check_metrics(names: Sequence[str]) -> None:
    """Raises ValueError for a name that no metric has."""
    for name in names:
        if is_frechet(name):
            check_name(name)
        elif name not in IMAGE_METRICS:
            raise ValueError(
                f"unknown metric {name!r}: they are {', '.join(IMAGE_METRICS)}, {FID}, fd-efficientnet-lite0, fd-timm:NAME, "
                "fd-torchvision:NAME, fd-transformers:ID"
            )


def columns_of(metrics: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Key, title and format of the columns of a table with these metrics: theirs, then those of codes."""
    columns = {}
    for name in metrics:
        metric = IMAGE_METRICS.get(name)
        title = name.upper() if name == FID else name
        columns[name] = (metric.title, metric.form) if metric else (title, "{:.2f}")
    return columns | OF_CODES
