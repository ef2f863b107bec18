"""VQGANs of taming-transformers, from which the original of OptVQ has its encoder and decoder: names and settings.

The vector-quantized autoencoders of latent diffusion have the same form. Codes of a Gumbel quantizer (`GumbelVQ`) are kept; the
convolution that chose among them is not, because codes are chosen by distance here.
"""

import re
from typing import Any

from .converted_weights import Autoencoder, rename
from .reference_files import Layout, ReferenceFiles
from .source_settings import check_names, checked_count, checked_dict, known


# Names of tensors, theirs -> ours, applied in this order.
VQGAN_NAMES = [
    (r"\.mid\.block_([12])\.", r".mid.resnet\1."),
    (r"\.mid\.attn_1\.", ".mid.attention."),
    (r"^encoder\.down\.", "encoder.stages."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.(?:downsample|upsample)\.", ".resample."),
    (r"(\.attentions?\.(?:\d+\.)?)q\.", r"\1query."),
    (r"(\.attentions?\.(?:\d+\.)?)k\.", r"\1key."),
    (r"(\.attentions?\.(?:\d+\.)?)v\.", r"\1value."),
    (r"(\.attentions?\.(?:\d+\.)?)proj_out\.", r"\1output."),
]
QUANTIZER_NAMES = [(r"^quantize\.(?:embedding|embed)\.", "quantizer.embedding.")]
# Prefixes of tensors that are skipped, and what they are.
LEFT_OUT = {
    "loss.": "the networks of its training objective",
    "quantize.proj.": "the convolution that chose its codes",
    "quantize.embedding.cluster_size": "the running sums of its EMA codebook",
    "quantize.embedding.embed_avg": "the running sums of its EMA codebook",
    "model_ema.": "the EMA of its weights",
    "colorize": "the colours in which it shows segmentations",
}
# Gives codes other numbers than their rows have, which the model cannot.
RENUMBERED = "quantize.used"

# Settings of the encoder and decoder, theirs -> ours.
VQGAN_FIELDS = {
    "resolution": "image_size", "in_channels": "num_channels", "ch": "base_channels", "ch_mult": "channel_multiplier",
    "num_res_blocks": "num_res_blocks", "attn_resolutions": "attn_resolutions", "z_channels": "latent_channels",
}  # fmt: skip
# Settings that have a single supported value.
VQGAN_FIXED = {"double_z": False, "resamp_with_conv": True, "give_pre_end": False, "tanh_out": False}
# Latent diffusion can leave all attention out.
ATTENTION_TYPES = {"vanilla": True, "none": False}
MOST_LEVELS = 12

LAYOUT = Layout(
    weights=("checkpoints/last.ckpt", "last.ckpt", "model.ckpt", "model.safetensors", "pytorch_model.bin"),
    configs=("configs/model.yaml", "model.yaml", "config.yaml", "config.json"),
)


def read_taming(files: ReferenceFiles, image_size: int | None) -> Autoencoder:
    """The encoder, decoder and codes of a VQGAN.

    Raises:
        ValueError: For a configuration that is incomplete or not supported.
    """
    library = "taming-transformers"
    model = checked_dict(files.config.get("model"), "model", library)
    params = checked_dict(model.get("params"), "model.params", library)
    settings = dict(checked_dict(params.get("ddconfig"), "ddconfig", library))
    has_attention = known(ATTENTION_TYPES, settings.pop("attn_type", "vanilla"), "attn_type")
    fields = vqgan_fields(settings, settings)
    fields |= {
        "attn_image_size": fields["image_size"],
        "attn_resolutions": fields["attn_resolutions"] if has_attention else (),
        "mid_block_add_attention": has_attention,
        "codebook_size": checked_count(params.get("n_embed"), "n_embed"),
        "codebook_dim": checked_count(params.get("embed_dim"), "embed_dim"),
    }
    if image_size is not None:
        fields["image_size"] = image_size
    if RENUMBERED in files.weights:
        raise ValueError(f"the source renumbers its codes (remap, tensor {RENUMBERED}), which is not supported")
    left_out = [part for prefix, part in LEFT_OUT.items() if any(name.startswith(prefix) for name in files.weights)]
    return Autoencoder(
        origin="a VQGAN of taming-transformers",
        fields=fields,
        weights={name: tensor for name, tensor in files.weights.items() if not name.startswith(tuple(LEFT_OUT))},
        our_name=lambda name: rename_vqgan(rename(name, QUANTIZER_NAMES), len(fields["channel_multiplier"])),
        left_out=list(dict.fromkeys(left_out)),
    )


def rename_vqgan(name: str, num_levels: int) -> str:
    """Our name of a tensor of the VQGAN's encoder or decoder.

    Our decoder's stages are listed in the order in which they run, from the smallest map to the largest.
    """
    name = rename(name, VQGAN_NAMES)
    return re.sub(r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.stages.{num_levels - 1 - int(match[1])}.", name)


def vqgan_fields(encoder: dict[str, Any], decoder: dict[str, Any]) -> dict[str, Any]:
    """Fields of OptVQConfig for the settings of encoder and decoder.

    Raises:
        ValueError: If a setting is missing, unknown or not supported, or if the two differ.
    """
    for name, part in (("encoder", encoder), ("decoder", decoder)):
        check_names(part, {*VQGAN_FIELDS, *VQGAN_FIXED, "out_ch", "dropout"}, name)
        for setting, value in VQGAN_FIXED.items():
            if part.get(setting, value) != value:
                raise ValueError(f"the {name} has {setting}: {part[setting]!r}; only {value} is supported")
    for name in VQGAN_FIELDS:
        if name not in encoder:
            raise ValueError(f"the configuration of the encoder lacks {name!r}")
    for name in (*VQGAN_FIELDS, "out_ch", "dropout"):
        if name in decoder and name in encoder and decoder[name] != encoder[name]:
            raise ValueError(f"encoder and decoder differ in {name}: {encoder[name]} and {decoder[name]}")
    fields = {ours: encoder[theirs] for theirs, ours in VQGAN_FIELDS.items()}
    if decoder.get("out_ch", fields["num_channels"]) != fields["num_channels"]:
        raise ValueError(f"images have {fields['num_channels']} channels, but reconstructions {decoder['out_ch']}")
    if not isinstance(encoder["ch_mult"], list):
        raise ValueError(
            f"ch_mult must be a list of positive integers in the configuration, got {encoder['ch_mult']!r}"
        )
    for multiplier in encoder["ch_mult"]:
        checked_count(multiplier, "every entry of ch_mult")
    if len(encoder["ch_mult"]) > MOST_LEVELS:
        raise ValueError(f"ch_mult must have at most {MOST_LEVELS} entries, got {len(encoder['ch_mult'])}")
    return {"backbone": "vqgan", **fields, "dropout": encoder.get("dropout", 0.0)}
