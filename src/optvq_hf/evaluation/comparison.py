"""One run of a comparison: a tokenizer with a rival's quantizer, trained and scored as all others.

All runs have the same networks from the same first weights, the same batches, objective (mean absolute + mean squared error +
the quantizer's loss), optimizer (AdamW, one cycle) and steps. Their learning rates differ: each rival is shown at all of them.
"""

import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..backbone_optvq import OptVQDecoder, OptVQEncoder, OptVQPlainCNNDecoder, OptVQPlainCNNEncoder
from ..configuration_optvq import PLAIN_CNN_LATENT_CHANNELS, OptVQConfig
from ..image_processing_optvq import psnr
from ..training.codebook import cluster_centres, set_codebook, split_heads
from ..training.optimization import make_optimizer, make_schedule
from .codebook_usage import usage_and_perplexity
from .image_digest import image_digests, images_sha256
from .rivals import Ours, Rival, Theirs, find_rival, make_rival
from .structural_similarity import SMALLEST_SIDE, structural_similarity


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
    """Everything that decides the result of a run, beside the images.

    Attributes:
        backbone: `plain_cnn`, the paper's for small images (4 x 4 pixels a token), or `vqgan`, a narrow one (8 x 8 pixels).
        latent_scale, latent_shift: Once codes have started, latents z become z * scale + shift: a start with codes that are far
            too wide (scale < 1) or that lie beside the latents. The latents of all rivals then have variance 1 before.
    """

    rival: str
    learning_rate: float
    seed: int
    max_steps: int
    batch_size: int
    codebook_size: int
    codebook_dim: int
    backbone: Literal["plain_cnn", "vqgan"] = "plain_cnn"
    latent_scale: float = 1.0
    latent_shift: float = 0.0

    @property
    def name(self) -> str:
        return run_name(self.rival, self.learning_rate, self.seed)


# Settings that all runs of a comparison share.
OF_ALL = tuple(field.name for field in fields(RunSettings) if field.name not in ("rival", "learning_rate", "seed"))


def run_name(rival: str, learning_rate: float, seed: int) -> str:
    """Name of a run's files: another one for every other rate."""
    return f"{rival}-lr{learning_rate!r}-seed{seed}"


