"""Runs of a comparison: equal conditions for all rivals, files that are resumed, and the choice of the best rate."""

import json
from dataclasses import replace

import pytest
import torch

from grids import slow
from optvq_hf.data.arguments import DataArguments
from optvq_hf.data.batches import evaluation_batches
from optvq_hf.evaluation import comparison
from optvq_hf.evaluation.comparison import RunSettings, Tokenizer, run, split_images
from optvq_hf.evaluation.rivals import RIVALS, find_rival, make_rival
from optvq_hf.image_processing_optvq import OptVQImageProcessor
from optvq_hf.quantizer_optvq import OptVQQuantizer


FAST = ("transport", "ema", "fsq", "residual")
SIZES = {"max_steps": 12, "batch_size": 16, "codebook_size": 64, "codebook_dim": 4}


def settings(rival="transport", learning_rate=5e-3, seed=0, **sizes):
    return RunSettings(rival, learning_rate, seed, **{**SIZES, **sizes})


@pytest.fixture(scope="module")
def images():
    """Some of the sample dataset, at half its size."""
    data = DataArguments(dataset="fashion_mnist_sample", eval_split="train")
    processor = OptVQImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, num_channels=1)
    [batch] = evaluation_batches(data, processor, 400, 400)
    pixels = ((batch + 1) * 127.5).round().to(torch.uint8)
    return split_images(pixels[:320], pixels[320:])


def test_held_out_images(images):
    assert [len(part) for part in (images.train, images.validation, images.test)] == [288, 32, 80]
    rows = {image.numpy().tobytes() for image in (*images.train, *images.validation)}
    assert len(rows) > 310  # the dataset holds some twice
    assert split_images(images.train, images.test).first is None


@pytest.mark.parametrize("rival", [name if name in FAST else slow(name) for name in RIVALS])
def test_every_rival_learns(images, rival):
    result, shown = run(settings(rival, max_steps=200), images)
    assert result["diverged_at"] is None and [step for step, _ in result["curve"]] == [50, 100, 150, 200]
    assert result["curve"][-1][1] < 0.8 * result["curve"][0][1]
    for part in ("train", "validation", "test"):
        scores = result[part]
        assert 0 < scores["mse"] < 0.5 and 0 < scores["codebook_usage"] <= 100 and 1 <= scores["perplexity"] <= 65
    assert -1 <= result["test"]["ssim"] <= 1
    assert shown.shape == (8, 1, 16, 16) and shown.dtype == torch.uint8
    json.dumps(result, allow_nan=False)


def test_conditions_are_equal(images):
    """Networks start from the same weights, and batches are the same, whatever random numbers a rival draws."""
    first = [Tokenizer(RIVALS[name].make(64, 4), 1, seed=0) for name in ("transport", "ema", "fsq")]
    for name, weight in first[0].named_parameters():
        if name.startswith(("encoder.0.", "decoder.1.")):
            assert all(torch.equal(weight, other.get_parameter(name)) for other in first[1:]), name
    rows = [comparison._order(288, 40, settings(name)) for name in ("transport", "fsq")]
    assert torch.equal(*rows) and rows[0].shape == (40, 16)
    assert all(len(set(epoch.tolist())) == 288 for epoch in rows[0].flatten()[:576].split(288))
    assert not torch.equal(rows[0], comparison._order(288, 40, settings(seed=1)))
    batches = list(comparison._batches(images, settings(max_steps=40)))
    assert torch.equal(torch.stack(batches), images.train[rows[0]])


def test_a_change_of_domain(images):
    """The first half of the steps sees other images."""
    changing = replace(images, first=255 - images.test)
    batches = torch.stack(list(comparison._batches(changing, settings(max_steps=9))))
    of_first = comparison._order(len(images.test), 4, settings())
    assert torch.equal(batches[:4], changing.first[of_first])
    assert torch.equal(batches[4:], images.train[comparison._order(288, 5, settings())])
    assert run(settings(), changing)[0]["curve"] != run(settings(), images)[0]["curve"]


