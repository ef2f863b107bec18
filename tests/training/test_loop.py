"""The loop, through the `optvq train` command, on the embedded dataset."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from optvq_hf import OptVQModel
from optvq_hf.commands.train import main
from optvq_hf.training.arguments import (
    CodebookArguments,
    ObjectiveArguments,
    OptimizationArguments,
    RecordArguments,
    TrainingArguments,
)


RECIPE = str(Path(__file__).parents[2] / "scripts" / "recipes" / "quickstart.yaml")


def run(folder, *flags, steps=6):
    small = ["--report-to", "none", "--batch-size", "16", "--eval-split", "test[:40]"]
    main(["--config", RECIPE, "--output-dir", str(folder), "--max-steps", str(steps), *small, *flags])
    return load_file(folder / "model.safetensors")


def test_training_lowers_the_loss_and_uses_the_codebook(trained_folder):
    log = [json.loads(line) for line in (trained_folder / "training_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [10, 20, 30, 40, 50, 60]
    assert log[-1]["loss"] < 0.5 * log[0]["loss"] and log[-1]["psnr"] > log[0]["psnr"] + 3
    assert log[-1]["codebook_usage"] > 90
    assert log[-1]["learning_rate"] < 0.1 * log[0]["learning_rate"] <= 2e-3
    assert all(entry["images_per_second"] > 0 and 1 <= entry["perplexity"] <= 1024 for entry in log)


def test_everything_a_run_leaves(trained_folder):
    for name in ("training_curves.png", "reconstructions.png", "codebook_usage.png", "images/step-0000030.png"):
        with Image.open(trained_folder / name) as picture:
            assert min(picture.size) > 60 and picture.getextrema() != (0, 0)
    metrics = json.loads((trained_folder / "metrics.json").read_text())
    assert metrics["num_images"] == 1000 and 0 < metrics["mse"] < 0.2 and metrics["assignment"] == "nearest"
    settings = yaml.safe_load((trained_folder / "recipe.yaml").read_text())
    assert (
        settings["max_steps"] == 60
        and settings["codebook_size"] == 1024
        and settings["dataset"] == "fashion_mnist_sample"
    )
    assert not OptVQModel.from_pretrained(trained_folder).training


def test_tensorboard_gets_curves_and_images(trained_folder):
    events = EventAccumulator(str(trained_folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [10, 20, 30, 40, 50, 60]
    assert [event.step for event in events.Images("reconstructions")] == [30, 60]


def test_the_settings_of_a_run_repeat_it(tmp_path):
    """recipe.yaml is itself a recipe, and the seed decides everything."""
    first = run(tmp_path / "first", "--seed", "7")
    main(["--config", str(tmp_path / "first" / "recipe.yaml"), "--output-dir", str(tmp_path / "again")])
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_seed_matters(tmp_path):
    weights = [run(tmp_path / str(seed), "--seed", str(seed), steps=2)["decoder.0.weight"] for seed in (0, 1)]
    assert not torch.equal(*weights)


def test_going_on_from_a_model_with_another_setting(trained_folder, tmp_path):
    flags = ["--dataset", "fashion_mnist_sample", "--max-steps", "2", "--report-to", "none", "--learning-rate", "1e-5"]
    flags += ["--eval-split", "test[:40]"]
    main(["--model", str(trained_folder), "--sinkhorn-epsilon", "20", "--output-dir", str(tmp_path), *flags])
    model = OptVQModel.from_pretrained(tmp_path)
    assert model.config.sinkhorn_epsilon == 20 and model.quantizer.num_updates == 62
    before, after = (
        load_file(folder / "model.safetensors")["decoder.0.weight"] for folder in (trained_folder, tmp_path)
    )
    assert 0 < (before - after).abs().max() < 1e-3


def test_bf16_trains(tmp_path):
    state = run(tmp_path, "--mixed-precision", "bf16", steps=20)
    assert all(tensor.dtype in (torch.float32, torch.int64) and tensor.isfinite().all() for tensor in state.values())
    log = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]


def test_a_stream_trains(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    run(tmp_path, "--streaming", "--shuffle-buffer", "200", "--eval-split", "test", steps=3)
    assert json.loads((tmp_path / "metrics.json").read_text())["num_images"] == 1000


def test_epochs_and_checkpoints(tmp_path):
    flags = ["--train-split", "train[:128]", "--eval-split", "test[:8]", "--save-every", "3", "--log-every", "2"]
    recipe = yaml.safe_load(Path(RECIPE).read_text())
    recipe.pop("max_steps")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "num_epochs": 2, "batch_size": 32}))
    main(
        [
            "--config",
            str(tmp_path / "recipe.yaml"),
            "--output-dir",
            str(tmp_path / "out"),
            "--report-to",
            "none",
            *flags,
        ]
    )
    log = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [2, 4, 6, 8]
    checkpoints = {step: OptVQModel.from_pretrained(tmp_path / "out" / f"checkpoint-{step}") for step in (3, 6)}
    assert [model.quantizer.num_updates.item() for model in checkpoints.values()] == [3, 6]
    assert not (tmp_path / "out" / "checkpoint-9").exists()


def test_the_vqgan_trains(tmp_path):
    small = {
        "--backbone": "vqgan",
        "--base-channels": "32",
        "--num-res-blocks": "1",
        "--latent-channels": "32",
        "--batch-size": "8",
        "--eval-split": "test[:8]",
    }
    flags = [part for pair in small.items() for part in pair] + ["--channel-multiplier", "1", "1", "2"]
    run(tmp_path, *flags, "--attn-resolutions", "8", steps=12)
    log = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    assert len(OptVQModel.from_pretrained(tmp_path).encoder.stages) == 3


def test_codes_and_pixels_are_identical_in_a_new_process(trained_folder, test_pixels, tmp_path, new_process):
    """Through the Auto classes, from the saved folder alone."""
    model = OptVQModel.from_pretrained(trained_folder)
    with torch.no_grad():
        codes = model.encode(test_pixels[:64]).codes
        expected = {"pixels": test_pixels[:64], "codes": codes, "decoded": model.decode(codes=codes).reconstruction}
    torch.save(expected, tmp_path / "expected.pt")
    script = """
