"""Tokenizers of LlamaGen (VQ-8, VQ-16): names, and settings, which the shapes of the weights tell: checkpoints have none.

Its codes and latents have length 1 (`codebook_l2_norm`): it scales both at every use. Here the codes are scaled once, the model
scales its latents (`normalize_latents`), and distances are those of directions (`cost="cosine"`), so that every code is the
same, and so is what the decoder gets.
"""

from collections.abc import Iterator
from itertools import count, takewhile

import torch
from torch.nn import functional as F

from .converted_weights import DTYPES, Autoencoder, rename
from .reference_files import Layout, ReferenceFiles
from .source_settings import check_names, checked_bool, checked_dict


# Names of tensors, theirs -> ours, applied in this order.
NAMES = [
    (r"^quantize\.", "quantizer."),
    (r"\.conv_blocks\.", ".stages."),
    (r"\.res\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.(?:downsample|upsample)\.", ".resample."),
    (r"\.mid\.0\.", ".mid.resnet1."),
    (r"\.mid\.1\.", ".mid.attention."),
    (r"\.mid\.2\.", ".mid.resnet2."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.q\.", ".query."),
    (r"\.k\.", ".key."),
    (r"\.v\.", ".value."),
    (r"\.proj_out\.", ".output."),
]
CODES = "quantize.embedding.weight"
FIRST_BLOCK = "encoder.conv_blocks.0.res.0.conv1.weight"
# Which codes the last batches used: a record of its training.
RECORD = "quantize.codebook_used"

# Settings of a configuration, where there is one, with their defaults; None has no effect on the autoencoder, or is a shape.
SETTINGS = {
    "codebook_l2_norm": True, "dropout_p": 0.0, "codebook_size": None, "codebook_embed_dim": None, "z_channels": None,
    "encoder_ch_mult": None, "decoder_ch_mult": None, "codebook_show_usage": None, "commit_loss_beta": None,
    "entropy_loss_ratio": None,
}  # fmt: skip
IMAGE_SIZE = 256

# The EMA of the weights is what its authors evaluate.
ENTRIES = ("ema", "model", "state_dict")
LAYOUT = Layout(weights=("model.safetensors", "pytorch_model.bin"), needs_config=False, entries=ENTRIES)


def read_llamagen(files: ReferenceFiles, image_size: int | None) -> Autoencoder:
    """The encoder, decoder and codes of a tokenizer.

    Raises:
        ValueError: If the weights are not those of one, or do not fit a configuration.
    """
    config = checked_dict(files.config.get("config", files.config), "config", "LlamaGen")
    check_names(config, SETTINGS, "LlamaGen")
    settings = {**SETTINGS, **config}
    is_normalized = checked_bool(settings["codebook_l2_norm"], "codebook_l2_norm")
    weights = {name: tensor for name, tensor in files.weights.items() if name != RECORD}
    base, num_channels = _shape(weights, "encoder.conv_in.weight")
    _shape(weights, FIRST_BLOCK)
    multiplier = [width // max(base, 1) for width in _widths(weights)]
    num_codes, embed_dim = _shape(weights, CODES)
    latent_channels = _shape(weights, "decoder.conv_in.weight")[1]
    found = {
        "codebook_size": num_codes, "codebook_embed_dim": embed_dim, "z_channels": latent_channels,
        "encoder_ch_mult": multiplier, "decoder_ch_mult": multiplier,
    }  # fmt: skip
    for name, value in found.items():
        if settings[name] not in (None, value):
            raise ValueError(f"the configuration has {name} {settings[name]}, and the weights {value}")
    size = IMAGE_SIZE if image_size is None else image_size
    if is_normalized and weights[CODES].dtype in DTYPES:  # others are refused with the rest of the weights
        weights[CODES] = F.normalize(weights[CODES], dim=1)
    return Autoencoder(
        origin="a tokenizer of LlamaGen",
        fields={
            "backbone": "vqgan",
            "image_size": size,
            "num_channels": num_channels,
            "base_channels": base,
            "channel_multiplier": multiplier,
            "num_res_blocks": len(list(_blocks(weights, 0))),
            "attn_resolutions": [size // 2 ** (len(multiplier) - 1)],
            "dropout": settings["dropout_p"],
            "latent_channels": latent_channels,
            "normalize_latents": is_normalized,
            "cost": "cosine" if is_normalized else "euclidean",
            "codebook_size": num_codes,
            "codebook_dim": embed_dim,
        },
        weights=weights,
        our_name=lambda name: rename(name, NAMES),
        left_out=[],
        notes=(
            *((f"Its weights are those of the checkpoint's entry `{files.entry}`.",) if files.entry else ()),
            *(("Latents have length 1, as in the source.",) if is_normalized else ()),
        ),
    )


def _shape(weights: dict[str, torch.Tensor], name: str) -> tuple[int, int]:
    """Outputs and inputs of a layer."""
    if name not in weights or weights[name].ndim < 2:
        raise ValueError(f"the weights are not those of a tokenizer of LlamaGen: they lack {name}")
    return weights[name].shape[0], weights[name].shape[1]


def _blocks(weights: dict[str, torch.Tensor], level: int) -> Iterator[str]:
    """Names of the first convolutions of a level's residual blocks, as many as there are."""
    names = (f"encoder.conv_blocks.{level}.res.{block}.conv1.weight" for block in count())
    return takewhile(lambda name: name in weights, names)


def _widths(weights: dict[str, torch.Tensor]) -> list[int]:
    """Channels of every level."""
    first = (next(_blocks(weights, level), None) for level in count())
    return [_shape(weights, name)[0] for name in takewhile(lambda name: name is not None, first) if name is not None]