def test_the_start(images):
    """Latents of variance 1 where a rival wants them; then moved, once the codes are there."""
    rival = find_rival("nearest_kmeans")
    tokenizer = Tokenizer(rival.make(64, 4), 1, seed=0)
    comparison._standardise(tokenizer, images.train)
    latents = comparison._latents(tokenizer, images.train)
    assert latents.mean(dim=0).tolist() == pytest.approx([0] * 4, abs=1e-4)
    assert latents.std(dim=0).tolist() == pytest.approx([1] * 4, rel=1e-4)
    comparison._start_codes(tokenizer, rival, images.train, seed=0)
    codes = tokenizer.rival.quantizer(latents).codes
    assert len(codes.unique()) == 64  # every centre is the nearest to some
    comparison._scale_latents(tokenizer, 0.1, 5.0)
    assert torch.allclose(comparison._latents(tokenizer, images.train), 0.1 * latents + 5, atol=1e-4)


def test_normalised_latents(images):
    """Latents keep variance 1 while the encoder learns, where plain ones do not; at inference with the moments of training."""
    name = "fsq,normalised=true"
    rival = find_rival(name)
    tokenizer = Tokenizer(make_rival(name, 64, 4), 1, 0, normalised=rival.normalised)
    comparison._train(tokenizer, rival, settings(name, max_steps=20), images)
    latents = comparison._latents(tokenizer, images.train[:16])
    assert latents.mean(dim=0).abs().max() < 1e-5 and (latents.var(dim=0) - 1).abs().max() < 0.01
    tokenizer.eval()
    one, all_of_them = (comparison._latents(tokenizer, images.test[:number]) for number in (1, 16))
    assert torch.allclose(one, all_of_them[: len(one)], atol=1e-5) and one.isfinite().all()
    with pytest.raises(ValueError, match=f"^rival '{name}': normalised latents cannot be moved"):
        run(settings(name, latent_shift=5.0), images)


def test_the_vqgan(images):
    result, shown = run(settings(backbone="vqgan", max_steps=2), images)
    assert result["diverged_at"] is None and shown.shape == (8, 1, 16, 16)
    tokenizer = Tokenizer(RIVALS["transport"].make(64, 4), 1, 0, "vqgan")
    assert tokenizer.encoder(torch.zeros(1, 1, 16, 16)).shape == (1, 4, 2, 2)


def test_a_run_repeats(images):
    results = [run(settings("default"), images)[0] for _ in range(2)]
    assert [{**result, "seconds": 0} for result in results][0] == {**results[1], "seconds": 0}


def test_schedules(images):
    rival = find_rival("transport,epsilon=10..100,balance=1..0")
    tokenizer = Tokenizer(rival.make(64, 4), 1, seed=0)
    seen = []
    for progress in (0, 0.5, 1):
        comparison._follow_schedules(tokenizer, rival, progress)
        seen.append((tokenizer.rival.quantizer.epsilon, tokenizer.rival.quantizer.balance))
    assert seen == [(10, 1), (pytest.approx(10 * 10**0.5), 0.5), (pytest.approx(100), 0)]