import sys, torch, optvq_hf
from datasets import load_dataset
from optvq_hf.data.loading import EMBEDDED
from transformers import AutoImageProcessor, AutoModel
folder, expected = sys.argv[1], torch.load(sys.argv[2])
model, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
images = load_dataset(str(EMBEDDED["fashion_mnist_sample"]), split="test[:64]")["image"][:]
pixels = processor(images, return_tensors="pt")["pixel_values"]
with torch.no_grad():
    codes = model.encode(pixels).codes
    decoded = model.decode(codes=codes).reconstruction
assert torch.equal(pixels, expected["pixels"])
assert torch.equal(codes, expected["codes"])
assert torch.equal(decoded, expected["decoded"])
print("identical")
"""
    done = new_process(script, trained_folder, tmp_path / "expected.pt")
    assert done.stdout.strip() == "identical", done.stderr


@pytest.mark.parametrize(
    ("arguments", "fields", "message"),
    [
        (TrainingArguments, {"batch_size": 0}, "batch_size must be greater than 0, got 0"),
        (TrainingArguments, {"max_steps": 0}, "max_steps must be at least 1, got 0"),
        (TrainingArguments, {"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        (OptimizationArguments, {"warmup_ratio": 1.0}, r"warmup_ratio must lie in \[0, 1\), got 1.0"),
        (OptimizationArguments, {"weight_decay": -1.0}, "weight_decay must be 0 or greater"),
        (ObjectiveArguments, {"lecam_weight": -1.0}, "lecam_weight must be 0 or greater"),
        (
            ObjectiveArguments,
            {"discriminator_learning_rate": 0.0},
            "discriminator_learning_rate must be greater than 0",
        ),
        (CodebookArguments, {"epsilon_schedule": [10.0]}, "needs two values, the first and the last, got 1"),
        (CodebookArguments, {"epsilon_schedule": [10.0, 0.0]}, "epsilon_schedule must be finite and greater than 0"),
        (CodebookArguments, {"balance_schedule": [1.0, 2.0]}, r"balance_schedule must lie in \[0, 1\]"),
        (RecordArguments, {"log_every": 0}, "log_every must be at least 1"),
    ],
)
def test_wrong_arguments(arguments, fields, message):
    with pytest.raises(ValueError, match=message):
        arguments(**fields)
