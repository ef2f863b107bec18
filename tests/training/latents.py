"""A model and its cached latents, on which a quantizer is trained."""

from pathlib import Path

import torch

from builders import make_untrained, plain_config
from optvq_hf.commands import tokenize
from optvq_hf.training.models import make_image_processor


def make_latents(folder: Path, num_images: int) -> Path:
    """Writes `model`, whose latents are spread, and `latents` of the first training images."""
    config = plain_config(
        image_size=16, num_channels=1, codebook_size=16, codebook_dim=4, use_codebook_projection=False
    )
    model = make_untrained(config)
    with torch.no_grad():
        model.quant_conv.weight.mul_(20)
        model.quant_conv.bias.copy_(torch.tensor([3.0, 0.0, -2.0, 0.0]))
    model.save_pretrained(folder / "model")
    make_image_processor(config).save_pretrained(folder / "model")
    of_images = ["--dataset", "fashion_mnist_sample", "--split", f"train[:{num_images}]"]
    of_model = ["--model", str(folder / "model"), "--output-dir", str(folder / "latents")]
    tokenize.main([*of_images, *of_model, "--latents"])
    return folder
