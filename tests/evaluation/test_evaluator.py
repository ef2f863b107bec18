import json

import pytest
import torch

from builders import make_untrained, pixels, plain_config
from optvq_hf.commands.evaluate import main
from optvq_hf.evaluation.evaluator import evaluate_model
from optvq_hf.evaluation.results import format_table


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


def test_assignments_are_compared_on_the_same_weights(trained_folder, tmp_path, capsys):
    assignments = ["potentials", "nearest", "sinkhorn"]
    flags = ["--dataset", "fashion_mnist_sample", "--max-images", "200", "--output-dir", str(tmp_path)]
    main(["--model", str(trained_folder), "--assignment", *assignments, *flags])
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert list(report["by_assignment"]) == assignments and report["assignment"] == "potentials"
    assert report["mse"] == report["by_assignment"]["potentials"]["mse"] and report["num_images"] == 200
    assert len({metrics["mse"] for metrics in report["by_assignment"].values()}) == 3
    # Transport evens out how often codes are used, on the batch itself and through what it left in training.
    perplexity = {name: metrics["perplexity"] for name, metrics in report["by_assignment"].items()}
    assert perplexity["sinkhorn"] > perplexity["nearest"] and perplexity["potentials"] > perplexity["nearest"]
    assert (tmp_path / "reconstructions.png").exists() and (tmp_path / "codebook_usage.png").exists()
    shown = capsys.readouterr().out
    assert format_table(report["by_assignment"]) in shown and str(tmp_path / "metrics.json") in shown


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


def test_no_images(trained_model):
    with pytest.raises(ValueError, match="no images to evaluate on"):
        evaluate_model(trained_model, [], ["nearest"])
