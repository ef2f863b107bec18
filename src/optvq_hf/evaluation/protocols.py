"""What is measured, by name: metrics, with the images that they are of, protocols, and the columns of tables. Without torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


GRAY_OR_RGB = (1, 3)


@dataclass(frozen=True)
class ImageMetric:
    """A metric that gives every image a score.

    Attributes:
        title, form: Title and format of its column in tables.
        convention: What a reader must know to compare its values with those of others.
        channels: Numbers of channels that images may have; None for any.
        least_side: Pixels that the sides of an image must have. Below those of a window, images have no score instead.
    """

    title: str
    form: str
    convention: str
    channels: tuple[int, ...] | None = None
    least_side: int = 1


_WINDOW = "Gaussian window 11 x 11, sigma 1.5"
_LPIPS = "LPIPS 0.1 with {}, channels in [-1, 1], image at its own size; gray images as RGB"
_LEAST_SIDES_OF_LPIPS = {"alex": 31, "squeeze": 17, "vgg": 16}  # below, a pooling layer gets no pixel
IMAGE_METRICS = {
    "mse": ImageMetric("MSE [-1, 1]", "{:.4f}", "mean squared error of all channels, range 2"),
    "psnr": ImageMetric("PSNR dB", "{:.2f}", "all channels together, peak 1, at most 100 dB"),
    "ssim": ImageMetric("SSIM", "{:.3f}", f"{_WINDOW}, mirrored border, range 1, mean over channels"),
    "psnr_luma": ImageMetric(
        "PSNR luma dB", "{:.2f}", "luma of BT.601 from 16 to 235 of 255, peak 255, at most 100 dB; gray images as RGB",
        GRAY_OR_RGB,
    ),
    "ssim_luma": ImageMetric(
        "SSIM luma", "{:.3f}",
        f"luma of BT.601 from 0 to 255 in whole steps, {_WINDOW}, border cropped, range 255, contrast at least 0",
        GRAY_OR_RGB,
    ),
    "ms_ssim": ImageMetric(
        "MS-SSIM", "{:.3f}",
        f"5 scales, {_WINDOW}, border cropped for contrast and mirrored for SSIM, range 1, mean over channels",
    ),
    **{
        f"lpips_{network}": ImageMetric(f"LPIPS {network}", "{:.4f}", _LPIPS.format(network), GRAY_OR_RGB, side)
        for network, side in _LEAST_SIDES_OF_LPIPS.items()
    },
}  # fmt: skip
# Frechet distances: FID, one whose weights are a package, and those of any network of three libraries.
FID, LITE, OF_NETWORKS = "fid", "fd-efficientnet-lite0", ("fd-timm", "fd-torchvision", "fd-transformers")
FRECHET = (FID, LITE, *(f"{library}:NAME" for library in OF_NETWORKS))
METRICS = (*IMAGE_METRICS, *FRECHET)
BASIC = ("mse", "psnr", "ssim")  # always measured
# Key in metrics.json, column title, format: the columns of every table after those of the metrics.
OF_CODES = {
    "codebook_usage": ("usage %", "{:.1f}"),
    "perplexity": ("perplexity", "{:.0f}"),
    "bits_per_token": ("bits/token", "{:.1f}"),
    "bits_per_pixel": ("bits/pixel", "{:.3f}"),
    "entropy_bits_per_pixel": ("bits/pixel by entropy", "{:.3f}"),
    "psnr_per_level": ("PSNR of the first levels", "{:.2f}"),
    "codebook_usage_per_head": ("usage % per head", "{:.1f}"),
}


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


def is_frechet(name: str) -> bool:
    """Whether a metric of this name is a Frechet distance."""
    return name == FID or name.startswith("fd-")


def check_metrics(names: Iterable[str], known: Sequence[str] = METRICS) -> None:
    """Raises ValueError for a name that no metric has, or none of those that are known to the caller."""
    for name in names:
        library, _, network = name.partition(":")
        if name not in known and not (network and f"{library}:NAME" in known):
            raise ValueError(f"unknown metric {name!r}: they are {', '.join(known)}")


def check_images(names: Iterable[str], num_channels: int, height: int, width: int) -> None:
    """Raises ValueError unless all metrics are of such images."""
    for name in names:
        metric = IMAGE_METRICS.get(name)
        channels, least_side = (metric.channels, metric.least_side) if metric else (GRAY_OR_RGB, 1)
        if channels and num_channels not in channels:
            wanted = f"images of {' or '.join(map(str, channels))} channels, got {num_channels}"
        elif min(height, width) < least_side:
            wanted = f"images with sides of {least_side} pixels or more, got {height} x {width}"
        else:
            continue
        raise ValueError(f"{name} needs {wanted}: name other metrics")


def columns_of(metrics: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Key, title and format of the columns of a table with these metrics: theirs, then those of codes."""
    columns = {}
    for name in metrics:
        metric = IMAGE_METRICS.get(name)
        title = name.upper() if name == FID else name
        columns[name] = (metric.title, metric.form) if metric else (title, "{:.2f}")
    return columns | OF_CODES
