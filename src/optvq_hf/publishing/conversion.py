"""Converts models of the original implementation of OptVQ: configuration and weights, both checked."""

from pathlib import Path

import torch

from ..configuration_optvq import PLAIN_CNN_LATENT_CHANNELS, OptVQConfig
from ..modeling_optvq import OptVQModel
from ..training.digests import DIGEST
from .converted_weights import fill_model, make_config, rename
from .reference_files import ReferenceFiles
from .source_settings import check_names, checked_bool, checked_dict, known
from .taming_source import rename_vqgan, vqgan_fields


# ---- configuration ---------------------------------------------------------------------------------------------------

# `null` in a file is the word or the absence of a value; the original then leaves distances as they are.
NORMALIZATIONS = {"all": "zscore", "dim": "sqrt_dim", "null": "none", None: "none"}
LOSS_TYPES = {"l2": "l2", "l1": "l1", "ce": "cross_entropy"}
ASSIGNMENTS = {"optvq": "sinkhorn", "basevq": "nearest"}

# Classes that the original's YAML files name, by the last part of their import path; and names in its JSON files.
BACKBONES = {"Encoder": "vqgan", "Decoder": "vqgan", "PlainCNNEncoder": "plain_cnn", "PlainCNNDecoder": "plain_cnn"}
BACKBONE_NAMES = {"vqgan": "vqgan", "diffusion": "vqgan", "plain_cnn": "plain_cnn"}
QUANTIZERS = {"VectorQuantizerSinkhorn": "optvq", "VectorQuantizer": "basevq"}

# Defaults of the original's classes.
QUANTIZER_DEFAULTS = {
    "n_e": 1024, "e_dim": 128, "beta": 1.0, "use_norm": False, "use_proj": True, "fix_codes": False, "loss_q_type": "ce",
    "num_head": 1, "start_quantize_steps": None,
}  # fmt: skip
SINKHORN_DEFAULTS = {"epsilon": 10.0, "n_iters": 5, "normalize_mode": "all", "use_prob": True}
PLAIN_CNN_CHANNELS = 3
PLAIN_CNN_IMAGE_SIZE = 32


def convert_config(reference: dict, keep_batch_assignment: bool = False) -> OptVQConfig:
    """Converts the configuration of a published folder or of a training run.

    Args:
        reference: Content of the original's config.json or YAML.
        keep_batch_assignment: At inference, assign by transport over the batch as the original does, instead of to the
            nearest code. The codes of an image then depend on the other images of its batch.

    Raises:
        ValueError: For a configuration that is incomplete or not supported.
    """
    parts = _parts(reference)
    quantize_type, quantize = parts["quantize_type"], _quantizer_settings(parts)
    is_transport = quantize_type == "optvq"
    fields = {
        "codebook_size": quantize["n_e"],
        "codebook_dim": quantize["e_dim"],
        "num_codebook_heads": quantize["num_head"],
        "use_codebook_projection": quantize["use_proj"],
        "freeze_codebook": quantize["fix_codes"],
        "codebook_loss_type": known(LOSS_TYPES, quantize["loss_q_type"], "loss_q_type"),
        "codebook_loss_weight": quantize["beta"],
        "training_assignment": "sample" if is_transport and quantize["use_prob"] else ASSIGNMENTS[quantize_type],
        "inference_assignment": ASSIGNMENTS[quantize_type] if keep_batch_assignment else "nearest",
        "use_quant_conv": parts["use_connector"],
    }
    if is_transport:
        fields |= {
            "sinkhorn_epsilon": quantize["epsilon"],
            "sinkhorn_iterations": quantize["n_iters"],
            "cost_normalization": known(NORMALIZATIONS, quantize["normalize_mode"], "normalize_mode"),
        }
    make_fields = _plain_cnn_fields if parts["backbone"] == "plain_cnn" else vqgan_fields
    return make_config({**fields, **make_fields(parts["encoder"], parts["decoder"])})


def record_conversion(reference: ReferenceFiles, license: str, has_discriminator: bool, digest: str) -> dict:
    """The record of a conversion for the model card, as JSON.

    Args:
        license: Licence of the weights.
        has_discriminator: Whether the source's discriminator was kept.
        digest: Of the converted weights.
    """
    parts = (("the perceptual network", PERCEPTUAL_NETWORK), ("the discriminator", DISCRIMINATOR))
    left_out = [
        part
        for part, prefix in parts
        if any(weight.startswith(prefix) for weight in reference.weights)
        and not (prefix == DISCRIMINATOR and has_discriminator)
    ]
    return {
        "source": reference.source if reference.revision else Path(reference.source).resolve().name,
        "revision": reference.revision,
        "license": license,
        "notes": list(training_notes(reference.config)),
        "left_out": left_out,
        "has_discriminator": has_discriminator,
        DIGEST: digest,
    }


def training_notes(reference: dict) -> tuple[str, ...]:
    """Settings of the original without an equal in OptVQConfig, as one sentence each."""
    parts = _parts(reference)
    quantize = _quantizer_settings(parts)
    notes = []
    if quantize["start_quantize_steps"] is not None:
        notes.append(f"It was trained without quantization for its first {quantize['start_quantize_steps']} steps.")
    if parts["quantize_type"] == "optvq" and quantize["use_prob"]:
        notes.append(
            "The original draws codes at random from the plan at inference too; this model does so only in training."
        )
    if quantize["fix_codes"] and quantize["use_proj"]:
        notes.append("Its embedding was frozen in training, but not its projection; in this model both are frozen.")
    return tuple(notes)


