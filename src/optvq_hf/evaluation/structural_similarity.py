"""Structural similarity: SSIM (Wang et al. 2004), on luma as in MATLAB, and over several scales (Wang et al. 2003)."""

import math

import torch
from torch.nn import functional as F

from ..image_processing_optvq import LUMA_WEIGHTS


RADIUS, SIGMA = 5, 1.5
SMALLEST_SIDE = 2 * RADIUS + 1
# Exponents of the scales of MS-SSIM, from the whole image to a sixteenth of its side.
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
SMALLEST_SIDE_OF_SCALES = SMALLEST_SIDE * 2 ** (len(SCALES) - 1)


def structural_similarity(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """SSIM (B,) of images (B, C, H, W) in [0, 1]; NaN for images with a side below 11.

    Gaussian window of 11 x 11 and sigma 1.5, K1 = 0.01, K2 = 0.03, population covariance, data range 1; the mean over all
    pixels and channels. At the border, images are continued by their mirror image, without the edge pixel twice.
    """
    if min(images.shape[2:]) < SMALLEST_SIDE:
        return _no_score(images)
    luminance, contrast = _luminance_and_contrast(_mirrored(images), _mirrored(references), 1.0)
    return (luminance * contrast).mean(dim=(1, 2, 3))


def luma_structural_similarity(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """SSIM (B,) in [0, 1] of the luma of images (B, 1 or 3, H, W) in [0, 1], as the original's evaluation (pyiqa) has it.

    As in MATLAB: the luma of BT.601 is rounded to 0 to 255, data range 255, and windows that would stick out of the image are
    not counted. Negative contrast counts as 0.
    """
    if min(images.shape[2:]) < SMALLEST_SIDE:
        return _no_score(images)
    x, y = ((_luma(side) * 255).round() for side in (images, references))
    luminance, contrast = _luminance_and_contrast(x, y, 255.0)
    return (luminance * contrast.clamp_min(0)).mean(dim=(1, 2, 3))


def multiscale_structural_similarity(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """MS-SSIM (B,) in [0, 1] of images (B, C, H, W) in [0, 1]; NaN for images with a side below 176.

    The product over five scales, each of half the side, of the mean contrast to the power of [`SCALES`], at the last scale of
    the mean SSIM. Contrast is of the windows that lie in the image; SSIM has a mirrored border, as [`structural_similarity`].
    Negative means count as 0. The same as torchmetrics.
    """
    if min(images.shape[2:]) < SMALLEST_SIDE_OF_SCALES:
        return _no_score(images)
    x, y = images.double(), references.double()
    scores = torch.ones(len(x), dtype=torch.double, device=x.device)
    for scale, exponent in enumerate(SCALES):
        if scale == len(SCALES) - 1:
            score = structural_similarity(x, y)
        else:
            score = _luminance_and_contrast(x, y, 1.0)[1].mean(dim=(1, 2, 3))
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        scores = scores * score.clamp_min(0) ** exponent
    return scores


def _luminance_and_contrast(x: torch.Tensor, y: torch.Tensor, data_range: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors of SSIM at every window that lies in images (B, C, H, W): (B, C, H - 10, W - 10) each.

    In float64: variances are differences of near squares, which lose 3e-4 of the SSIM of flat images in float32. The window
    is taken side by side, as it is a product. (The same as torchmetrics in float64, which takes 1 GB per image of 256 x 256.)
    """
    x, y = x.double(), y.double()
    weights = [math.exp(-((offset / SIGMA) ** 2) / 2) for offset in range(-RADIUS, RADIUS + 1)]

    def windowed(values: torch.Tensor) -> torch.Tensor:
        for dim in (2, 3):
            size = values.shape[dim] - 2 * RADIUS
            total = torch.zeros_like(values.narrow(dim, 0, size))
            for start, weight in enumerate(weights):
                total.add_(values.narrow(dim, start, size), alpha=weight / sum(weights))
            values = total
        return values

    mean_x, mean_y = windowed(x), windowed(y)
    variances = windowed(x * x) - mean_x * mean_x + windowed(y * y) - mean_y * mean_y
    covariance = windowed(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    return luminance, (2 * covariance + c2) / (variances + c2)


def _mirrored(images: torch.Tensor) -> torch.Tensor:
    return F.pad(images.double(), (RADIUS,) * 4, mode="reflect")


def _luma(images: torch.Tensor) -> torch.Tensor:
    if images.shape[1] == 1:
        return images.double()
    weights = torch.tensor(LUMA_WEIGHTS, dtype=torch.double, device=images.device)
    return (images.double() * weights[:, None, None]).sum(dim=1, keepdim=True)


def _no_score(images: torch.Tensor) -> torch.Tensor:
    return torch.full((len(images),), math.nan)