@dataclass(frozen=True)
class Images:
    """The images of a comparison, decoded once: (N, C, H, W) uint8 on a device.

    Attributes:
        first: Training images of the first half of the steps, where the domain changes midway.
    """

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor
    first: torch.Tensor | None = None

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        return {name: part for name, part in vars(self).items() if part is not None}

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the images of each part, as `optvq evaluate` has it of those that it evaluates on."""
        return {
            name: images_sha256(digest for some in part.split(1024) for digest in image_digests(to_pixel_values(some)))
            for name, part in self.parts.items()
        }

    def save(self, path: Path) -> None:
        save_file(self.parts, path)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "Images":
        with safe_open(path, "pt", device=str(device)) as file:
            return cls(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118, it is no dict


def split_images(train: torch.Tensor, test: torch.Tensor, first: torch.Tensor | None = None) -> Images:
    """Holds out some of the training images, drawn at random with seed 0.

    Raises:
        ValueError: If there are too few to hold one out.
    """
    num_validation = min(VALIDATION_IMAGES, int(VALIDATION_SHARE * len(train)))
    if num_validation == 0:
        raise ValueError(
            f"a tenth of the training images is held out, which needs {round(1 / VALIDATION_SHARE)} of them, got {len(train)}"
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return Images(train[order[num_validation:]], train[order[:num_validation]], test, first)


def to_pixel_values(images: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


# Encoder, decoder and configuration of a backbone: of [`OptVQModel`], so its channels before the quantizer are the same.
BACKBONES: dict[str, tuple[type[nn.Module], type[nn.Module], dict[str, Any]]] = {
    "plain_cnn": (OptVQPlainCNNEncoder, OptVQPlainCNNDecoder, {"latent_channels": PLAIN_CNN_LATENT_CHANNELS}),
    "vqgan": (
        *(OptVQEncoder, OptVQDecoder),
        {
            "base_channels": 16,
            "channel_multiplier": (1, 1, 2, 4),
            "num_res_blocks": 1,
            "norm_num_groups": 8,
            "attn_resolutions": (),
            "latent_channels": 64,
        },
    ),
}


class Tokenizer(nn.Module):
    """A backbone of [`OptVQModel`] around a rival.

    Args:
        normalised: As in [`Rival`].
    """

    def __init__(
        self,
        rival: Ours | Theirs,
        num_channels: int,
        seed: int,
        backbone: Literal["plain_cnn", "vqgan"] = "plain_cnn",
        normalised: bool = False,
    ):
        super().__init__()
        make_encoder, make_decoder, fields = BACKBONES[backbone]
        config = OptVQConfig(backbone=backbone, num_channels=num_channels, **fields)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            encoder, decoder = make_encoder(config), make_decoder(config)
            self.to_latents = nn.Conv2d(config.latent_channels, rival.dim, kernel_size=1)
            from_latents = nn.Conv2d(rival.dim, config.latent_channels, kernel_size=1)
        # (B, C, H, W) -> latents (B, dim, H/f, W/f)
        self.encoder = nn.Sequential(encoder, self.to_latents)
        if normalised:
            self.encoder.append(nn.BatchNorm2d(rival.dim, affine=False))
        self.decoder = nn.Sequential(from_latents, decoder)
        self.rival: Ours | Theirs = rival

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, C, H, W) -> reconstruction (B, C, H, W), codes, and the 0-dim loss of the quantizer."""
        quantized, codes, loss = self.rival(self.encoder(pixel_values))
        return self.decoder(quantized), codes, loss

    def capture(self, pixel_values: torch.Tensor) -> None:
        """Records the networks in training as CUDA graphs, for batches of this shape: small ones wait for launches mostly."""
        with torch.no_grad():
            latents = self.encoder(pixel_values)
        samples = (pixel_values,), (torch.zeros_like(latents).requires_grad_(),)
        torch.cuda.make_graphed_callables((self.encoder, self.decoder), samples)  # replaces their `forward`


def run(settings: RunSettings, images: Images) -> tuple[dict[str, Any], torch.Tensor]:
    """Trains and scores one tokenizer.

    Returns:
        The result, ready for JSON, and reconstructions (8, C, H, W) uint8 of the first test images. The scores of
        a run that diverged are None.

    Raises:
        ValueError: For a rival or a size that cannot be.
    """
    rival, device = find_rival(settings.rival), images.train.device
    torch.manual_seed(settings.seed)
    quantizer = make_rival(settings.rival, settings.codebook_size, settings.codebook_dim)
    tokenizer = Tokenizer(quantizer, images.train.shape[1], settings.seed, settings.backbone, rival.normalised)
    tokenizer.to(device)
    if device.type == "cpu":
        tokenizer.to(memory_format=torch.channels_last)  # small convolutions are faster, equal up to rounding
    start = time.perf_counter()
    curve, diverged_at = _train(tokenizer, rival, settings, images)
    seconds = time.perf_counter() - start
    tokenizer.eval()
    parts = {
        "validation": images.validation,
        "test": images.test,
        "train": images.train[: len(images.validation)],
    }
    scores = dict.fromkeys(parts, NO_SCORES)
    if diverged_at is None:
        scores = {name: _score(tokenizer, part, with_ssim=name == "test") for name, part in parts.items()}
        if any(of_part["mse"] is None for of_part in scores.values()):
            scores, diverged_at = dict.fromkeys(parts, NO_SCORES), settings.max_steps
    versions = {"torch": str(torch.__version__)}
    if isinstance(quantizer, Theirs):
        versions["vector-quantize-pytorch"] = version("vector-quantize-pytorch")
    result: dict[str, Any] = {
        **asdict(settings),
        "title": rival.title,
        "num_parameters": sum(parameter.numel() for parameter in tokenizer.parameters()),
        "diverged_at": diverged_at,
        "curve": curve,
        **scores,
        "seconds": round(seconds, 2),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}",
        "versions": versions,
    }
    shown = images.test[:SHOWN]
    return result, _reconstruct(tokenizer, shown) if diverged_at is None else torch.zeros_like(shown).cpu()


