"""Runs of a comparison: equal conditions for all rivals, files that are resumed, and the choice of the best rate."""

import json
import math
from dataclasses import replace

import pytest
import torch

from grids import slow
from optvq_hf.commands import compare
from optvq_hf.data.arguments import DataArguments
from optvq_hf.data.batches import evaluation_batches
from optvq_hf.evaluation import arguments, comparison, comparison_report
from optvq_hf.evaluation.comparison import RunSettings, Tokenizer, run, split_images
from optvq_hf.evaluation.rivals import RIVALS, find_rival
from optvq_hf.evaluation.studies import Comparison
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


def test_names_and_sizes_that_cannot_be():
    assert tuple(RIVALS) == arguments.RIVALS
    with pytest.raises(ValueError, match="unknown rival 'best'; rivals are transport, "):
        arguments.ComparisonArguments(rivals=["ema", "best"])
    for name, size, message in (
        ("fsq", 1000, "levels for"),
        ("lfq", 100, "power of two"),
        ("residual", 128, "a square"),
    ):
        with pytest.raises(ValueError, match=message):
            RIVALS[name].make(size, 8)


def test_settings_of_a_rival():
    rival = find_rival(
        "transport_ema,epsilon=10..300,balance=1..0.1,ema_decay=0.9,rate=2,start=kmeans,standardised=true"
    )
    assert rival.epsilon == (10, 300) and rival.balance == (1, 0.1) and rival.codebook_multiplier == 2
    assert rival.codebook_start == "kmeans" and rival.standardised
    assert rival.title == (
        "transport, EMA codes, epsilon 10..300, balance 1..0.1, ema decay 0.9, rate 2, start kmeans, standardised true"
    )
    quantizer = rival.make(64, 4).quantizer
    assert quantizer.ema_decay == 0.9 and quantizer.learns_by_average
    assert find_rival("transport,iterations=3,use_projection=false").make(64, 4).quantizer.iterations == 3
    assert find_rival("ema,decay=0.9").make(64, 4).module._codebook.decay == 0.9
    with pytest.raises(ValueError, match="must be name=value, got 'epsilon' in 'transport,epsilon'"):
        find_rival("transport,epsilon")
    with pytest.raises(ValueError, match="unknown rival 'best'"):
        find_rival("best,epsilon=1")
    for name, message in (
        ("transport,epsilom=3", "rival 'transport,epsilom=3': .*unexpected keyword argument 'epsilom'"),
        ("transport,start=other", "start must be kmeans"),
        ("transport,epsilon=1..x", "could not convert"),
    ):
        with pytest.raises(ValueError, match=message):
            Comparison(arguments.ComparisonArguments(rivals=[name], output_dir="x"), DataArguments(dataset="x"))


# ---- the report ------------------------------------------------------------------------------------------------------


def result(rival, rate, seed, validation, test):
    scores = {"psnr": 20.0, "ssim": 0.5, "codebook_usage": 99.0, "perplexity": 50.0}
    parts = {"validation": {"mse": validation}, "test": {"mse": test, **scores}, "train": {"mse": 0.01}}
    return {"rival": rival, "learning_rate": rate, "seed": seed, "seconds": 1.0, "device": "CPU", **parts}


def test_the_best_rate_is_chosen_on_held_out_images():
    runs = [
        *(result("ema", 1e-3, seed, 0.3, 0.1) for seed in (0, 1)),  # best on the test images
        *(result("ema", 1e-2, seed, 0.2, test) for seed, test in ((0, 0.4), (1, 0.6), (2, 0.5))),
        *(result("ema", 1e-1, seed, validation, 0.1) for seed, validation in ((0, 0.1), (1, None))),  # diverges
        result("fsq", 1e-3, 0, None, None),
    ]
    assert comparison_report.best_rates(runs) == {"ema": 1e-2}
    runs.append(result("ema", 1e-2, 3, None, None))  # a seed that diverges is not in the mean, and is told
    runs[-1]["train"]["mse"] = None
    [row] = comparison_report.summarise(runs, ["ema", "fsq"])
    assert row["seeds"] == [0, 1, 2] and row["diverged_seeds"] == [3]
    assert row["mse"] == pytest.approx(0.5) and row["mse_of_seeds"] == [0.4, 0.6, 0.5]
    assert row["mse_standard_error"] == pytest.approx(0.1 / math.sqrt(3))
    shown = comparison_report.tables([row])
    assert "| EMA codes, k-means start, restart | 0.01 | 0.5000 | 0.0577 |" in shown and "| 3 of 4 |" in shown
    assert "| EMA codes, k-means start, restart | 0.1000 | 0.5000 | 0.1000 |" in shown


def test_a_comparison_without_any_result(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(result("fsq", 1e-3, 0, None, None)))
    with pytest.raises(ValueError, match="every run in .* diverged: try lower --learning-rates"):
        comparison_report.write_comparison(tmp_path, comparison_report.read_runs(tmp_path), ["fsq"], {})


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    """Started again, it runs only what is missing, and with the same result."""
    words = ["--dataset", "fashion_mnist_sample", "--num-channels", "1", "--image-size", "16", "--codebook-size", "64"]
    words += ["--max-steps", "6", "--max-images", "300", "--rivals", "transport", "ema", "--output-dir", str(tmp_path)]
    words += ["--learning-rates", "1e-3", "1e-2", "--confirm-seeds", "1"]
    compare.main(words)
    assert "| transport, as in the paper |" in capsys.readouterr().out
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*.json")}
    assert len(runs) == 2 * 2 + 2
    removed = tmp_path / "runs" / "ema-lr0.01-seed0.json"
    before = json.loads(removed.read_text())
    removed.unlink()
    compare.main(words)
    after = json.loads(removed.read_text())
    assert {**before, "seconds": 0} == {**after, "seconds": 0}
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*.json")}
    assert {path for path in runs if runs[path] != again[path]} == {removed}
    assert {"results.md", "rates.png", "reconstructions.png"} < {path.name for path in tmp_path.iterdir()}
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["dataset"] == "fashion_mnist_sample" and len(results["settings"]["images_sha256"]) == 64
    assert len(results["runs"]) == 6 and [row["rival"] for row in results["rows"]] == ["transport", "ema"]
    assert comparison_report.summarise(results["runs"], ["transport", "ema"]) == results["rows"]
    with pytest.raises(SystemExit, match="1"):
        compare.main([*words, "--max-steps", "7"])
    assert "holds a comparison with --max-steps 6, not 7" in capsys.readouterr().err
