"""Quantizers that are compared with ours, behind one call: latents -> quantized latents, codes, loss.

Those of others are the modules of vector-quantize-pytorch (the extra `compare`) with the settings that their authors or its
documentation advise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..quantizer_optvq import OptVQQuantizer


# Levels of FSQ for about as many codes (Mentzer et al. 2023, arXiv 2309.15505, table 1; 8,192 and below 256 are ours).
FSQ_LEVELS = {
    16: (4, 4), 64: (4, 4, 4), 256: (8, 6, 5), 1024: (8, 5, 5, 5), 4096: (7, 5, 5, 5, 5), 8192: (8, 8, 8, 16),
    16384: (8, 8, 8, 6, 5), 65536: (8, 8, 8, 5, 5, 5),
}  # fmt: skip


@dataclass(frozen=True)
class Rival:
    """A quantizer and how it is trained.

    Attributes:
        title: In tables and figures.
        make: From the number of codes and their width, a module of `dim` channels: from latents (B, dim, H, W) to quantized
            ones, codes (B, H, W) or (B, H, W, levels), and a 0-dim loss.
        epsilon, balance: First and last value in training, of our transport.
        codebook_start: First codes of our quantizer, as of `optvq train`.
        codebook_multiplier: Learning rate of the codes, as a multiple of that of the networks.
        standardised: Whether the first latents are scaled to variance 1, that of codes that are drawn at random.
    """

    title: str
    make: Callable[[int, int], "Ours | Theirs"]
    epsilon: tuple[float, float] | None = None
    balance: tuple[float, float] | None = None
    codebook_start: str = "normal"
    codebook_multiplier: float = 1.0
    standardised: bool = True


class Ours(nn.Module):
    """[`OptVQQuantizer`] as a rival."""

    def __init__(self, codebook_size: int, dim: int, **settings: Any):
        super().__init__()
        self.quantizer = OptVQQuantizer(codebook_size, dim, **settings)
        self.num_codes, self.dim = codebook_size, dim

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        output = self.quantizer(latents)
        return output.quantized, output.codes.squeeze(1), output.loss


class Theirs(nn.Module):
    """A module of vector-quantize-pytorch as a rival.

    Args:
        module: Takes (B, dim, H, W).
        num_codes: Codes of each level.
        dim: Channels that it quantizes.
    """

    def __init__(self, module: nn.Module, num_codes: int, dim: int):
        super().__init__()
        self.module, self.num_codes, self.dim = module, num_codes, dim

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        quantized, codes, *losses = self.module(latents)
        return quantized, codes, sum((loss.sum() for loss in losses), latents.new_zeros(()))


def _library() -> Any:
    try:
        import vector_quantize_pytorch
    except ImportError as error:
        raise ImportError('vector-quantize-pytorch is not installed: run pip install "optvq_hf[compare]"') from error
    return vector_quantize_pytorch


def _ema(codebook_size: int, dim: int, **settings: Any) -> Theirs:
    advised = {"decay": 0.8, "kmeans_init": True, "kmeans_iters": 10, "threshold_ema_dead_code": 2}
    module = _library().VectorQuantize(dim, codebook_size, accept_image_fmap=True, **advised, **settings)
    return Theirs(module, codebook_size, dim)


def _simvq(codebook_size: int, dim: int) -> Theirs:
    return Theirs(_library().SimVQ(dim, codebook_size, channel_first=True), codebook_size, dim)


def _fsq(codebook_size: int, dim: int) -> Theirs:
    """A channel for each of its axes, not `dim`."""
    if codebook_size not in FSQ_LEVELS:
        raise ValueError(f"fsq has levels for {', '.join(map(str, FSQ_LEVELS))} codes, got {codebook_size}")
    levels = FSQ_LEVELS[codebook_size]
    return Theirs(_library().FSQ(list(levels)), math.prod(levels), len(levels))


def _lfq(codebook_size: int, dim: int) -> Theirs:
    """A channel for each bit, not `dim`."""
    if codebook_size & (codebook_size - 1):
        raise ValueError(f"lfq needs a power of two as the number of codes, got {codebook_size}")
    num_bits, settings = codebook_size.bit_length() - 1, {"entropy_loss_weight": 0.1, "commitment_loss_weight": 0.25}
    return Theirs(_library().LFQ(dim=num_bits, codebook_size=codebook_size, **settings), codebook_size, num_bits)


def _residual(codebook_size: int, dim: int) -> Theirs:
    """Two levels with as many bits together."""
    of_level = round(codebook_size**0.5)
    if of_level**2 != codebook_size:
        raise ValueError(
            f"residual needs a square as the number of codes, for two levels of its root, got {codebook_size}"
        )
    advised = {"decay": 0.8, "kmeans_init": True, "kmeans_iters": 10, "threshold_ema_dead_code": 2}
    module = _library().ResidualVQ(
        dim=dim, num_quantizers=2, codebook_size=of_level, accept_image_fmap=True, rotation_trick=False, **advised
    )
    return Theirs(module, of_level, dim)


def _averaged(decay: float) -> Callable[[int, int], Ours]:
    return partial(Ours, codebook_update="ema", ema_decay=decay, use_projection=False)


_nearest = partial(Ours, training_assignment="nearest")
RIVALS = {
    "transport": Rival("transport, as in the paper", Ours),
    "default": Rival("transport, our default", Ours, epsilon=(10, 100), codebook_multiplier=2),
    "nearest": Rival("nearest codes", _nearest),
    "nearest_kmeans": Rival("nearest codes, k-means start", _nearest, codebook_start="kmeans"),
    "ema": Rival("EMA codes, k-means start, restart", partial(_ema, rotation_trick=False)),
    "rotation": Rival("the same, rotation trick", partial(_ema, rotation_trick=True)),
    "simvq": Rival("SimVQ", _simvq),
    "fsq": Rival("FSQ", _fsq, standardised=False),  # finds more levels from latents near 0
    "lfq": Rival("LFQ", _lfq),
    "residual": Rival("residual VQ, two levels, equal bits", _residual),
    # What the default was chosen from.
    "transport_fade": Rival("transport, balance 1 to 0", Ours, balance=(1, 0)),
    "transport_epsilon_fade": Rival("transport, epsilon 10 to 100, balance 1 to 0", Ours, (10, 100), (1, 0)),
    "transport_ema": Rival("transport, EMA codes 0.8", _averaged(0.8)),
    "transport_ema_epsilon": Rival("transport, EMA codes 0.8, epsilon 10 to 100", _averaged(0.8), (10, 100)),
    "transport_ema_fade": Rival("transport, EMA codes 0.8, balance 1 to 0", _averaged(0.8), balance=(1, 0)),
    "transport_ema_fade_half": Rival("transport, EMA codes 0.8, balance 1 to 0.3", _averaged(0.8), balance=(1, 0.3)),
    "transport_ema_fade_epsilon": Rival(
        "transport, EMA codes 0.8, epsilon 10 to 100, balance 1 to 0", _averaged(0.8), (10, 100), (1, 0)
    ),
    "transport_ema_fade_long": Rival("transport, EMA codes 0.95, balance 1 to 0", _averaged(0.95), balance=(1, 0)),
}
