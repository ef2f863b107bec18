"""Trains a narrow `AutoencoderKL` of diffusers on images: a continuous autoencoder that `optvq transplant` can start from.

    python scripts/examples/train_autoencoder_kl.py --dataset path/to/images --output-dir runs/vae

8 x 8 pixels become a token of 8 numbers; 1.2 million parameters, trained on crops of 64 pixels. 3,200 steps take about half an
hour on one CPU thread; a GPU, where there is one, trains in bfloat16. It shows the structure of Stable Diffusion's
autoencoder, not its quality: no perceptual and no adversarial loss.
"""

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch.nn import functional as F
from tqdm import tqdm

from optvq_hf import OptVQImageProcessor
from optvq_hf.data.arguments import DataArguments
from optvq_hf.data.batches import training_batches
from optvq_hf.training.optimization import make_optimizer, make_schedule


KL_WEIGHT = 1e-6  # as Stable Diffusion's
SAVE_EVERY = 400  # steps
CARD = """---
license: apache-2.0
---
A narrow `AutoencoderKL`, trained by scripts/examples/train_autoencoder_kl.py of optvq_hf.
"""


def make_model(width: int, image_size: int) -> Any:  # diffusers annotates results of encode and decode as tuples too
    """A new autoencoder without attention: (B, 3, H, W) in [-1, 1] <-> (B, 8, H/8, W/8)."""
    widths = (width, *(2 * width,) * 3)
    settings: dict[str, Any] = {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "mid_block_add_attention": False,
        "norm_num_groups": 8,
        "latent_channels": 8,
        "sample_size": image_size,
    }
    return AutoencoderKL(**settings)


def loss_of(model: Any, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch, and its mean squared error."""
    posterior = model.encode(pixel_values).latent_dist
    reconstruction = model.decode(posterior.sample()).sample
    squared = F.mse_loss(reconstruction, pixel_values)
    return F.l1_loss(reconstruction, pixel_values) + squared + KL_WEIGHT * posterior.kl().mean(), squared.detach()


def save(model: Any, folder: Path, pixel_values: torch.Tensor) -> None:
    """Saves the model with the scale of its latents on these images."""
    with torch.no_grad():
        deviation = model.encode(pixel_values).latent_dist.mean.std().item()
    model.register_to_config(scaling_factor=1 / deviation)
    model.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", required=True, help="as of `optvq train`")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument(
        "--image-size", type=int, default=128, help="images are resized to so many pixels, then cropped"
    )
    parser.add_argument("--crop", type=int, default=64, help="side of the random crops, in pixels")
    parser.add_argument(
        "--width", type=int, default=32, help="channels at full size, a multiple of 8; twice as many below"
    )
    parser.add_argument("--max-steps", type=int, default=3200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--num-workers", type=int, default=0, help="processes that decode images")
    options = parser.parse_args()

    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    torch.manual_seed(0)
    model = make_model(options.width, options.image_size).to(accelerator.device)
    crop = {"height": options.crop, "width": options.crop}
    image_processor = OptVQImageProcessor(size={"shortest_edge": options.image_size}, crop_size=crop)
    data = DataArguments(dataset=options.dataset, random_crop=True, random_flip=True, num_workers=options.num_workers)
    batches = training_batches(data, image_processor, options.batch_size)
    optimizer = make_optimizer(model, options.learning_rate, weight_decay=0.01)
    schedule = make_schedule(optimizer, options.max_steps, warmup_ratio=0.05)
    error = torch.zeros((), device=accelerator.device)
    bar = tqdm(islice(batches, options.max_steps), total=options.max_steps, mininterval=10)
    for step, pixel_values in enumerate(bar, 1):
        pixel_values = pixel_values.to(accelerator.device)
        with accelerator.autocast():
            loss, squared = loss_of(model, pixel_values)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        error += (squared - error) / min(step, 50)  # its mean over about 50 steps
        if step % SAVE_EVERY == 0 or step == options.max_steps:
            bar.set_postfix(mse=f"{error.item():.5f}", refresh=False)
            save(model, options.output_dir, pixel_values)
    print(f"mean squared error of the last steps {error.item():.5f}; model {options.output_dir}")


if __name__ == "__main__":
    main()
