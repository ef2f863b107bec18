"""Every metric of images equals an implementation of other authors on the same arrays."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)
from torchmetrics.functional.image import (
    peak_signal_noise_ratio as torchmetrics_psnr,
)
from torchmetrics.functional.image.lpips import _LPIPS

from grids import slow
from optvq_hf.evaluation.image_metrics import MAKERS, ImageScorer
from optvq_hf.evaluation.protocols import IMAGE_METRICS
from optvq_hf.evaluation.reconstruction_quality import ReconstructionQuality, bootstrap_intervals
from optvq_hf.training.losses import perceptual


def make_pair(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    original = torch.rand(shape, generator=generator) * 2 - 1
    return (original + 0.3 * torch.randn(shape, generator=generator)).clamp(-1, 1), original


def to_unit(image):
    return image.double() / 2 + 0.5


@pytest.mark.parametrize("channels", [1, slow(3)])
def test_torchmetrics(channels):
    images, originals = make_pair(2, channels, 176, 180)
    found = ImageScorer(["mse", "psnr", "ssim", "ms_ssim"])(images, originals)
    x, y = to_unit(images), to_unit(originals)
    expected = {
        "mse": (images - originals).double().square().mean(dim=(1, 2, 3)),
        "psnr": torchmetrics_psnr(x, y, data_range=1.0, reduction="none", dim=(1, 2, 3)),
        "ssim": structural_similarity_index_measure(x, y, data_range=1.0, reduction="none"),
        "ms_ssim": multiscale_structural_similarity_index_measure(x, y, data_range=1.0, reduction="none"),
    }
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values.double(), rtol=1e-5, atol=1e-5, msg=name)


def test_luma_as_scikit_image_has_it():
    images, originals = make_pair(3, 3, 24, 40)
    found = ImageScorer(["psnr_luma", "ssim_luma"])(images, originals)
    for index, pair in enumerate(zip(images, originals)):
        a, b = (to_unit(image).movedim(0, -1).numpy() for image in pair)
        psnr = peak_signal_noise_ratio(rgb2ycbcr(a)[..., 0], rgb2ycbcr(b)[..., 0], data_range=255)
        assert found["psnr_luma"][index].item() == pytest.approx(psnr, abs=1e-4)
        luma = [(255 * image @ [0.299, 0.587, 0.114]).round() for image in (a, b)]
        _, of_windows = structural_similarity(
            *luma, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
        )
        assert found["ssim_luma"][index].item() == pytest.approx(of_windows[5:-5, 5:-5].mean(), abs=1e-3)


def test_luma_of_smooth_images_equals_scikit_image_exactly():
    """Where contrast is positive everywhere, the original's rule for negative contrast changes nothing."""
    _, originals = make_pair(2, 3, 24, 40)
    images = 0.9 * originals
    found = ImageScorer(["ssim_luma"])(images, originals)["ssim_luma"]
    for index, pair in enumerate(zip(images, originals)):
        luma = [(255 * to_unit(image).movedim(0, -1).numpy() @ [0.299, 0.587, 0.114]).round() for image in pair]
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        assert found[index].item() == pytest.approx(structural_similarity(*luma, data_range=255, **options), abs=1e-5)


def test_psnr_of_luma_is_higher_than_that_of_rgb():
    """By 1.3 dB for gray errors and 4.8 dB for errors that are independent between channels, as docs/evaluation.md says."""
    originals, noise = (
        torch.zeros(1, 3, 64, 64),
        0.1 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
    )
    for errors, gain in ((noise[:, :1].expand(-1, 3, -1, -1), 1.32), (noise, 4.82)):
        found = ImageScorer(["psnr", "psnr_luma"])(originals + errors, originals)
        assert (found["psnr_luma"] - found["psnr"]).item() == pytest.approx(gain, abs=0.1)


