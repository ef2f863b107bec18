"""Autoencoders of diffusers: names and settings. diffusers is needed for `AutoencoderTiny` and `AutoencoderDC` alone."""

from pathlib import Path
from typing import Any

import torch

from ..autoencoder_settings_optvq import CLASSES as AUTOENCODER_CLASSES
from .converted_weights import Autoencoder, rename
from .reference_files import Layout, ReferenceFiles
from .source_settings import check_names, checked_bool, checked_count, known


# Names of tensors, theirs -> ours, applied in this order. Attention has other names in old files.
NAMES = [
    (r"^quantize\.", "quantizer."),
    (r"\.(?:down|up)_blocks\.", ".stages."),
    (r"\.(?:down|up)samplers\.0\.", ".resample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.resnet1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.resnet2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attention."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    (r"\.(?:to_q|query)\.", ".query."),
    (r"\.(?:to_k|key)\.", ".key."),
    (r"\.(?:to_v|value)\.", ".value."),
    (r"\.(?:to_out\.0|proj_attn)\.", ".output."),
]
# Of attention, which has linear layers there and 1x1 convolutions here.
PROJECTIONS = (".query.weight", ".key.weight", ".value.weight", ".output.weight")

# Settings of each class, with its defaults; None has no effect on the autoencoder.
SHARED: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": [64], "layers_per_block": 1, "act_fn": "silu",
    "norm_num_groups": 32, "sample_size": 32, "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"], "mid_block_add_attention": True, "scaling_factor": 0.18215, "force_upcast": None,
}  # fmt: skip
CLASSES: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {
        **SHARED, "latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True, "shift_factor": None,
        "latents_mean": None, "latents_std": None,
    },
    "VQModel": {
        **SHARED, "latent_channels": 3, "num_vq_embeddings": 256, "vq_embed_dim": None, "norm_type": "group",
        "lookup_from_codebook": None,
    },
}  # fmt: skip
# Classes of which diffusers makes the networks, and the side in pixels of their images, which they do not state.
WRAPPED, DEFAULT_IMAGE_SIZE = AUTOENCODER_CLASSES, 256
# Beyond what a scale of latents can be.
LARGEST_SCALE = 1e6
ACTIVATIONS = {"silu": True, "swish": True}
# Whether a block has attention.
DOWN_BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP_BLOCKS = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}

WEIGHTS = "diffusion_pytorch_model"
LAYOUT = Layout(weights=(f"{WEIGHTS}.safetensors", f"{WEIGHTS}.bin"), folders=("", "vae", "vqvae"))


def read_diffusers(files: ReferenceFiles, image_size: int | None) -> Autoencoder:
    """The encoder and decoder of an autoencoder, with the codes of a `VQModel`.

    Of an `AutoencoderKL`, the model gives the mean of each latent; the layers for its variance are skipped.

    Raises:
        ValueError: For a configuration that is incomplete or not supported.
    """
    given = {name: value for name, value in files.config.items() if not name.startswith("_")}
    kind = files.config.get("_class_name")
    if kind in WRAPPED:
        return _wrapped(files, image_size)
    defaults = known(CLASSES, kind, "_class_name")
    check_names(given, defaults, str(kind))
    settings = {**defaults, **given}
    fields = _fields(settings, image_size)
    weights, left_out, notes, scale = files.weights, [], (), (torch.tensor(0.0), torch.tensor(1.0))
    if kind == "VQModel":
        embed_dim = settings["vq_embed_dim"]
        fields["codebook_size"] = checked_count(settings["num_vq_embeddings"], "num_vq_embeddings")
        fields["codebook_dim"] = (
            fields["latent_channels"] if embed_dim is None else checked_count(embed_dim, "vq_embed_dim")
        )
    else:
        has_convolutions = checked_bool(settings["use_quant_conv"], "use_quant_conv")
        if settings["use_post_quant_conv"] is not has_convolutions:
            raise ValueError(
                "use_quant_conv and use_post_quant_conv differ in the configuration; only both or none are supported"
            )
        channels = fields["codebook_dim"] = fields["latent_channels"]
        fields |= {"use_quant_conv": has_convolutions, "double_z": has_convolutions}
        weights = _of_the_mean(weights, "quant_conv" if has_convolutions else "encoder.conv_out", channels)
        scale, stated = _scale(settings, channels)
        left_out = ["the variance of its latents"]
        notes = (f"Latents are the means that the source predicts, before they are scaled for diffusion ({stated}).",)

    def our_name(name: str) -> str:
        return rename(name, NAMES)

    return Autoencoder(
        origin=f"`{kind}` of diffusers",
        fields=fields,
        weights={name: _as_convolution(our_name(name), tensor) for name, tensor in weights.items()},
        our_name=our_name,
        left_out=left_out,
        notes=notes,
        scale=scale,
    )


def _wrapped(files: ReferenceFiles, image_size: int | None) -> Autoencoder:
    """An autoencoder whose networks diffusers itself makes, also when the model is used."""
    # AutoencoderTiny notes block_out_channels, and takes them from its other settings.
    settings = {
        name: value for name, value in files.config.items() if not name.startswith("_") and name != "block_out_channels"
    }
    kind, channels = files.config["_class_name"], checked_count(settings.get("in_channels", 3), "in_channels")
    if settings.get("out_channels", channels) != channels:
        raise ValueError(f"images have {channels} channels, but reconstructions {settings['out_channels']}")
    latent_channels = checked_count(settings.get("latent_channels"), "latent_channels")
    name = files.source if files.revision else Path(files.source).resolve().name
    named = {"_class_name": kind, "id": name, "revision": files.revision}
    return Autoencoder(
        origin=f"`{kind}` of diffusers",
        fields={
            "backbone": "diffusers",
            "autoencoder": {**named, **settings},
            "image_size": DEFAULT_IMAGE_SIZE if image_size is None else image_size,
            "num_channels": channels,
            "latent_channels": latent_channels,
            "codebook_dim": latent_channels,
            "use_quant_conv": False,
        },
        weights=files.weights,
        our_name=lambda name: rename(name, [(r"^(encoder|decoder)\.", r"\1.network.")]),
        left_out=[],
        notes=("Its encoder and decoder are networks of diffusers, which must be installed where the model is used.",),
    )


