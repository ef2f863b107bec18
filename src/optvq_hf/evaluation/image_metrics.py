"""The metrics of single images: what each measures, by which convention, and its score of every image of a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..image_processing_optvq import psnr
from ..training.losses.perceptual import NETWORKS, PerceptualLoss
from .structural_similarity import (
    luma_structural_similarity,
    multiscale_structural_similarity,
    structural_similarity,
)


# Scores (B,) of reconstructions and originals, both (B, C, H, W) in [-1, 1].
Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Device = torch.device | str
# Luma of BT.601 as video has it, from 16 to 235: weights of red, green and blue in [0, 1], in steps of 255.
STUDIO_LUMA = (65.481, 128.553, 24.966)


@dataclass(frozen=True)
class ImageMetric:
    """One metric.

    Attributes:
        title, form: Title and format of its column in tables.
        convention: What a reader must know to compare its values with those of others.
        make: Makes the function that scores, on a device; of networks it loads the weights.
    """

    title: str
    form: str
    convention: str
    make: Callable[[Device], Score]


def _mse(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    return (images - references).square().mean(dim=(1, 2, 3))


def _psnr(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    return psnr(_mse(images, references))


def _psnr_luma(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    difference = (images - references) / 2
    if images.shape[1] == 3:
        weights = torch.tensor(STUDIO_LUMA, device=images.device) / 255
        difference = (difference * weights[:, None, None]).sum(dim=1, keepdim=True)
    return psnr(4 * difference.square().mean(dim=(1, 2, 3)))


def _plain(score: Score) -> Callable[[Device], Score]:
    return lambda device: score


def _on_unit_scale(score: Score) -> Callable[[Device], Score]:
    return lambda device: lambda images, references: score(images / 2 + 0.5, references / 2 + 0.5)


def _lpips(network: str) -> Callable[[Device], Score]:
    return lambda device: PerceptualLoss(network).to(device).distances  # pyright: ignore[reportArgumentType]  # of NETWORKS


_WINDOW = "Gaussian window 11 x 11, sigma 1.5"
_LPIPS = "LPIPS 0.1 with {}, channels in [-1, 1], image at its own size; gray images as RGB"
IMAGE_METRICS: dict[str, ImageMetric] = {
    "mse": ImageMetric("MSE [-1, 1]", "{:.4f}", "mean squared error of all channels, range 2", _plain(_mse)),
    "psnr": ImageMetric("PSNR dB", "{:.2f}", "all channels together, peak 1, at most 100 dB", _plain(_psnr)),
    "ssim": ImageMetric(
        "SSIM", "{:.3f}", f"{_WINDOW}, mirrored border, range 1, mean over channels", _on_unit_scale(structural_similarity)
    ),
    "psnr_luma": ImageMetric(
        "PSNR luma dB", "{:.2f}", "luma of BT.601 from 16 to 235 of 255, peak 255, at most 100 dB", _plain(_psnr_luma)
    ),
    "ssim_luma": ImageMetric(
        "SSIM luma", "{:.3f}",
        f"luma of BT.601 from 0 to 255 in whole steps, {_WINDOW}, border cropped, range 255, contrast at least 0",
        _on_unit_scale(luma_structural_similarity),
    ),
    "ms_ssim": ImageMetric(
        "MS-SSIM", "{:.3f}",
        f"5 scales, {_WINDOW}, border cropped for contrast and mirrored for SSIM, range 1, mean over channels",
        _on_unit_scale(multiscale_structural_similarity),
    ),
    **{
        f"lpips_{network}": ImageMetric(f"LPIPS {network}", "{:.4f}", _LPIPS.format(network), _lpips(network))
        for network in sorted(NETWORKS)
    },
}  # fmt: skip
BASIC = ("mse", "psnr", "ssim")


class ImageScores:
    """Scores images by several metrics: `scores(reconstructions, originals)` -> {name: (B,) float64}.

    Args:
        names: Of [`IMAGE_METRICS`].
        device: Where networks compute.

    Raises:
        ValueError: For an unknown name.
        OSError: If the weights of a network cannot be downloaded.
    """

    def __init__(self, names: Sequence[str], device: Device = "cpu"):
        for name in names:
            if name not in IMAGE_METRICS:
                raise ValueError(f"unknown metric {name!r} of images: they are {', '.join(IMAGE_METRICS)}")
        self.scores = {name: IMAGE_METRICS[name].make(device) for name in names}

    @property
    def conventions(self) -> dict[str, str]:
        """The convention of every metric."""
        return {name: IMAGE_METRICS[name].convention for name in self.scores}

    @torch.no_grad()
    def __call__(self, reconstructions: torch.Tensor, originals: torch.Tensor) -> dict[str, torch.Tensor]:
        """Reconstructions are clamped to [-1, 1] first, as they are when shown.

        Args:
            reconstructions, originals: (B, C, H, W) float in [-1, 1].

        Raises:
            ValueError: For shapes that differ or are not (B, C, H, W), images without pixels, numbers that are not floats, NaN.
        """
        if reconstructions.shape != originals.shape or reconstructions.ndim != 4 or 0 in reconstructions.shape[1:]:
            raise ValueError(
                f"predictions and references must both be (B, C, H, W) with pixels, got {tuple(reconstructions.shape)} and "
                f"{tuple(originals.shape)}"
            )
        if not (reconstructions.is_floating_point() and originals.is_floating_point()):
            raise ValueError(
                f"predictions and references must be floats, got {reconstructions.dtype}, {originals.dtype}"
            )
        if reconstructions.isnan().any() or not originals.isfinite().all():
            raise ValueError("found NaN in predictions, or NaN or inf in references")
        pair = reconstructions.float().clamp(-1, 1), originals.float()
        return {name: score(*pair).double().cpu() for name, score in self.scores.items()}
