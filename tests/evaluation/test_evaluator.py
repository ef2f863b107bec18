import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from builders import make, make_untrained, pixels, plain_config
from optvq_hf.commands.evaluate import main
from optvq_hf.data.arguments import DataArguments
from optvq_hf.data.batches import EvaluationBatches, evaluation_batches
from optvq_hf.evaluation import evaluator
from optvq_hf.evaluation.codecs import Codec
from optvq_hf.evaluation.evaluator import Processes, evaluate_codecs, evaluate_model
from optvq_hf.evaluation.gallery import Gallery
from optvq_hf.evaluation.tables import Row, format_table, rows_of
from optvq_hf.image_processing_optvq import OptVQImageProcessor


METRICS = ("mse", "psnr", "ssim", "psnr_luma", "ssim_luma", "fid")


def test_metrics_are_those_of_the_models_own_codes(trained_model, test_pixels):
    images = test_pixels[:100]
    [evaluation] = evaluate_model(trained_model, images.split(32), ["nearest"]).values()
    with torch.no_grad():
        codes = trained_model.encode(images).codes
        reconstruction = trained_model.decode(codes=codes).reconstruction.clamp(-1, 1)
    metrics = evaluation.metrics
    assert metrics["num_images"] == 100
    assert metrics["mse"] == pytest.approx((reconstruction - images).square().mean().item(), rel=1e-5)
    assert metrics["codebook_usage"] == pytest.approx(100 * len(codes.unique()) / 1024)
    assert [len(codes[:, head].unique()) * 100 / 1024 for head in range(4)] == metrics["codebook_usage_per_head"]
    assert evaluation.code_counts.shape == (1, 4, 1024) and "mse_per_level" not in metrics
    assert torch.equal(evaluation.code_counts.sum((0, 1)), codes.flatten().bincount(minlength=1024))
    assert torch.equal(evaluation.originals, images[:16]) and evaluation.reconstructions.shape == (16, 1, 32, 32)
    # 8 x 8 tokens of 4 codes of 10 bits, for 32 x 32 pixels.
    assert metrics["bits_per_token"] == 40 and metrics["bits_per_pixel"] == pytest.approx(40 / 16)
    assert metrics["entropy_bits_per_pixel"] == pytest.approx(sum(metrics["entropy_per_head"]) / 16)


def test_examples_are_the_best_the_median_and_the_worst(trained_model, test_pixels):
    images = test_pixels[:90]
    [evaluation] = evaluate_model(trained_model, images.split(32), ["nearest"]).values()
    with torch.no_grad():
        reconstruction = trained_model(images).reconstruction
    errors = (reconstruction.clamp(-1, 1) - images).square().mean(dim=(1, 2, 3))
    originals, shown = evaluation.examples
    assert originals.shape == shown.shape == (24, 1, 32, 32)
    order = errors.argsort()
    assert torch.equal(originals[:8], images[order[:8]]) and torch.equal(originals[16:], images[order[-8:]])
    torch.testing.assert_close(shown[:8], reconstruction[order[:8]], rtol=1e-4, atol=1e-4)
    middle = (shown[8:16].clamp(-1, 1) - originals[8:16]).square().mean(dim=(1, 2, 3))
    ranks = torch.searchsorted(errors.sort().values, middle.sort().values)
    assert ranks.min() > 0.25 * 90 and ranks.max() < 0.75 * 90


def test_galleries_of_parts_add_up():
    errors, images = torch.rand(300, generator=torch.Generator().manual_seed(0)), torch.randn(300, 1, 2, 2)
    whole, parts = Gallery(), [Gallery(), Gallery()]
    for batch, number in enumerate(torch.arange(300).split(7)):
        for gallery in (whole, parts[batch % 2]):
            gallery.add(batch, errors[number], images[number], images[number])
    parts[0].extend(parts[1])
    median = errors.median().item()
    for one, other in ((whole.first(), parts[0].first()), (whole.examples(median), parts[0].examples(median))):
        assert [image.place for image in one] == [image.place for image in other]
    assert len(whole.kept) <= 16 + 8 + 8 + 32