def _fields(settings: dict[str, Any], image_size: int | None) -> dict[str, Any]:
    """Fields of OptVQConfig for the settings that both classes have."""
    known(ACTIVATIONS, settings["act_fn"], "act_fn")
    if settings.get("norm_type", "group") != "group":
        raise ValueError(f"the configuration has norm_type {settings['norm_type']!r}; only 'group' is supported")
    if settings["in_channels"] != settings["out_channels"]:
        raise ValueError(
            f"images have {settings['in_channels']} channels, but reconstructions {settings['out_channels']}"
        )
    widths = settings["block_out_channels"]
    blocks = [settings["down_block_types"], settings["up_block_types"]]
    if not all(isinstance(entry, list) and entry and len(entry) == len(widths) for entry in (widths, *blocks)):
        raise ValueError(
            "block_out_channels, down_block_types and up_block_types must be lists of equal length in the configuration"
        )
    base = checked_count(widths[0], "block_out_channels")
    if any(checked_count(width, "block_out_channels") % base for width in widths):
        raise ValueError(f"block_out_channels must be multiples of the first, got {widths}")
    attention = [known(DOWN_BLOCKS, block, "down_block_types") for block in blocks[0]]
    if attention != [known(UP_BLOCKS, block, "up_block_types") for block in reversed(blocks[1])]:
        raise ValueError("encoder and decoder differ in the resolutions that have attention, which is not supported")
    size = _image_size(settings["sample_size"]) if image_size is None else image_size
    return {
        "backbone": "vqgan",
        "image_size": size,
        "num_channels": settings["in_channels"],
        "base_channels": base,
        "channel_multiplier": [width // base for width in widths],
        "num_res_blocks": settings["layers_per_block"],
        "attn_resolutions": [size // 2**level for level, has in enumerate(attention) if has],
        "mid_block_add_attention": settings["mid_block_add_attention"],
        "norm_num_groups": settings["norm_num_groups"],
        "latent_channels": checked_count(settings["latent_channels"], "latent_channels"),
    }


def _image_size(sample_size: Any) -> int:
    sides = sample_size if isinstance(sample_size, list) else [sample_size]
    if not sides or any(side != sides[0] for side in sides):
        raise ValueError(
            f"sample_size is {sample_size} in the configuration, which is not square: choose an --image-size"
        )
    return checked_count(sides[0], "sample_size")


def _scale(settings: dict[str, Any], channels: int) -> tuple[tuple[torch.Tensor, torch.Tensor], str]:
    """Centre and spread of the latents, and the settings that say so.

    (z - shift_factor) * scaling_factor takes latents to 0 and 1, or (z - latents_mean) / latents_std * scaling_factor.
    """
    shift, factor = settings["shift_factor"] or 0.0, settings["scaling_factor"]
    are_numbers = all(isinstance(number, (int, float)) and abs(number) < LARGEST_SCALE for number in (shift, factor))
    if not are_numbers or factor < 1 / LARGEST_SCALE:
        raise ValueError(
            "scaling_factor and shift_factor must be numbers in the configuration, the first above 0, got "
            f"{factor} and {shift}"
        )
    stated = f"scaling_factor {factor:g}, shift_factor {shift:g}"
    mean, deviation = settings["latents_mean"], settings["latents_std"]
    if mean is None and deviation is None:
        return (torch.tensor(float(shift)), torch.tensor(1 / factor)), stated
    for values in (mean, deviation):
        if not (
            isinstance(values, list)
            and len(values) == channels
            and all(type(number) in (int, float) and abs(number) < LARGEST_SCALE for number in values)
        ):
            raise ValueError(
                f"latents_mean and latents_std must be lists of {channels} numbers in the configuration, as many as "
                f"latent_channels, got {mean!r} and {deviation!r}"
            )
    if min(deviation) < 1 / LARGEST_SCALE:
        raise ValueError(f"latents_std must be above 0 in the configuration, got {deviation}")
    if shift:
        raise ValueError(f"the configuration has both shift_factor {shift} and latents_mean {mean}")
    stated = f"scaling_factor {factor:g}, latents_mean {mean}, latents_std {deviation}"
    return (torch.tensor(mean).float(), torch.tensor(deviation).float() / factor), stated


def _of_the_mean(weights: dict[str, torch.Tensor], layer: str, channels: int) -> dict[str, torch.Tensor]:
    """The weights with the first half of a layer's outputs, which are means; the others are logarithms of variances."""
    means = {}
    for name in (f"{layer}.weight", f"{layer}.bias"):
        if name in weights:
            if weights[name].ndim == 0 or len(weights[name]) != 2 * channels:
                raise ValueError(
                    f"the weights do not fit the configuration: {name} is {tuple(weights[name].shape)}, and must have "
                    f"{2 * channels} outputs, twice latent_channels"
                )
            means[name] = weights[name][:channels]
    return {**weights, **means}


def _as_convolution(our_name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[..., None, None] if our_name.endswith(PROJECTIONS) and tensor.ndim == 2 else tensor
