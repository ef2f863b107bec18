"""`optvq train` without a recipe: what it proposes, and what it does with it."""

import re

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from optvq_hf import OptVQModel
from optvq_hf.commands.train import main
from optvq_hf.data.probe import ImageFacts
from optvq_hf.training.proposal import propose


@pytest.mark.parametrize(
    ("size", "num_colour", "recipe", "settings"),
    [
        (28, 0, "mnist", {}),
        (32, 5, "cifar10", {}),
        (47, 0, "mnist", {}),
        (64, 5, "cifar10", {"image_size": 64}),
        (64, 0, "cifar10", {"image_size": 64, "num_channels": 1}),
        (128, 5, "photos", {"image_size": 128}),
        (256, 5, "photos", {"image_size": 256}),
        (1000, 0, "photos", {"image_size": 256, "num_channels": 1}),
    ],
)
def test_what_fits_images_of_a_kind(size, num_colour, recipe, settings):
    proposal = propose(ImageFacts(num_images=64, size=size, num_colour=num_colour, total=None))
    assert (proposal.recipe, proposal.settings) == (recipe, settings)


@pytest.fixture
def pictures(tmp_path):
    """A folder of 30 colour pictures of mixed sizes, without an evaluation split."""
    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    folder.mkdir()
    for number in range(30):
        size = (int(rng.integers(34, 60)), int(rng.integers(34, 60)), 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


SHORT = ["--max-steps", "2", "--report-to", "none", "--codebook-size", "64"]


def test_a_folder_of_pictures_alone(pictures, tmp_path, capsys):
    out = tmp_path / "run"
    main(["--dataset", str(pictures), "--output-dir", str(out), *SHORT])
    shown = capsys.readouterr().out
    assert (
        "colour images of about 4" in shown
        and "proposing optvq train --config cifar10 --eval-fraction 0.1 --batch-size 16" in shown
    )
    assert "needs " in shown and "tokens per step; memory about" in shown
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert (recipe["batch_size"], recipe["eval_fraction"], recipe["max_steps"], recipe["codebook_size"]) == (
        16,
        0.1,
        2,
        64,
    )
    assert re.search(r"split train \(a random 10 %, seed 0\): [1-9] images", shown)
    assert OptVQModel.from_pretrained(out).config.num_channels == 3


def test_flags_come_first_and_a_model_is_not_proposed_for(pictures, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--dataset", str(pictures), "--output-dir", str(out), *SHORT]
    main([*flags, "--batch-size", "4", "--eval-split", "train[:5]", "--num-codebook-heads", "2"])
    shown = capsys.readouterr().out
    assert "proposing" in shown and "split train[:5]: 5 images" in shown
    assert OptVQModel.from_pretrained(out).config.num_codebook_heads == 2
    main(
        [
            *flags[:2],
            *SHORT,
            "--output-dir",
            str(tmp_path / "more"),
            "--model",
            str(out),
            "--batch-size",
            "4",
            "--eval-fraction",
            "0.2",
        ]
    )
    shown = capsys.readouterr().out
    assert "proposing" not in shown and re.search(r"split train \(a random 20 %, seed 0\): \d+ images", shown)


def test_what_cannot_fit_is_refused_before_anything_is_made(pictures, tmp_path, capsys):
    for flags in (["--codebook-size", "1000000000"], ["--backbone", "vqgan", "--image-size", "8192"]):
        with pytest.raises(SystemExit) as stop:
            main(["--dataset", str(pictures), "--output-dir", str(tmp_path / "run"), "--batch-size", "2", *flags])
        assert stop.value.code == 1
        assert "error: the run needs about" in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "run").exists()


def test_colour_in_a_grayscale_model_is_said(pictures, tmp_path, capsys):
    flags = ["--backbone", "plain_cnn", "--image-size", "32", "--num-channels", "1", "--codebook-dim", "8"]
    data = [
        "--dataset",
        str(pictures),
        "--eval-fraction",
        "0.2",
        "--batch-size",
        "4",
        "--output-dir",
        str(tmp_path / "run"),
    ]
    main([*data, *flags, *SHORT])
    shown = capsys.readouterr().out
    assert re.search(r"warning: (\d+) of \1 images looked at have colour, and the model is grayscale", shown)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_frozen_parts_stay(trained_folder, tmp_path, part):
    data = ["--dataset", "fashion_mnist_sample", "--eval-split", "test[:8]", "--report-to", "none", "--max-steps", "3"]
    main(
        ["--model", str(trained_folder), *data, "--output-dir", str(tmp_path), f"--freeze-{part}", "--freeze-codebook"]
    )
    before, after = (OptVQModel.from_pretrained(folder) for folder in (trained_folder, tmp_path))
    frozen = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv.")}[part]
    for name, parameter in before.named_parameters():
        is_frozen = name.startswith((*frozen, "quantizer."))
        assert np.array_equal(parameter.detach(), after.get_parameter(name).detach()) == is_frozen, name


def test_broken_pictures_in_the_evaluation_split_are_skipped_and_counted(trained_folder, tmp_path, capsys):
    from optvq_hf.commands.evaluate import main as evaluate

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)) for _ in range(12)]
    images[3] = {"bytes": b"broken", "path": "three.png"}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": images}, features).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    evaluate(
        [
            "--model",
            str(trained_folder),
            "--dataset",
            str(tmp_path),
            "--output-dir",
            str(tmp_path / "out"),
            "--batch-size",
            "5",
        ]
    )
    metrics = yaml.safe_load((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["num_images"], metrics["num_unreadable"]) == (11, 1)
    assert (
        "unreadable 1 of 12 images, the last: cannot read image three.png: not an image file" in capsys.readouterr().out
    )
