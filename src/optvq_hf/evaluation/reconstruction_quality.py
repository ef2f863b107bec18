"""MSE, PSNR and SSIM of reconstructed images, as an `evaluate` module."""

import math
from typing import Any

import datasets
import evaluate
import torch
from torch.nn import functional as F

from optvq_hf.image_processing_optvq import psnr  # absolute: `evaluate.load` copies this file elsewhere


_DESCRIPTION = """\
Pixel errors of reconstructions. Every image is scored alone and the scores are averaged over images. Only the scores are
kept, so any number of images of any size can be added. Reconstructions are clamped to [-1, 1] first, as they are when shown.

mse: mean squared error on the [-1, 1] scale.

psnr: in dB, over all channels together, on the [0, 1] scale with peak 1. At most 100, the value of a perfect image: the mean
squared error on that scale counts as 1e-10 or more.

ssim: in [-1, 1], 1 for equal images; below 0 where pixels move against each other. Gaussian window of 11 x 11 and sigma 1.5,
K1 = 0.01, K2 = 0.03, population covariance, on the [0, 1] scale with data range 1; mean over all pixels and channels. At the
border, images are continued by their mirror image, without the edge pixel twice. An image with a side below 11 has none and is
not in the mean; None if no image has one.
"""

_INPUTS = """\
predictions, references: (B, C, H, W) float tensors in [-1, 1].
"""

SSIM_RADIUS, SSIM_SIGMA = 5, 1.5


class ReconstructionQuality(evaluate.Metric):
    """See the description above. `add_batch(predictions=..., references=...)`, then `compute()`."""

    def _info(self) -> evaluate.MetricInfo:
        scores = {name: datasets.Value("float64") for name in ("mse", "psnr", "ssim")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(scores)
        )

    def add_batch(self, *, predictions: torch.Tensor, references: torch.Tensor) -> None:
        """Scores (B, C, H, W) reconstructions against originals, both in [-1, 1].

        Raises:
            ValueError: For shapes that differ or are not (B, C, H, W), images without pixels, numbers that are not floats, NaN.
        """
        if predictions.shape != references.shape or predictions.ndim != 4 or 0 in predictions.shape[1:]:
            raise ValueError(
                f"predictions and references must both be (B, C, H, W) with pixels, got {tuple(predictions.shape)} and "
                f"{tuple(references.shape)}"
            )
        if not (predictions.is_floating_point() and references.is_floating_point()):
            raise ValueError(f"predictions and references must be floats, got {predictions.dtype}, {references.dtype}")
        if predictions.isnan().any() or not references.isfinite().all():
            raise ValueError("found NaN in predictions, or NaN or inf in references")
        predictions, references = predictions.float().clamp(-1, 1), references.float()
        mse = (predictions - references).square().mean(dim=(1, 2, 3))
        ssim = structural_similarity(predictions / 2 + 0.5, references / 2 + 0.5)
        super().add_batch(mse=mse.tolist(), psnr=psnr(mse).tolist(), ssim=ssim.tolist())

    def compute(
        self, *, predictions: torch.Tensor | None = None, references: torch.Tensor | None = None
    ) -> dict[str, Any] | None:
        """The mean scores of all added batches; `predictions` and `references` are added first.

        Of several processes, only rank 0 gets them.

        Raises:
            ValueError: If only one of the two is given, or no image was added.
        """
        if (predictions is None) != (references is None):
            raise ValueError("predictions and references belong together: one of them is missing")
        if predictions is not None and references is not None:
            self.add_batch(predictions=predictions, references=references)
        return super().compute()

    def _compute(self, mse: list[float], psnr: list[float], ssim: list[float]) -> dict[str, float | None]:
        if not mse:
            raise ValueError("there are no images to score")
        return {name: _mean(scores) for name, scores in (("mse", mse), ("psnr", psnr), ("ssim", ssim))}


def structural_similarity(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """SSIM (B,) of images (B, C, H, W) in [0, 1], as the description above says; NaN for images with a side below 11.

    In float64: variances are differences of near squares, which lose 3e-4 of the SSIM of flat images in float32. The window
    is taken side by side, as it is a product. (The same as torchmetrics in float64, which takes 1 GB per image of 256 x 256.)
    """
    if min(images.shape[2:]) < 2 * SSIM_RADIUS + 1:
        return torch.full((len(images),), math.nan)
    x, y = images.double(), references.double()
    weights = [math.exp(-((offset / SSIM_SIGMA) ** 2) / 2) for offset in range(-SSIM_RADIUS, SSIM_RADIUS + 1)]

    def windowed(values: torch.Tensor) -> torch.Tensor:
        values = F.pad(values, (SSIM_RADIUS,) * 4, mode="reflect")
        for dim, size in ((2, x.shape[2]), (3, x.shape[3])):
            total = torch.zeros_like(values.narrow(dim, 0, size))
            for start, weight in enumerate(weights):
                total.add_(values.narrow(dim, start, size), alpha=weight / sum(weights))
            values = total
        return values

    mean_x, mean_y = windowed(x), windowed(y)
    variances = windowed(x * x) - mean_x * mean_x + windowed(y * y) - mean_y * mean_y
    covariance = windowed(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x * mean_x + mean_y * mean_y + 0.01**2)
    return (luminance * (2 * covariance + 0.03**2) / (variances + 0.03**2)).mean(dim=(1, 2, 3))


def _mean(scores: list[float]) -> float | None:
    """Of the images that have a score."""
    scores = [score for score in scores if not math.isnan(score)]
    return math.fsum(scores) / len(scores) if scores else None