@pytest.fixture(scope="module")
def colourful(small_network):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "load_network", lambda name, device: small_network)
        yield make(), torch.rand(70, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.fixture(scope="module")
def in_one_batch(colourful):
    model, images = colourful
    return evaluate_model(model, [images], ["nearest"], metrics=METRICS)["nearest"]


@pytest.mark.parametrize("size", [64, 7, 1])
def test_values_do_not_depend_on_the_batch(colourful, in_one_batch, size):
    model, images = colourful
    [result] = evaluate_model(model, images.split(size), ["nearest"], metrics=METRICS).values()
    check_same(result, in_one_batch)


def check_same(result, expected):
    intervals, expected_intervals = result.metrics["intervals"], expected.metrics["intervals"]
    for name, value in expected.metrics.items():
        if name != "intervals":
            assert result.metrics[name] == pytest.approx(value, rel=1e-5), name
    assert intervals.keys() == expected_intervals.keys() == set(METRICS) - {"fid"}
    for name, interval in intervals.items():
        assert interval == pytest.approx(expected_intervals[name], rel=1e-5), name
        assert interval[0] < result.metrics[name] < interval[1]
    assert result.images_digest == expected.images_digest and torch.equal(result.code_counts, expected.code_counts)
    assert torch.equal(result.originals, expected.originals)


def test_values_do_not_depend_on_the_processes(colourful, in_one_batch, monkeypatch):
    """Both shares are measured here, the second first; `tests/distributed` does it in two processes."""
    model, images = colourful
    entries = []

    def gather(self, entry):
        entries.insert(0, entry)
        return entries

    monkeypatch.setattr(Processes, "gather", gather)
    batches = images.split(8)
    options = {"assignments": ["nearest"], "metrics": METRICS}
    assert evaluate_model(model, batches[1::2], **options, processes=Processes(1, 2)) == {}
    result = evaluate_model(model, batches[0::2], **options, processes=Processes(0, 2))
    check_same(result["nearest"], in_one_batch)


def test_values_do_not_depend_on_the_processes_where_a_batch_has_no_readable_image(
    trained_model, tmp_path, monkeypatch
):
    """The shares are measured here, the second first; each gets at once what all others give."""
    for number in range(12):
        picture = Image.effect_noise((32, 32), 10 + 8 * number)
        picture.save(tmp_path / f"{number:02}.png")
    for number in (4, 5):  # the third batch of two, of the first process
        (tmp_path / f"{number:02}.png").write_bytes(b"no picture")
    data, processor = DataArguments(dataset=str(tmp_path), eval_split="train"), OptVQImageProcessor(
        num_channels=1, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )  # fmt: skip
    [whole] = evaluate_model(trained_model, evaluation_batches(data, processor, 2), ["nearest"]).values()
    shares = [evaluation_batches(data, processor, 2, None, index, 2) for index in range(2)]
    gathered = {EvaluationBatches: [], tuple: []}

    def gather(self, entry):
        kind = EvaluationBatches if isinstance(entry, dict) else tuple
        gathered[kind].insert(0, entry)
        return gathered[kind]

    monkeypatch.setattr(Processes, "gather", gather)
    for index in (1, 0):
        found = evaluate_model(trained_model, shares[index], ["nearest"], processes=Processes(index, 2))
    assert found["nearest"].images_digest == whole.images_digest and whole.metrics["num_images"] == 10
    assert found["nearest"].metrics["intervals"] == whole.metrics["intervals"]
    assert shares[0].counts.keys() == {0, 2, 4} and (shares[0].num_images, shares[0].num_unreadable) == (12, 2)


@pytest.mark.parametrize(
    ("encode", "error", "message"),
    [
        (lambda codes: codes.float(), ValueError, "codes must be integers, got torch.float32"),
        (lambda codes: codes > 3, ValueError, "codes must be integers, got torch.bool"),
        (lambda codes: codes + 2**32, IndexError, r"codes must lie in \[0, 8\), got values from 4294967296 to"),
        (lambda codes: codes - 1, IndexError, r"codes must lie in \[0, 8\), got values from -1 to"),
        (lambda codes: codes[:, 0], ValueError, r"must encode 4 images to codes \(B, heads, h, w\), got \(4, 16, 16\)"),
        (lambda codes: codes[:2], ValueError, r"must encode 4 images to codes .* got \(2, 1, 16, 16\)"),
    ],
)
def test_codecs_that_give_no_codes(encode, error, message):
    def decode(codes):
        raise AssertionError("it got codes that are none")

    images = pixels(4, 1, 16, 16)
    images[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])
    codec = Codec(lambda x: encode(((x + 1) * 3.5).round().long()), decode, 8)
    with pytest.raises(error, match=message):
        evaluate_codecs({"it": codec}, [images])


