"""MSE, PSNR and SSIM of reconstructed images, as an `evaluate` module."""

import math
from typing import Any

import datasets
import evaluate
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from optvq_hf.image_processing_optvq import psnr  # absolute: `evaluate.load` copies this file elsewhere


_DESCRIPTION = """\
Pixel errors of reconstructions. Every image is scored alone and the scores are averaged over images. Only the scores are
kept, so any number of images of any size can be added.

mse: mean squared error on the [-1, 1] scale. psnr: in dB, over all channels together, on the [0, 1] scale with peak 1.
ssim: Gaussian window of 11 x 11 and sigma 1.5, on the [0, 1] scale with data range 1, mean over channels. Reconstructions
are clamped to [-1, 1] first, as they are when shown. psnr is None if an image is perfect, ssim if one is smaller than its
window.
"""

_INPUTS = """\
predictions, references: (B, C, H, W) float tensors in [-1, 1].
"""


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
            ValueError: For shapes that differ or are not (B, C, H, W).
        """
        if predictions.shape != references.shape or predictions.ndim != 4:
            raise ValueError(
                f"predictions and references must both be (B, C, H, W), got {tuple(predictions.shape)} and "
                f"{tuple(references.shape)}"
            )
        predictions, references = predictions.float().clamp(-1, 1), references.float()
        mse = (predictions - references).square().mean(dim=(1, 2, 3))
        predictions, references = predictions / 2 + 0.5, references / 2 + 0.5
        if min(predictions.shape[2:]) >= 11:
            ssim = structural_similarity_index_measure(predictions, references, data_range=1.0, reduction="none")
            assert isinstance(ssim, torch.Tensor)  # the full image of scores comes only when asked for
        else:
            ssim = torch.full_like(mse, math.nan)
        super().add_batch(mse=mse.tolist(), psnr=psnr(mse).tolist(), ssim=ssim.reshape(-1).tolist())

    def compute(
        self, *, predictions: torch.Tensor | None = None, references: torch.Tensor | None = None
    ) -> dict[str, Any] | None:
        """The mean scores of all added batches; `predictions` and `references` are added first.

        Of several processes, only rank 0 gets them.

        Raises:
            ValueError: If only one of the two is given.
        """
        if (predictions is None) != (references is None):
            raise ValueError("predictions and references belong together: one of them is missing")
        if predictions is not None and references is not None:
            self.add_batch(predictions=predictions, references=references)
        return super().compute()

    def _compute(self, mse: list[float], psnr: list[float], ssim: list[float]) -> dict[str, float | None]:
        means = {name: sum(scores) / len(scores) for name, scores in (("mse", mse), ("psnr", psnr), ("ssim", ssim))}
        return {name: mean if math.isfinite(mean) else None for name, mean in means.items()}