def _parts(reference: dict) -> dict:
    """Settings and kinds of encoder, decoder and quantizer, from either layout of the configuration."""
    model = reference.get("model", reference)
    if isinstance(model, dict) and "autoencoder" in model:
        model = model["autoencoder"]
        model = model.get("params") if isinstance(model, dict) else model
    model = checked_dict(model, "model")
    parts, kinds = {}, {}
    for name in ("encoder", "decoder", "quantize"):
        part = checked_dict(model.get(name), name)
        if "target" in part:
            kinds[name] = str(part["target"]).rpartition(".")[2]
            part = checked_dict(part.get("params") or {}, f"{name}.params")
        parts[name] = part
    backbones = {known(BACKBONES, kinds[name], name) for name in ("encoder", "decoder") if name in kinds}
    if "backbone" in model:
        backbones.add(known(BACKBONE_NAMES, model["backbone"], "backbone"))
    if len(backbones) > 1:
        raise ValueError(f"encoder and decoder are of different kinds: {' and '.join(sorted(backbones))}")
    quantize_type = model.get("quantize_type", "optvq")
    if "quantize" in kinds:
        quantize_type = known(QUANTIZERS, kinds["quantize"], "quantizer")
    known(ASSIGNMENTS, quantize_type, "quantizer")
    connector = checked_bool(model.get("use_connector", True), "use_connector")
    backbone = next(iter(backbones), "vqgan")
    return {**parts, "backbone": backbone, "quantize_type": quantize_type, "use_connector": connector}


def _quantizer_settings(parts: dict) -> dict:
    defaults = {**QUANTIZER_DEFAULTS, **(SINKHORN_DEFAULTS if parts["quantize_type"] == "optvq" else {})}
    check_names(parts["quantize"], {*QUANTIZER_DEFAULTS, *SINKHORN_DEFAULTS}, "quantizer")
    settings = {**defaults, **parts["quantize"]}
    for name in ("use_norm", "use_proj", "fix_codes", "use_prob"):
        checked_bool(settings.get(name, False), name)
    if settings["use_norm"]:
        raise ValueError("the quantizer normalises its codes (use_norm), which the original itself no longer supports")
    return settings


def _plain_cnn_fields(encoder: dict, decoder: dict) -> dict:
    check_names(encoder, {"in_dim"}, "encoder")
    check_names(decoder, {"out_dim"}, "decoder")
    channels, out_channels = encoder.get("in_dim", PLAIN_CNN_CHANNELS), decoder.get("out_dim", PLAIN_CNN_CHANNELS)
    if channels != out_channels:
        raise ValueError(f"encoder and decoder differ in their image channels: {channels} and {out_channels}")
    return {
        "backbone": "plain_cnn",
        "num_channels": channels,
        "image_size": PLAIN_CNN_IMAGE_SIZE,
        "latent_channels": PLAIN_CNN_LATENT_CHANNELS,
    }


# ---- weights ---------------------------------------------------------------------------------------------------------

# Modules around the VQGAN's, theirs -> ours; those of its encoder and decoder are taming's.
NAMES = [(r"^quantize\.", "quantizer."), (r"^quantizer\.proj\.", "quantizer.projection.")]

# Convolutions of the plain CNN, and their indices in our nn.Sequential.
PLAIN_CNN_LAYERS = {
    "encoder": {"in_fc": 0, "down1": 2, "conv1": 3, "down2": 5, "conv2": 6, "out_fc": 8},
    "decoder": {"in_fc": 0, "up1": 2, "conv1": 3, "up2": 5, "conv2": 6, "out_fc": 8},
}

# Prefixes of the training objective's weights, which published files include.
OBJECTIVE = "loss."
DISCRIMINATOR = "loss.discriminator."
PERCEPTUAL_NETWORK = "loss.perceptual_loss."


def convert_name(name: str, config: OptVQConfig) -> str:
    """Our name of a tensor of the original's `VQModel`."""
    if config.backbone == "plain_cnn":
        part, _, rest = name.partition(".")
        layer, _, tensor = rest.rpartition(".")
        if layer in PLAIN_CNN_LAYERS.get(part, {}):
            return f"{part}.{PLAIN_CNN_LAYERS[part][layer]}.{tensor}"
    return rename_vqgan(rename(name, NAMES), len(config.channel_multiplier))


def convert_model(config: OptVQConfig, weights: dict[str, torch.Tensor]) -> OptVQModel:
    """Makes a model with the weights of the original's `VQModel`, in their dtype, in evaluation mode.

    Raises:
        ValueError: As of [`~converted_weights.fill_model`].
    """
    of_model = {name: tensor for name, tensor in weights.items() if not name.startswith(OBJECTIVE)}
    return fill_model(config, of_model, lambda name: convert_name(name, config))


def discriminator_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The discriminator's weights in a published file, by their names in the discriminator; empty if there are none."""
    return {
        name.removeprefix(DISCRIMINATOR): tensor for name, tensor in weights.items() if name.startswith(DISCRIMINATOR)
    }