def _train(
    tokenizer: Tokenizer, rival: Rival, settings: RunSettings, images: Images
) -> tuple[list[tuple[int, float]], int | None]:
    """Mean squared errors of training batches by step, and the step at which they were no numbers any more."""
    tokenizer.train()
    batches = _batches(images, settings)
    first_images = images.train if images.first is None else images.first
    first_batch = to_pixel_values(next(_batches(images, settings)))
    moved = (settings.latent_scale, settings.latent_shift) != (1, 0)
    if moved and rival.normalised:
        raise ValueError(f"rival {settings.rival!r}: normalised latents cannot be moved")
    if rival.standardised or moved:
        _standardise(tokenizer, first_images)
    _start_codes(tokenizer, rival, first_images, settings.seed)
    if moved:
        if isinstance(tokenizer.rival, Theirs):  # some start at their first call: before the move, as all others
            with torch.no_grad():
                tokenizer.rival(tokenizer.encoder(first_batch))
        _scale_latents(tokenizer, settings.latent_scale, settings.latent_shift)
    codebook = ()
    if isinstance(tokenizer.rival, Ours):
        quantizer = tokenizer.rival.quantizer
        codebook = (*quantizer.embedding.parameters(), *quantizer.projection.parameters())
    optimizer = make_optimizer(
        tokenizer, settings.learning_rate, WEIGHT_DECAY, BETA2, codebook, rival.codebook_multiplier
    )
    schedule = make_schedule(optimizer, settings.max_steps, WARMUP)
    if first_images.is_cuda:
        tokenizer.capture(first_batch)
    error, curve = torch.zeros((), device=first_images.device), []
    for step, batch in enumerate(batches):
        _follow_schedules(tokenizer, rival, step / max(settings.max_steps - 1, 1))
        pixel_values = to_pixel_values(batch)
        try:
            reconstruction, _, loss = tokenizer(pixel_values)
        except ValueError:  # our quantizer refuses features that are no numbers
            if _is_finite(tokenizer):
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
    return curve, None if _is_finite(tokenizer) else settings.max_steps


def _is_finite(tokenizer: Tokenizer) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in tokenizer.parameters())


def _batches(images: Images, settings: RunSettings) -> Iterator[torch.Tensor]:
    """Training images of every step, (batch_size, C, H, W) uint8: the same for all rivals."""
    change_at = 0 if images.first is None else settings.max_steps // 2
    for part, num_steps in ((images.first, change_at), (images.train, settings.max_steps - change_at)):
        if part is not None:
            for rows in _order(len(part), num_steps, settings).to(part.device):
                yield part[rows]


