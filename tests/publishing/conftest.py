from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optvq_hf.training.discriminator import PatchDiscriminator


@pytest.fixture(autouse=True)
def no_run_before(fresh_accelerator):
    """Every test may be the first to run something."""


@pytest.fixture
def folder(golden, tmp_path) -> Path:
    """A published folder of the original: the small VQGAN, with a discriminator and a perceptual network in it."""
    source = golden / "model_diffusion_small"
    path = tmp_path / "published"
    path.mkdir()
    weights = load_file(source / "model_hf.safetensors")
    discriminator = PatchDiscriminator(3, 8, 2).state_dict()
    weights |= {f"model.loss.discriminator.{name}": tensor for name, tensor in discriminator.items()}
    weights["model.loss.perceptual_loss.lin0.model.1.weight"] = torch.zeros(1, 64, 1, 1)
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text((source / "config.json").read_text())
    return path