def test_scores_are_those_of_the_metrics(images):
    from optvq_hf.evaluation.reconstruction_quality import ReconstructionQuality

    torch.manual_seed(0)
    tokenizer = Tokenizer(RIVALS["transport"].make(64, 4), 1, seed=0).eval()
    scores = comparison._score(tokenizer, images.test)
    pixel_values = comparison.to_pixel_values(images.test)
    with torch.inference_mode():
        reconstruction, codes, _ = tokenizer(pixel_values)
    expected = ReconstructionQuality().compute(predictions=reconstruction, references=pixel_values)
    assert {name: scores[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    counts = torch.bincount(codes.flatten(), minlength=64)
    assert scores["codebook_usage"] == 100 * (counts > 0).sum().item() / 64
    frequencies = counts[counts > 0] / counts.sum()
    assert scores["perplexity"] == pytest.approx((-(frequencies * frequencies.log()).sum()).exp().item(), rel=1e-5)


def test_ours_is_the_quantizer(images):
    rival = RIVALS["transport"].make(64, 4)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    quantizer = OptVQQuantizer(64, 4)
    quantizer.load_state_dict(rival.quantizer.state_dict())
    quantized, codes, loss = rival(latents)
    expected = quantizer(latents)
    assert torch.equal(quantized, expected.quantized) and torch.equal(codes, expected.codes[:, 0])
    assert torch.equal(loss, expected.loss)


def test_a_run_that_diverges_ends_and_says_so(images):
    result, _ = run(settings("fsq", learning_rate=1e30, max_steps=60), images)
    assert result["diverged_at"] == 50 and result["curve"] == [] and result["test"]["mse"] is None
    json.dumps(result, allow_nan=False)


def test_a_constant_ends_the_schedule(images):
    rival = find_rival("default,epsilon=5,balance=1e-1")
    quantizer = rival.make(64, 4).quantizer
    assert rival.epsilon is None and (quantizer.epsilon, quantizer.balance) == (5, 0.1)
    tokenizer = Tokenizer(rival.make(64, 4), 1, seed=0)
    comparison._follow_schedules(tokenizer, rival, 1)
    assert tokenizer.rival.quantizer.epsilon == 5


def test_usage_is_of_whole_tokens():
    rival = make_rival("residual", 64, 4)
    codes = torch.tensor([[[[0, 0], [1, 0], [7, 7], [2, 5]]]])
    assert comparison._tokens(codes, rival).tolist() == [[[0, 8, 63, 21]]]
    assert comparison._tokens(codes[..., 0], make_rival("ema", 64, 4)).tolist() == [[[0, 1, 7, 2]]]


@pytest.mark.parametrize("name", ("ema", "residual", "fsq"))
def test_latents_are_moved_after_every_start(images, name, monkeypatch):
    """Rivals that start their codes at the first call do so before the move, from latents of variance 1 as all others."""
    moves = []

    def scale_latents(tokenizer, *scale_and_shift):
        books = [buffer for of, buffer in tokenizer.named_buffers() if of.endswith("initted")]
        moves.append(([bool(book.all()) for book in books], comparison._latents(tokenizer, images.train)))
        unchanged(tokenizer, *scale_and_shift)

    unchanged = comparison._scale_latents
    monkeypatch.setattr(comparison, "_scale_latents", scale_latents)
    run(settings(name, max_steps=1, latent_scale=0.1), images)
    (_, _), (started, latents) = moves  # the first move standardises
    assert all(started) and len(started) == {"ema": 1, "residual": 2, "fsq": 0}[name]
    assert latents.std(dim=0).tolist() == pytest.approx([1] * latents.shape[1], rel=1e-3)


def test_small_images_and_few_of_them(images):
    """No SSIM below 11 pixels, no standard error of one image; as many first latents as codes need, of any size."""
    small = replace(images, train=images.train[..., :4, :4], validation=images.validation[..., :4, :4])
    result, _ = run(settings("nearest_kmeans"), replace(small, test=images.test[:1, :, :4, :4]))
    assert result["test"]["ssim"] is None and result["test"]["mse_standard_error"] is None
    assert result["test"]["mse"] > 0
    with pytest.raises(ValueError, match="a tenth of the training images is held out, which needs 10 of them, got 9"):
        split_images(images.train[:9], images.test)


def test_a_run_whose_last_step_diverges(images, monkeypatch):
    """Weights that are no numbers are no result, also after the last figure of the curve."""
    monkeypatch.setattr(comparison, "_is_finite", lambda tokenizer: False)
    result, shown = run(settings(), images)
    assert result["diverged_at"] == 12 and result["test"]["mse"] is None and not shown.any()


def test_versions_of_libraries(images):
    of_theirs, of_ours = (run(settings(name, max_steps=1), images)[0]["versions"] for name in ("ema", "transport"))
    assert set(of_ours) == {"torch"} and set(of_theirs) == {"torch", "vector-quantize-pytorch"}


def test_names_of_runs_differ():
    names = {comparison.run_name("ema", rate, 0) for rate in (0.01, 0.01 + 1e-9, 5e-3)}
    assert len(names) == 3 and {"ema-lr0.01-seed0", "ema-lr0.005-seed0"} < names


def test_batches_keep_their_shape(images):
    """As CUDA graphs are captured from the first."""
    few = replace(images, train=images.train[:10])
    assert {batch.shape for batch in comparison._batches(few, settings())} == {(16, 1, 16, 16)}
