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


def test_ssim_equals_scikit_image():
    original, reconstruction = images(0), (images(0) + 0.3 * images(1)).clamp(-1, 1)
    expected = [
        structural_similarity(
            a.double().numpy() / 2 + 0.5,
            b.double().numpy() / 2 + 0.5,
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(original, reconstruction)
    ]
    scores = ReconstructionQuality().compute(predictions=reconstruction, references=original)
    assert scores["ssim"] == pytest.approx(np.mean(expected), abs=0.01)
    assert ReconstructionQuality().compute(predictions=original, references=original)["ssim"] == pytest.approx(1)


def test_reconstructions_are_clamped_as_when_shown():
    original = torch.ones(1, 1, 16, 16)
    assert ReconstructionQuality().compute(predictions=original + 5, references=original)["mse"] == 0


def test_scores_that_do_not_exist_are_none():
    small = images(0, (2, 1, 8, 8))
    assert ReconstructionQuality().compute(predictions=small, references=small) == {
        "mse": 0,
        "psnr": None,
        "ssim": None,
    }


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


def test_wrong_inputs():
    with pytest.raises(ValueError, match=r"must both be \(B, C, H, W\), got \(1, 1, 8, 8\) and \(1, 3, 8, 8\)"):
        ReconstructionQuality().add_batch(predictions=torch.zeros(1, 1, 8, 8), references=torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"integer codes \(B, heads, H, W\), got \(2, 8\), int64"):
        CodebookUsage().add_batch(predictions=np.zeros((2, 8), dtype=np.int64))
