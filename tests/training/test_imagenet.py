"""The paper's ImageNet recipes: the first step at full size, and that a smaller one learns."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from torchmetrics.functional.image.lpips import _LPIPS

from optvq_hf.commands.train import main
from optvq_hf.training.losses import perceptual


RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"


@pytest.fixture(autouse=True)
def random_vgg(monkeypatch):
    """The network of LPIPS with random weights, because the trained ones are a download."""

    def make(network):
        assert network == "vgg"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _LPIPS(pretrained=False, net=network, pnet_rand=True)

    monkeypatch.setattr(perceptual, "_download", make)
    monkeypatch.setattr("optvq_hf.commands.train.evaluate_and_report", lambda *arguments: None)


def run(recipe, folder, *flags):
    words = ["--dataset", "fashion_mnist_sample", "--eval-split", "test", "--output-dir", str(folder)]
    words += [
        "--num-workers",
        "0",
        "--log-every",
        "1",
        "--images-every",
        "0",
        "--report-to",
        "none",
        "--shuffle-buffer",
        "50",
    ]
    main(["--config", str(RECIPES / recipe), *words, *flags])
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_step_of_the_f16_recipe(tmp_path):
    """Nothing is smaller than in the recipe but the batch; the discriminator starts at once."""
    flags = ["--batch-size", "1", "--max-steps", "1", "--discriminator-start", "0"]
    [entry] = run("imagenet_f16_4heads.yaml", tmp_path, *flags)
    assert entry["perceptual"] != 0 and entry["gradient_norm"] > 0 and entry["adaptive_weight"] > 0
    assert entry["nonfinite_steps"] == 0 and math.isfinite(entry["loss"]) and entry["discriminator"] >= 0
    assert entry["discriminator_gradient_norm"] > 0


@pytest.mark.long
def test_a_narrow_one_learns(tmp_path):
    narrow = ["--base-channels", "32", "--num-res-blocks", "1", "--codebook-size", "256", "--codebook-dim", "32"]
    narrow += ["--latent-channels", "32", "--image-size", "64", "--attn-resolutions", "4", "--batch-size", "4"]
    log = run("imagenet_f16_4heads.yaml", tmp_path, *narrow, "--max-steps", "30", "--learning-rate", "1e-3")
    first, last = (sum(entry["loss"] for entry in part) / 5 for part in (log[:5], log[-5:]))
    assert last < 0.75 * first


def test_the_recipes_differ_in_what_their_names_say():
    recipes = {
        name: yaml.safe_load((RECIPES / f"imagenet_{name}.yaml").read_text())
        for name in ("f16_4heads", "f16_8heads", "f32")
    }
    reference = recipes["f16_4heads"]
    for name, expected in (
        ("f16_8heads", {"output_dir", "num_codebook_heads"}),
        ("f32", {"output_dir", "channel_multiplier", "attn_resolutions"}),
    ):
        assert recipes[name].keys() == reference.keys()
        assert {key for key, value in recipes[name].items() if value != reference[key]} == expected
