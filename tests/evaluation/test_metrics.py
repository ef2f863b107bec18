import json
import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from optvq_hf.evaluation import codebook_usage, reconstruction_quality
from optvq_hf.evaluation.codebook_usage import CodebookUsage
from optvq_hf.evaluation.reconstruction_quality import ReconstructionQuality


def images(seed, shape=(3, 3, 40, 40)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_and_mse_by_hand():
    """An error of 0.2 everywhere on [-1, 1] is 0.1 on [0, 1]: MSE 0.04 there, 0.01 here, PSNR 20 dB."""
    original = torch.zeros(2, 3, 16, 16)
    scores = ReconstructionQuality().compute(predictions=original + 0.2, references=original)
    assert scores["mse"] == pytest.approx(0.04) and scores["psnr"] == pytest.approx(20)


def test_scores_are_means_over_images_not_over_pixels():
    original = torch.zeros(2, 1, 16, 16)
    reconstruction = original.clone()
    reconstruction[0] += 0.2
    reconstruction[1] += 0.02
    scores = ReconstructionQuality().compute(predictions=reconstruction, references=original)
    assert scores["psnr"] == pytest.approx((20 + 40) / 2)


@pytest.mark.parametrize("channels", [1, 3], ids=["gray", "RGB"])
@pytest.mark.parametrize("size", [(11, 11), (28, 28), (40, 13), (11, 64)])
@pytest.mark.parametrize("contrast", [1.0, 1e-3])
def test_ssim_equals_scikit_image_with_the_same_border(channels, size, contrast):
    """It crops the border where windows would stick out, so it is given the mirrored border as part of the picture."""
    original = 1 - contrast * (images(0, (4, channels, *size)) + 1)
    reconstruction = original + 0.3 * contrast * images(1, original.shape)
    scores = [
        structural_similarity(
            *(
                np.pad(x.double().clamp(-1, 1).numpy() / 2 + 0.5, ((0, 0), (5, 5), (5, 5)), mode="reflect")
                for x in pair
            ),
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for pair in zip(original, reconstruction)
    ]
    found = ReconstructionQuality().compute(predictions=reconstruction, references=original)["ssim"]
    assert found == pytest.approx(np.mean(scores), abs=1e-7)


def test_ssim_lies_between_minus_1_and_1():
    original = images(0)
    for reconstruction, low, high in ((original, 1, 1), (-original, -1, -0.9), (images(1), -0.1, 0.1)):
        assert low <= ReconstructionQuality().compute(predictions=reconstruction, references=original)["ssim"] <= high


def test_reconstructions_are_clamped_as_when_shown():
    original = torch.ones(1, 1, 16, 16)
    assert ReconstructionQuality().compute(predictions=original + 5, references=original)["mse"] == 0


@pytest.mark.parametrize("size", [16, 8])
def test_the_psnr_of_a_perfect_image_is_100(size):
    """In a mean, as a number that JSON holds; an image without SSIM does not swallow that of the others."""
    original = torch.zeros(2, 1, size, size)
    reconstruction = original.clone()
    reconstruction[1] = 0.2
    scores = ReconstructionQuality()
    scores.add_batch(predictions=reconstruction, references=original)
    scores.add_batch(predictions=images(0, (1, 1, 16, 16)), references=images(0, (1, 1, 16, 16)))
    result = scores.compute()
    assert result["psnr"] == pytest.approx((100 + 20 + 100) / 3)
    of_large = ReconstructionQuality().compute(predictions=reconstruction, references=original)["ssim"]
    assert result["ssim"] == pytest.approx(1 if size < 11 else (2 * of_large + 1) / 3)
    assert (of_large is None) == (size < 11)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_batches_of_any_size_add_up():
    original, reconstruction = images(0, (7, 1, 16, 24)), images(1, (7, 1, 16, 24))
    parts = ReconstructionQuality()
    for a, b in zip(original.split(3), reconstruction.split(3)):
        parts.add_batch(predictions=b, references=a)
    whole = ReconstructionQuality().compute(predictions=reconstruction, references=original)
    assert parts.compute() == pytest.approx(whole)


def test_usage_and_perplexity_by_hand():
    """Head 0 uses codes 0 and 1 evenly, head 1 code 2 alone, of 8 codes."""
    codes = np.zeros((2, 2, 1, 2), dtype=np.int64)
    codes[:, 0] = [[0, 1]]
    codes[:, 1] = 2
    usage = CodebookUsage()
    for image in codes:
        usage.add_batch(predictions=torch.from_numpy(image[None]))
    scores = usage.compute(codebook_size=8)
    assert scores["codebook_usage"] == 100 * 3 / 8 and scores["codebook_usage_per_head"] == [25, 12.5]
    assert scores["perplexity_per_head"] == pytest.approx([2, 1])
    assert scores["perplexity"] == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))
    assert scores["code_counts"].tolist() == [[2, 2, 0, 0, 0, 0, 0, 0], [0, 0, 4, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("module", [codebook_usage, reconstruction_quality])
def test_they_load_as_evaluate_modules_from_their_file(module, tmp_path):
    metric = evaluate.load(module.__file__, cache_dir=str(tmp_path))
    assert metric.name == Path(module.__file__).stem and metric.description


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8), r"both be.*\(1, 1, 8, 8\) and \(1, 3, 8, 8\)"),
        (torch.zeros(1, 1, 0, 8), torch.zeros(1, 1, 0, 8), "with pixels"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1, 1, 8, 8), "must be floats, got torch.uint8"),
        (torch.full((1, 1, 8, 8), math.nan), torch.zeros(1, 1, 8, 8), "NaN in predictions"),
        (torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), math.inf), "inf in references"),
        (torch.zeros(0, 1, 8, 8), torch.zeros(0, 1, 8, 8), "no images to score"),
    ],
)
def test_wrong_images(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionQuality().compute(predictions=predictions, references=references)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((2, 8), dtype=np.int64), r"integer codes \(B, heads, H, W\), got \(2, 8\), int64"),
        (np.zeros((2, 1, 4, 4)), "integer codes.*float64"),
        (np.zeros((2, 1, 0, 4), dtype=np.int64), r"integer codes.*\(2, 1, 0, 4\)"),
        (np.full((2, 1, 4, 4), -1), "got -1 to -1"),
        (np.full((2, 1, 4, 4), 2**32, dtype=np.uint64), "got 4294967296"),
        (np.full((2, 1, 4, 4), 8), "found code 8, but codebook_size is 8"),
        (np.zeros((0, 1, 4, 4), dtype=np.int64), "be 1 or more"),
    ],
)
def test_wrong_codes(codes, message):
    with pytest.raises(ValueError, match=message):
        CodebookUsage().compute(predictions=codes, codebook_size=8)


def test_images_with_different_numbers_of_heads():
    usage = CodebookUsage()
    for heads in (2, 4):
        usage.add_batch(predictions=np.zeros((1, heads, 4, 4), dtype=np.int64))
    with pytest.raises(ValueError, match=r"equally many heads.*\[2, 4\]"):
        usage.compute(codebook_size=8)
