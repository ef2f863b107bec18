"""One run of a comparison: a tokenizer with a rival's quantizer, trained and scored as all others.

All runs have the same networks from the same first weights, the same batches, objective (mean absolute + mean squared error +
the quantizer's loss), optimizer (AdamW, one cycle) and steps. Their learning rates differ: each rival is shown at all of them.
"""

import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..backbone_optvq import OptVQPlainCNNDecoder, OptVQPlainCNNEncoder
from ..configuration_optvq import PLAIN_CNN_LATENT_CHANNELS, OptVQConfig
from ..image_processing_optvq import psnr
from ..training.codebook import cluster_centres, set_codebook, split_heads
from ..training.optimization import make_optimizer, make_schedule
from .codebook_usage import usage_and_perplexity
from .reconstruction_quality import structural_similarity
from .rivals import RIVALS, Ours, Rival, Theirs


BETA2, WARMUP, WEIGHT_DECAY, MAX_GRAD_NORM = 0.99, 0.05, 0.05, 1.0
# Images of the training split that are held out: the best learning rate is chosen on them, not on the test images.
VALIDATION_IMAGES, VALIDATION_SHARE = 2000, 0.1
CURVE_EVERY = 50  # steps
START_IMAGES = 1024  # whose latents are standardised and clustered
SHOWN = 8
SCORES = ("mse", "mse_standard_error", "psnr", "ssim", "codebook_usage", "perplexity")
NO_SCORES = dict.fromkeys(SCORES)


@dataclass(frozen=True)
class RunSettings:
    """Everything that decides the result of a run, beside the images."""

    rival: str
    learning_rate: float
    seed: int
    max_steps: int
    batch_size: int
    codebook_size: int
    codebook_dim: int

    @property
    def name(self) -> str:
        return f"{self.rival}-lr{self.learning_rate:g}-seed{self.seed}"


@dataclass(frozen=True)
class Images:
    """The images of a comparison, decoded once: (N, C, H, W) uint8 on a device."""

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor

    def save(self, path: Path) -> None:
        save_file(asdict(self), path)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "Images":
        with safe_open(path, "pt", device=str(device)) as file:
            return cls(**{name: file.get_tensor(name) for name in ("train", "validation", "test")})


def split_images(train: torch.Tensor, test: torch.Tensor) -> Images:
    """Holds out some of the training images, drawn at random with seed 0."""
    num_validation = min(VALIDATION_IMAGES, int(VALIDATION_SHARE * len(train)))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return Images(train[order[num_validation:]], train[order[:num_validation]], test)


def to_pixel_values(images: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


class Tokenizer(nn.Module):
    """The paper's plain CNN around a rival, as in [`OptVQModel`]: a token for every 4 x 4 pixels."""

    def __init__(self, rival: Ours | Theirs, num_channels: int, seed: int):
        super().__init__()
        config = OptVQConfig(backbone="plain_cnn", num_channels=num_channels)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encoder, self.decoder = OptVQPlainCNNEncoder(config), OptVQPlainCNNDecoder(config)
            self.to_latents = nn.Conv2d(PLAIN_CNN_LATENT_CHANNELS, rival.dim, kernel_size=1)
            self.from_latents = nn.Conv2d(rival.dim, PLAIN_CNN_LATENT_CHANNELS, kernel_size=1)
        self.rival: Ours | Theirs = rival

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> latents (B, dim, H/4, W/4)."""
        return self.to_latents(self.encoder(pixel_values))

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, C, H, W) -> reconstruction (B, C, H, W), codes, and the 0-dim loss of the quantizer."""
        quantized, codes, loss = self.rival(self.encode(pixel_values))
        return self.decoder(self.from_latents(quantized)), codes, loss


def run(settings: RunSettings, images: Images) -> tuple[dict[str, Any], torch.Tensor]:
    """Trains and scores one tokenizer.

    Returns:
        The result, ready for JSON, and reconstructions (8, C, H, W) uint8 of the first test images. The scores of
        a run that diverged are None.
    """
    rival, device = RIVALS[settings.rival], images.train.device
    torch.manual_seed(settings.seed)
    quantizer = rival.make(settings.codebook_size, settings.codebook_dim)
    tokenizer = Tokenizer(quantizer, images.train.shape[1], settings.seed).to(device)
    start = time.perf_counter()
    curve, diverged_at = _train(tokenizer, rival, settings, images.train)
    seconds = time.perf_counter() - start
    tokenizer.eval()
    parts = {
        "validation": images.validation,
        "test": images.test,
        "train": images.train[: len(images.validation)],
    }
    result: dict[str, Any] = {
        **asdict(settings),
        "title": rival.title,
        "num_parameters": sum(parameter.numel() for parameter in tokenizer.parameters()),
        "diverged_at": diverged_at,
        "curve": curve,
        **{name: _score(tokenizer, part) if diverged_at is None else NO_SCORES for name, part in parts.items()},
        "seconds": round(seconds, 2),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}",
        "versions": {"torch": torch.__version__},
    }
    shown = images.test[:SHOWN]
    return result, _reconstruct(tokenizer, shown) if diverged_at is None else torch.zeros_like(shown).cpu()


