"""The tokenizer of a comparison: the same networks around every rival."""

from typing import Any, Literal

import torch
from torch import nn

from ..backbone_optvq import OptVQDecoder, OptVQEncoder, OptVQPlainCNNDecoder, OptVQPlainCNNEncoder
from ..configuration_optvq import PLAIN_CNN_LATENT_CHANNELS, OptVQConfig
from .rivals import Ours, Theirs


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