def _order(num_images: int, num_steps: int, settings: RunSettings) -> torch.Tensor:
    """(num_steps, batch_size) rows of images: epoch by epoch in random order."""
    generator = torch.Generator().manual_seed(settings.seed)
    num_epochs = -(-num_steps * settings.batch_size // num_images)
    epochs = [torch.randperm(num_images, generator=generator) for _ in range(num_epochs)]
    return torch.cat([*epochs, torch.empty(0, dtype=torch.int64)])[: num_steps * settings.batch_size].view(
        num_steps, settings.batch_size
    )


@torch.no_grad()
def _scale_latents(tokenizer: Tokenizer, scale: torch.Tensor | float, shift: torch.Tensor | float) -> None:
    """Makes latents z of the encoder z * scale + shift, by its last layer; of all channels, or (dim,) for each its own."""
    layer = tokenizer.to_latents
    assert layer.bias is not None  # a convolution with a bias
    layer.weight *= scale[:, None, None, None] if isinstance(scale, torch.Tensor) else scale
    layer.bias.mul_(scale).add_(shift)


def _standardise(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    """Gives every channel of the first latents mean 0 and variance 1.

    Untrained encoders give latents near 0, all of which lie nearest to one and the same of codes that are drawn at random.
    """
    deviation, mean = torch.std_mean(_latents(tokenizer, images[:START_IMAGES]), dim=0)
    _scale_latents(tokenizer, 1 / deviation, -mean / deviation)


def _start_codes(tokenizer: Tokenizer, rival: Rival, images: torch.Tensor, seed: int) -> None:
    """Sets codes to the centres of clusters of the first latents, if the rival wants that."""
    if rival.codebook_start is None or not isinstance(tokenizer.rival, Ours):
        return
    num_codes = tokenizer.rival.num_codes
    tokens_per_image = len(_latents(tokenizer, images[:1]))
    num_images = max(START_IMAGES, -(-4 * num_codes // tokens_per_image))  # at least four features for each code
    features = _latents(tokenizer, images[:num_images])
    set_codebook(tokenizer.rival.quantizer, cluster_centres(features, num_codes, seed))


@torch.no_grad()
def _latents(tokenizer: Tokenizer, images: torch.Tensor) -> torch.Tensor:
    """(N, dim) latents of images."""
    latents = [tokenizer.encoder(to_pixel_values(some)) for some in images.split(256)]
    return split_heads(torch.cat(latents), tokenizer.rival.dim)


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
def _score(tokenizer: Tokenizer, images: torch.Tensor, with_ssim: bool = True) -> dict[str, float | None]:
    """Means over images, with codes as at inference; SSIM takes most of the time, and images below 11 pixels have none.

    Usage and perplexity are of whole tokens: of all levels together.
    """
    with_ssim = with_ssim and min(images.shape[2:]) >= SMALLEST_SIDE
    rival, squared, similarity = tokenizer.rival, [], []
    counts = torch.zeros(rival.num_codes**rival.num_levels, dtype=torch.int64, device=images.device)
    for some in images.split(250):
        pixel_values = to_pixel_values(some)
        reconstruction, codes, _ = tokenizer(pixel_values)
        reconstruction = reconstruction.clamp(-1, 1)
        squared.append((reconstruction - pixel_values).square().mean(dim=(1, 2, 3)))
        if with_ssim:
            similarity.append(structural_similarity(reconstruction / 2 + 0.5, pixel_values / 2 + 0.5).float())
        counts += torch.bincount(_tokens(codes, rival).flatten(), minlength=len(counts))
    mse = torch.cat(squared)
    usage, perplexity = usage_and_perplexity(counts.cpu().numpy())
    scores = {
        "mse": mse.mean().item(),
        "mse_standard_error": mse.std().item() / len(mse) ** 0.5 if len(mse) > 1 else None,
        "psnr": psnr(mse).mean().item(),
        "ssim": torch.cat(similarity).mean().item() if with_ssim else None,
        "codebook_usage": usage,
        "perplexity": perplexity,
    }
    return {name: score if score is not None and math.isfinite(score) else None for name, score in scores.items()}


def _tokens(codes: torch.Tensor, rival: Ours | Theirs) -> torch.Tensor:
    """Codes (B, H, W), or (B, H, W, levels) -> a number for each token, (B, H, W) int64 in [0, num_codes ** num_levels)."""
    levels = codes.long() if rival.num_levels > 1 else codes.long()[..., None]
    tokens = torch.zeros_like(levels[..., 0])
    for level in levels.unbind(dim=-1):
        tokens = tokens * rival.num_codes + level
    return tokens


@torch.inference_mode()
def _reconstruct(tokenizer: Tokenizer, images: torch.Tensor) -> torch.Tensor:
    reconstruction = tokenizer(to_pixel_values(images))[0].clamp(-1, 1)
    return ((reconstruction + 1) * 127.5).round().to(torch.uint8).cpu()