def test_codes_of_every_batch_are_checked():
    codec = Codec(lambda x: ((x + 1) * 3.5).round().long(), lambda codes: codes / 3.5 - 1, 4)
    dark, bright = torch.full((2, 1, 16, 16), -0.9), torch.full((2, 1, 16, 16), 0.9)
    with pytest.raises(IndexError, match=r"codes must lie in \[0, 4\), got values from 7 to 7"):
        evaluate_codecs({"it": codec}, [dark, bright])


@pytest.mark.parametrize(
    ("metric", "shape", "message"),
    [
        ("fid", (4, 16, 16), "fid needs images of 1 or 3 channels, got 4"),
        ("psnr_luma", (2, 16, 16), "psnr_luma needs images of 1 or 3 channels, got 2"),
    ],
)
def test_images_that_a_metric_is_not_of_are_not_encoded(metric, shape, message, monkeypatch, small_network):
    monkeypatch.setattr(evaluator, "load_network", lambda name, device: small_network)
    with pytest.raises(ValueError, match=message):
        evaluate_codecs({"it": Codec(pytest.fail, pytest.fail, 8)}, [torch.zeros(2, *shape)], metrics=[metric])


def test_assignments_are_compared_on_the_same_weights(tmp_path, capsys):
    """Of a model that was trained for long enough: averaged potentials are of some 70 steps."""
    model = Path(__file__).parents[2] / "model_cards" / "fashion_mnist"
    assignments = ["potentials", "nearest", "sinkhorn"]
    flags = ["--dataset", "fashion_mnist_sample", "--max-images", "200", "--output-dir", str(tmp_path)]
    main(["--model", str(model), "--assignment", *assignments, *flags])
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert list(report["by_assignment"]) == assignments and report["assignment"] == "potentials"
    assert report["mse"] == report["by_assignment"]["potentials"]["mse"] and report["num_images"] == 200
    assert len({metrics["mse"] for metrics in report["by_assignment"].values()}) == 3
    # Transport evens out how often codes are used, on the batch itself and through what it left in training.
    perplexity = {name: metrics["perplexity"] for name, metrics in report["by_assignment"].items()}
    assert perplexity["sinkhorn"] > perplexity["nearest"] and perplexity["potentials"] > perplexity["nearest"]
    for name in ("reconstructions.png", "examples.png", "codebook_usage.png"):
        assert (tmp_path / name).exists()
    shown = capsys.readouterr().out
    assert format_table(rows_of(report), ["mse", "psnr", "ssim"]) in shown and str(tmp_path / "metrics.json") in shown


def test_levels_are_scored_one_by_one():
    """Codes of each level are those of a codebook of its own, and pictures get nearer to the original with each."""
    model = make_untrained(plain_config(num_quantizers=3, codebook_size=16)).train()
    optimizer, images = torch.optim.AdamW(model.parameters(), 3e-3), pixels(16, 3, 32, 32) * 0.2
    for _ in range(60):
        optimizer.zero_grad()
        model(images).loss.backward()
        optimizer.step()
    [evaluation] = evaluate_model(model.eval(), images.split(8), ["nearest"]).values()
    metrics, codes = evaluation.metrics, model.encode(images).codes
    assert evaluation.code_counts.shape == (3, 2, 16)
    assert torch.equal(evaluation.code_counts[1, 0], codes[:, 2].flatten().bincount(minlength=16))
    usage = [len(part.unique()) * 100 / 16 for part in codes.chunk(3, dim=1)]
    assert metrics["codebook_usage_per_level"] == usage and metrics["codebook_usage"] == pytest.approx(sum(usage) / 3)
    assert len(metrics["perplexity_per_level"]) == len(metrics["psnr_per_level"]) == 3
    for level, error in enumerate(metrics["mse_per_level"], start=1):
        decoded = model.decode(codes=codes[:, : 2 * level]).reconstruction.clamp(-1, 1)
        assert error == pytest.approx((decoded - images).square().mean().item(), rel=1e-4)
    assert metrics["mse_per_level"][2] == metrics["mse"]
    shown = format_table([Row("", "nearest", metrics)], ["mse"])
    assert (
        "PSNR of the first levels" in shown and " ".join(f"{value:.2f}" for value in metrics["psnr_per_level"]) in shown
    )


def test_no_images(trained_model):
    with pytest.raises(ValueError, match="no images to evaluate on"):
        evaluate_model(trained_model, [], ["nearest"])
    with pytest.raises(ValueError, match=r"unknown metric 'lpips': they are mse, .*fd-timm:NAME"):
        evaluate_codecs({}, [], metrics=["lpips"])