def _train(
    tokenizer: Tokenizer, rival: Rival, settings: RunSettings, images: torch.Tensor
) -> tuple[list[tuple[int, float]], int | None]:
    """Mean squared errors of training batches by step, and the step at which they were no numbers any more."""
    tokenizer.train()
    if rival.standardised:
        _standardise(tokenizer, images)
    _start_codes(tokenizer, rival, images, settings.seed)
    codebook = ()
    if isinstance(tokenizer.rival, Ours):
        quantizer = tokenizer.rival.quantizer
        codebook = (*quantizer.embedding.parameters(), *quantizer.projection.parameters())
    optimizer = make_optimizer(
        tokenizer, settings.learning_rate, WEIGHT_DECAY, BETA2, codebook, rival.codebook_multiplier
    )
    schedule = make_schedule(optimizer, settings.max_steps, WARMUP)
    error, curve = torch.zeros((), device=images.device), []
    for step, rows in enumerate(_batches(len(images), settings)):
        _follow_schedules(tokenizer, rival, step / max(settings.max_steps - 1, 1))
        pixel_values = to_pixel_values(images[rows.to(images.device)])
        try:
            reconstruction, _, loss = tokenizer(pixel_values)
        except ValueError:  # our quantizer refuses features that are no numbers
            if all(parameter.isfinite().all() for parameter in tokenizer.parameters()):
                raise
            return curve, step + 1
        difference = reconstruction - pixel_values
        squared = difference.square().mean()
        optimizer.zero_grad()
        (difference.abs().mean() + squared + loss).backward()
        nn.utils.clip_grad_norm_(tokenizer.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        error += squared.detach()
        if (step + 1) % CURVE_EVERY == 0 or step + 1 == settings.max_steps:
            mean = error.item() / (step % CURVE_EVERY + 1)
            if not math.isfinite(mean):
                return curve, step + 1
            curve.append((step + 1, mean))
            error.zero_()
    return curve, None


def _batches(num_images: int, settings: RunSettings) -> Iterator[torch.Tensor]:
    """Rows of every step: epoch by epoch in random order, the same for all rivals."""
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(settings.max_steps):
        while len(order) < settings.batch_size:
            order = torch.cat([order, torch.randperm(num_images, generator=generator)])
        yield order[: settings.batch_size]
        order = order[settings.batch_size :]


@torch.no_grad()
def _standardise(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    """Scales the last layer of the encoder such that every channel of the first latents has mean 0 and variance 1.

    Untrained networks give latents near 0, all of which lie nearest to one and the same of the codes that most rivals draw at
    first. Transport does not need it, nor do codes that start from features.
    """
    latents = tokenizer.encode(to_pixel_values(images[:START_IMAGES])).movedim(1, 0).flatten(1)
    deviation, mean = torch.std_mean(latents, dim=1)
    layer = tokenizer.to_latents
    layer.weight /= deviation[:, None, None, None]
    assert layer.bias is not None  # a convolution with a bias
    layer.bias.sub_(mean).div_(deviation)


@torch.no_grad()
def _start_codes(tokenizer: Tokenizer, rival: Rival, images: torch.Tensor, seed: int) -> None:
    if rival.codebook_start != "kmeans" or not isinstance(tokenizer.rival, Ours):
        return
    quantizer = tokenizer.rival.quantizer
    # At least four features for each code.
    num_images = max(START_IMAGES, 4 * quantizer.codebook_size // (images.shape[2] * images.shape[3] // 16))
    latents = [tokenizer.encode(to_pixel_values(some)) for some in images[:num_images].split(256)]
    features = split_heads(torch.cat(latents), quantizer.head_dim)
    set_codebook(quantizer, cluster_centres(features, quantizer.codebook_size, seed))


def _follow_schedules(tokenizer: Tokenizer, rival: Rival, progress: float) -> None:
    """As `optvq train`: epsilon geometrically, balance linearly."""
    if isinstance(tokenizer.rival, Ours):
        if rival.epsilon:
            first, last = rival.epsilon
            tokenizer.rival.quantizer.epsilon = first * (last / first) ** progress
        if rival.balance:
            first, last = rival.balance
            tokenizer.rival.quantizer.balance = first + (last - first) * progress


@torch.inference_mode()
def _score(tokenizer: Tokenizer, images: torch.Tensor) -> dict[str, float]:
    """Means over images, with codes as at inference."""
    squared, similarity, counts = [], [], []
    for some in images.split(250):
        pixel_values = to_pixel_values(some)
        reconstruction, codes, _ = tokenizer(pixel_values)
        reconstruction = reconstruction.clamp(-1, 1)
        squared.append((reconstruction - pixel_values).square().mean(dim=(1, 2, 3)))
        similarity.append(structural_similarity(reconstruction / 2 + 0.5, pixel_values / 2 + 0.5).float())
        counts.append(_count(codes if codes.ndim == 4 else codes[..., None], tokenizer.rival.num_codes))
    mse = torch.cat(squared)
    of_levels = [usage_and_perplexity(level.cpu().numpy()) for level in torch.stack(counts).sum(dim=0)]
    return {
        "mse": mse.mean().item(),
        "mse_standard_error": (mse.std() / len(mse) ** 0.5).item(),
        "psnr": psnr(mse).mean().item(),
        "ssim": torch.cat(similarity).mean().item(),
        "codebook_usage": sum(usage for usage, _ in of_levels) / len(of_levels),
        "perplexity": math.prod(perplexity for _, perplexity in of_levels),
    }


def _count(codes: torch.Tensor, num_codes: int) -> torch.Tensor:
    """(B, H, W, levels) codes -> (levels, num_codes): how often each code of each level occurs."""
    return torch.stack([torch.bincount(level.flatten(), minlength=num_codes) for level in codes.long().unbind(dim=-1)])


@torch.inference_mode()
def _reconstruct(tokenizer: Tokenizer, images: torch.Tensor) -> torch.Tensor:
    reconstruction = tokenizer(to_pixel_values(images))[0].clamp(-1, 1)
    return ((reconstruction + 1) * 127.5).round().to(torch.uint8).cpu()
