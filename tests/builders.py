"""Small models and pictures for tests."""

import numpy as np
import pytest
import torch

from optvq_hf import OptVQConfig, OptVQModel


def plain_config(**fields):
    sizes = {"image_size": 32, "codebook_size": 128, "codebook_dim": 8, "num_codebook_heads": 2}
    return OptVQConfig(backbone="plain_cnn", **{**sizes, **fields})


def vqgan_config(**fields):
    return OptVQConfig(
        **{
            "image_size": 32,
            "base_channels": 32,
            "channel_multiplier": (1, 2),
            "num_res_blocks": 1,
            "attn_resolutions": (16,),
            "latent_channels": 32,
            "codebook_size": 64,
            "codebook_dim": 32,
            **fields,
        }
    )


def make_untrained(config=None) -> OptVQModel:
    torch.manual_seed(0)
    return OptVQModel(config or plain_config()).eval()


@torch.no_grad()
def spread(model):
    """Puts codes where features are, so that pictures get codes of their own: with random ones all get the same."""
    channels, size = model.config.num_channels, model.config.image_size
    latents = model.encode(pixels(16, channels, size, size)).latents
    for level in model.quantizer.levels:
        features = latents.movedim(1, -1).reshape(-1, model.config.head_dim)
        chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[: model.config.codebook_size]
        level.embedding.weight.copy_(features[chosen])
        if model.config.use_codebook_projection:
            level.projection.weight.copy_(torch.eye(model.config.head_dim))
            level.projection.bias.zero_()
        latents = latents - level(latents).quantized
    return model


def pixels(*shape, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype) * 2 - 1


def noise(channels, side=32, seed=0):
    """(side, side, channels) uint8; the corners of the range are in it."""
    values = np.random.default_rng(seed).integers(0, 256, (side, side, channels), dtype=np.uint8)
    values[0, 0], values[0, 1] = 0, 255
    return values


def on_white(colours, alpha):
    """Float (H, W, 3) of colours (H, W, 1 or 3) in 0..255 over white."""
    share = alpha[..., None] / 255.0
    return np.broadcast_to(colours * share + 255.0 * (1 - share), (*alpha.shape, 3))


def make(config=None) -> OptVQModel:
    """A model whose codes tell pictures apart."""
    model = spread(make_untrained(config))
    assert model.encode(pixels(2, model.config.num_channels, 32, 32)).codes.unique().numel() > 20
    return model


BOTH = pytest.mark.parametrize("config", [plain_config(), vqgan_config()], ids=["plain_cnn", "vqgan"])
