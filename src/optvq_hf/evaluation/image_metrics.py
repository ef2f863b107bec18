"""Scores of single images: the function behind each of the metrics that `protocols.py` names."""

from collections.abc import Callable, Sequence

import torch

from ..image_processing_optvq import psnr
from ..training.losses.perceptual import NETWORKS, Network, PerceptualLoss
from .protocols import IMAGE_METRICS, check_images, check_metrics
from .structural_similarity import (
    luma_structural_similarity,
    multiscale_structural_similarity,
    structural_similarity,
)


# Gives the scores (B,) of reconstructions and originals, both (B, C, H, W) in [-1, 1].
Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Device = torch.device | str
# Luma of BT.601 as video has it, from 16 to 235: weights of red, green and blue in [0, 1], in steps of 255.
STUDIO_LUMA = (65.481, 128.553, 24.966)


def _mse(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    return (images - references).square().mean(dim=(1, 2, 3))


def _psnr(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    return psnr(_mse(images, references))


def _psnr_luma(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    difference = (images - references) / 2
    weights = torch.tensor(STUDIO_LUMA, device=images.device) / 255
    if images.shape[1] == 1:  # as if it were RGB: its luma has the same narrow range
        weights = weights.sum(dim=0, keepdim=True)
    luma = (difference * weights[:, None, None]).sum(dim=1, keepdim=True)
    return psnr(4 * luma.square().mean(dim=(1, 2, 3)))


def _plain(measure: Measure) -> Callable[[Device], Measure]:
    return lambda device: measure


def _on_unit_scale(measure: Measure) -> Callable[[Device], Measure]:
    return lambda device: lambda images, references: measure(images / 2 + 0.5, references / 2 + 0.5)


def _lpips(network: Network) -> Callable[[Device], Measure]:
    return lambda device: PerceptualLoss(network).to(device).distances


# Makes the measure of each of `IMAGE_METRICS`, on a device; of networks it loads the weights.
MAKERS: dict[str, Callable[[Device], Measure]] = {
    "mse": _plain(_mse),
    "psnr": _plain(_psnr),
    "ssim": _on_unit_scale(structural_similarity),
    "psnr_luma": _plain(_psnr_luma),
    "ssim_luma": _on_unit_scale(luma_structural_similarity),
    "ms_ssim": _on_unit_scale(multiscale_structural_similarity),
    **{f"lpips_{network}": _lpips(network) for network in NETWORKS},
}


class ImageScorer:
    """Gives images their scores by several metrics: `scorer(reconstructions, originals)` -> {name: (B,) float64}.

    Args:
        names: Of [`IMAGE_METRICS`].
        device: Where networks compute.

    Raises:
        ValueError: For an unknown name.
        OSError: If the weights of a network cannot be downloaded.
    """

    def __init__(self, names: Sequence[str], device: Device = "cpu"):
        check_metrics(names, tuple(IMAGE_METRICS))
        self.measures = {name: MAKERS[name](device) for name in names}

    @property
    def conventions(self) -> dict[str, str]:
        """The convention of every metric."""
        return {name: IMAGE_METRICS[name].convention for name in self.measures}

    @torch.no_grad()
    def __call__(self, reconstructions: torch.Tensor, originals: torch.Tensor) -> dict[str, torch.Tensor]:
        """Reconstructions are clamped to [-1, 1] first, as they are when shown.

        Args:
            reconstructions, originals: (B, C, H, W) float in [-1, 1].

        Raises:
            ValueError: For shapes that differ or are not (B, C, H, W), images without pixels, numbers that are not floats, NaN,
                and images that a metric is not of.
        """
        if reconstructions.shape != originals.shape or reconstructions.ndim != 4 or 0 in reconstructions.shape[1:]:
            raise ValueError(
                f"predictions and references must both be (B, C, H, W) with pixels, got {tuple(reconstructions.shape)} and "
                f"{tuple(originals.shape)}"
            )
        check_images(self.measures, *originals.shape[1:])
        if not (reconstructions.is_floating_point() and originals.is_floating_point()):
            raise ValueError(
                f"predictions and references must be floats, got {reconstructions.dtype}, {originals.dtype}"
            )
        if reconstructions.isnan().any() or not originals.isfinite().all():
            raise ValueError("found NaN in predictions, or NaN or inf in references")
        pair = reconstructions.float().clamp(-1, 1), originals.float()
        return {name: measure(*pair).double().cpu() for name, measure in self.measures.items()}