def test_luma_of_gray_images_is_that_of_the_same_pictures_in_rgb():
    gray = make_pair(2, 1, 24, 24)
    in_rgb = [images.expand(-1, 3, -1, -1) for images in gray]
    scorer = ImageScorer(["psnr_luma", "ssim_luma"])
    for name, found in scorer(*gray).items():
        torch.testing.assert_close(found, scorer(*in_rgb)[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["psnr_luma", "ssim_luma"])
@pytest.mark.parametrize("channels", [2, 4])
def test_luma_is_of_gray_or_rgb(name, channels):
    with pytest.raises(ValueError, match=f"{name} needs images of 1 or 3 channels, got {channels}: name other metrics"):
        ImageScorer([name])(*make_pair(1, channels, 24, 24))


@pytest.mark.parametrize("network", ["alex", "squeeze"])
def test_lpips_is_that_of_torchmetrics_with_the_same_weights(network, monkeypatch):
    """Its heads ship with torchmetrics; the weights of the network below them are drawn at random here."""
    torch.manual_seed(0)
    lpips = _LPIPS(net=network, pnet_rand=True)
    monkeypatch.setattr(perceptual, "_download", lambda name: {network: lpips}[name])
    score = ImageScorer([f"lpips_{network}"])
    images, originals = make_pair(3, 3, 64, 64)
    [found] = score(images, originals).values()
    expected = torch.cat([lpips(a[None], b[None]).flatten() for a, b in zip(images, originals)]).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found > 1e-3).all() and (score(originals, originals)[f"lpips_{network}"] == 0).all()
    side = IMAGE_METRICS[f"lpips_{network}"].least_side
    assert score(images[..., :side], originals[..., :side])[f"lpips_{network}"].isfinite().all()
    with pytest.raises(RuntimeError):  # of torch: the least side is right
        lpips(images[..., : side - 1], originals[..., : side - 1])
    message = f"lpips_{network} needs images with sides of {side} pixels or more, got 64 x {side - 1}"
    with pytest.raises(ValueError, match=message):
        score(images[..., : side - 1], originals[..., : side - 1])
    gray = score(images[:, :1], originals[:, :1])[f"lpips_{network}"]
    as_rgb = score(images[:, :1].expand(-1, 3, -1, -1), originals[:, :1].expand(-1, 3, -1, -1))
    torch.testing.assert_close(gray, as_rgb[f"lpips_{network}"])


def test_images_that_are_too_small_have_no_score():
    for name, side in (("ssim", 11), ("ssim_luma", 11), ("ms_ssim", 176)):
        for size, has_score in ((side, True), (side - 1, False)):
            images, originals = make_pair(1, 3, side, size)
            assert math.isnan(ImageScorer([name])(images, originals)[name]) != has_score


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown metric 'lpips': they are mse, psnr, ssim, "):
        ImageScorer(["lpips"])
    assert MAKERS.keys() == IMAGE_METRICS.keys() and all(metric.convention for metric in IMAGE_METRICS.values())


# ---- intervals -------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_scipy():
    scores = np.random.default_rng(1).gamma(2.0, size=200)
    [found] = bootstrap_intervals({"mse": scores.tolist()}).values()
    expected = scipy.stats.bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", rng=0)
    width = expected.confidence_interval.high - expected.confidence_interval.low
    assert found == pytest.approx(list(expected.confidence_interval), abs=0.05 * width)


def test_intervals_skip_images_without_a_score():
    scores = np.random.default_rng(1).gamma(2.0, size=50).tolist()
    found = bootstrap_intervals({"mse": scores, "ssim": [*scores[:40], *[math.nan] * 10], "ms_ssim": [math.nan] * 50})
    alone = bootstrap_intervals({"mse": scores})
    assert found["mse"] == pytest.approx(alone["mse"]) and found["ms_ssim"] is None
    low, high = found["ssim"]
    assert low < np.mean(scores[:40]) < high


def test_one_image_tells_nothing_of_the_spread():
    found = bootstrap_intervals({"mse": [0.5, 0.7], "ssim": [0.9, math.nan]})
    assert found["ssim"] is None and found["mse"] == [0.5, 0.7]


def test_the_module_gives_intervals_when_asked():
    images, originals = make_pair(4, 1, 16, 16)
    quality = ReconstructionQuality(metrics=["psnr_luma", "ms_ssim"])
    result = quality.compute(predictions=images, references=originals, intervals=True)
    low, high = result["intervals"]["psnr_luma"]
    assert low < result["psnr_luma"] < high and result["ms_ssim"] is None and result["intervals"]["ms_ssim"] is None
