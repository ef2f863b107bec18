"""Quality of reconstructed images (MSE, PSNR, SSIM, LPIPS and more), as an `evaluate` module."""

import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from optvq_hf.evaluation.image_metrics import ImageScorer  # absolute: `evaluate.load` copies this file elsewhere
from optvq_hf.evaluation.protocols import BASIC, IMAGE_METRICS


_DESCRIPTION = """\
Errors of reconstructions, in the metrics that are named. Every image is scored alone and the scores are averaged over
images. Only the scores are kept, so any number of images of any size can be added. Reconstructions are clamped to [-1, 1]
first, as they are when shown. An image without a score, as too small an image has no SSIM, is not in the mean; None if no
image has one.

""" + "\n".join(f"{name}: {metric.convention}." for name, metric in IMAGE_METRICS.items())

_INPUTS = """\
predictions, references: (B, C, H, W) float tensors in [-1, 1].
"""

RESAMPLES, CONFIDENCE = 1000, 0.95


class ReconstructionQuality(evaluate.Metric):
    """See the description above. `add_batch(predictions=..., references=...)`, then `compute()`.

    Args:
        metrics: Names of `IMAGE_METRICS`; by default mse, psnr and ssim.
        scorer: Gives images their scores, in place of `metrics`: the networks of LPIPS are loaded once for several modules.
    """

    def __init__(self, *args: Any, metrics: Sequence[str] = BASIC, scorer: ImageScorer | None = None, **options: Any):
        self.scorer = scorer or ImageScorer(metrics)
        super().__init__(*args, **options)

    def _info(self) -> evaluate.MetricInfo:
        scores = {name: datasets.Value("float64") for name in self.scorer.measures}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(scores)
        )

    def add_batch(self, *, predictions: torch.Tensor, references: torch.Tensor) -> None:
        """Scores (B, C, H, W) reconstructions against originals, both in [-1, 1].

        Raises:
            ValueError: For shapes that differ or are not (B, C, H, W), images without pixels, numbers that are not floats, NaN,
                and images that a metric is not of.
        """
        self.add_scores(self.scorer(predictions, references))

    def add_scores(self, scores: dict[str, torch.Tensor]) -> None:
        """Adds scores {name: (B,)} that an [`ImageScorer`] has given, perhaps in another process."""
        super().add_batch(**{name: score.tolist() for name, score in scores.items()})

    def compute(
        self,
        *,
        predictions: torch.Tensor | None = None,
        references: torch.Tensor | None = None,
        intervals: bool = False,
    ) -> dict[str, Any] | None:
        """The mean scores of all added batches; `predictions` and `references` are added first.

        Of several processes, only rank 0 gets them.

        Args:
            intervals: Also "intervals": the two ends of the 95 % interval of each mean, by bootstrap over images.

        Raises:
            ValueError: If only one of the two is given, or no image was added.
        """
        if (predictions is None) != (references is None):
            raise ValueError("predictions and references belong together: one of them is missing")
        if predictions is not None and references is not None:
            self.add_batch(predictions=predictions, references=references)
        return super().compute(intervals=intervals)

    def _compute(self, intervals: bool, **scores: list[float]) -> dict[str, Any]:
        if not all(scores.values()):
            raise ValueError("there are no images to score")
        means = {name: _mean(scores[name]) for name in self.scorer.measures}
        return {**means, "intervals": bootstrap_intervals(scores)} if intervals else means


def bootstrap_intervals(scores: dict[str, list[float]]) -> dict[str, list[float] | None]:
    """The 95 % interval of each mean: percentiles of the means of 1,000 samples of the images, drawn with replacement.

    The samples are the same for all metrics and on every call (seed 0), and depend on the number of images alone.

    Args:
        scores: By metric, of every image in the order of the dataset; NaN for an image without a score.

    Returns:
        The two ends by metric; None if fewer than two images have a score, of whose spread nothing is known.
    """
    table = np.array([scores[name] for name in scores]).T  # (images, metrics)
    has_score = ~np.isnan(table)
    table = np.where(has_score, table, 0.0)
    generator = np.random.default_rng(0)
    means = np.full((RESAMPLES, table.shape[1]), math.nan)
    for sample in range(RESAMPLES):
        drawn = np.bincount(generator.integers(len(table), size=len(table)), minlength=len(table))
        number = drawn @ has_score
        np.divide(drawn @ table, number, out=means[sample], where=number > 0)
    ends = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    return {
        name: np.nanquantile(means[:, column], ends).tolist() if has_score[:, column].sum() > 1 else None
        for column, name in enumerate(scores)
    }


def _mean(scores: list[float]) -> float | None:
    """Of the images that have a score."""
    scores = [score for score in scores if not math.isnan(score)]
    return math.fsum(scores) / len(scores) if scores else None
