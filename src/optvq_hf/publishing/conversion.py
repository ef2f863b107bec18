"""Converts models of the original implementation of OptVQ: configuration and weights, both checked."""

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ..configuration_optvq import PLAIN_CNN_LATENT_CHANNELS, OptVQConfig
from ..modeling_optvq import OptVQModel
from ..training.digests import DIGEST
from .reference_files import ReferenceFiles


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

VQGAN_FIELDS = {
    "resolution": "image_size", "in_channels": "num_channels", "ch": "base_channels", "ch_mult": "channel_multiplier",
    "num_res_blocks": "num_res_blocks", "attn_resolutions": "attn_resolutions", "z_channels": "latent_channels",
}  # fmt: skip
# Settings of the VQGAN's parts that have a single supported value.
VQGAN_FIXED = {"double_z": False, "resamp_with_conv": True, "give_pre_end": False, "tanh_out": False}
MOST_LEVELS = 12


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
        "codebook_loss_type": _known(LOSS_TYPES, quantize["loss_q_type"], "loss_q_type"),
        "codebook_loss_weight": quantize["beta"],
        "training_assignment": "sample" if is_transport and quantize["use_prob"] else ASSIGNMENTS[quantize_type],
        "inference_assignment": ASSIGNMENTS[quantize_type] if keep_batch_assignment else "nearest",
        "use_quant_conv": parts["use_connector"],
    }
    if is_transport:
        fields |= {
            "sinkhorn_epsilon": quantize["epsilon"],
            "sinkhorn_iterations": quantize["n_iters"],
            "cost_normalization": _known(NORMALIZATIONS, quantize["normalize_mode"], "normalize_mode"),
        }
    make_fields = _plain_cnn_fields if parts["backbone"] == "plain_cnn" else _vqgan_fields
    try:
        return OptVQConfig(**fields, **make_fields(parts["encoder"], parts["decoder"]))
    except (StrictDataclassError, TypeError, OverflowError) as error:
        reason = str(error).splitlines()[-1].strip()[:300]
        raise ValueError(f"the configuration does not make a model: {reason}") from error


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
    model = _checked_dict(model, "model")
    parts, kinds = {}, {}
    for name in ("encoder", "decoder", "quantize"):
        part = _checked_dict(model.get(name), name)
        if "target" in part:
            kinds[name] = str(part["target"]).rpartition(".")[2]
            part = _checked_dict(part.get("params") or {}, f"{name}.params")
        parts[name] = part
    backbones = {_known(BACKBONES, kinds[name], name) for name in ("encoder", "decoder") if name in kinds}
    if "backbone" in model:
        backbones.add(_known(BACKBONE_NAMES, model["backbone"], "backbone"))
    if len(backbones) > 1:
        raise ValueError(f"encoder and decoder are of different kinds: {' and '.join(sorted(backbones))}")
    quantize_type = model.get("quantize_type", "optvq")
    if "quantize" in kinds:
        quantize_type = _known(QUANTIZERS, kinds["quantize"], "quantizer")
    _known(ASSIGNMENTS, quantize_type, "quantizer")
    connector = _checked_bool(model.get("use_connector", True), "use_connector")
    backbone = next(iter(backbones), "vqgan")
    return {**parts, "backbone": backbone, "quantize_type": quantize_type, "use_connector": connector}


def _quantizer_settings(parts: dict) -> dict:
    defaults = {**QUANTIZER_DEFAULTS, **(SINKHORN_DEFAULTS if parts["quantize_type"] == "optvq" else {})}
    _check_names(parts["quantize"], {*QUANTIZER_DEFAULTS, *SINKHORN_DEFAULTS}, "quantizer")
    settings = {**defaults, **parts["quantize"]}
    for name in ("use_norm", "use_proj", "fix_codes", "use_prob"):
        _checked_bool(settings.get(name, False), name)
    if settings["use_norm"]:
        raise ValueError("the quantizer normalises its codes (use_norm), which the original itself no longer supports")
    return settings


def _plain_cnn_fields(encoder: dict, decoder: dict) -> dict:
    _check_names(encoder, {"in_dim"}, "encoder")
    _check_names(decoder, {"out_dim"}, "decoder")
    channels, out_channels = encoder.get("in_dim", PLAIN_CNN_CHANNELS), decoder.get("out_dim", PLAIN_CNN_CHANNELS)
    if channels != out_channels:
        raise ValueError(f"encoder and decoder differ in their image channels: {channels} and {out_channels}")
    return {
        "backbone": "plain_cnn",
        "num_channels": channels,
        "image_size": PLAIN_CNN_IMAGE_SIZE,
        "latent_channels": PLAIN_CNN_LATENT_CHANNELS,
    }


def _vqgan_fields(encoder: dict, decoder: dict) -> dict:
    for name, part in (("encoder", encoder), ("decoder", decoder)):
        _check_names(part, {*VQGAN_FIELDS, *VQGAN_FIXED, "out_ch", "dropout"}, name)
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
    if isinstance(encoder["ch_mult"], list) and len(encoder["ch_mult"]) > MOST_LEVELS:
        raise ValueError(f"ch_mult must have at most {MOST_LEVELS} entries, got {len(encoder['ch_mult'])}")
    return {"backbone": "vqgan", **fields, "dropout": encoder.get("dropout", 0.0)}


def _known(names: dict[Any, str], name: Any, what: str) -> str:
    if not isinstance(name, (str, type(None))) or name not in names:
        known = ", ".join(name for name in names if name is not None)
        raise ValueError(f"unknown {what} {name!r} in the configuration; known are {known}")
    return names[name]


def _check_names(part: dict, known: set[str], of: str) -> None:
    for name in part:
        if name not in known:
            raise ValueError(f"unknown {of} setting {name!r} in the configuration")


def _checked_dict(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        what = "no entry" if value is None else f"{type(value).__name__} instead of a mapping as its entry"
        raise ValueError(f"the configuration has {what} {name!r}: is it one of the original implementation?")
    return value


def _checked_bool(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false in the configuration, got {value!r}")
    return value


# ---- weights ---------------------------------------------------------------------------------------------------------

# Modules of the VQGAN, theirs -> ours, applied in this order.
VQGAN_NAMES = [
    (r"^quantize\.", "quantizer."),
    (r"^quantizer\.proj\.", "quantizer.projection."),
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

# Convolutions of the plain CNN, and their indices in our nn.Sequential.
PLAIN_CNN_LAYERS = {
    "encoder": {"in_fc": 0, "down1": 2, "conv1": 3, "down2": 5, "conv2": 6, "out_fc": 8},
    "decoder": {"in_fc": 0, "up1": 2, "conv1": 3, "up2": 5, "conv2": 6, "out_fc": 8},
}

# Prefixes of the training objective's weights, which published files include.
OBJECTIVE = "loss."
DISCRIMINATOR = "loss.discriminator."
PERCEPTUAL_NETWORK = "loss.perceptual_loss."

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def convert_name(name: str, config: OptVQConfig) -> str:
    """Our name of a tensor of the original's `VQModel`."""
    if config.backbone == "plain_cnn":
        part, _, rest = name.partition(".")
        layer, _, tensor = rest.rpartition(".")
        if layer in PLAIN_CNN_LAYERS.get(part, {}):
            return f"{part}.{PLAIN_CNN_LAYERS[part][layer]}.{tensor}"
    for theirs, ours in VQGAN_NAMES:
        name = re.sub(theirs, ours, name)
    # Our decoder's stages are listed in the order in which they run, from the smallest map to the largest.
    last = len(config.channel_multiplier) - 1
    return re.sub(r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.stages.{last - int(match[1])}.", name)


def convert_model(config: OptVQConfig, weights: dict[str, torch.Tensor]) -> OptVQModel:
    """Makes a model with the weights of the original's `VQModel`, in their dtype, in evaluation mode.

    Raises:
        ValueError: If a weight is missing, unknown, duplicate, of a wrong shape or dtype, or not finite; the message lists
            them by their names in the file.
    """
    names = {}  # ours -> theirs
    for theirs in weights:
        ours = convert_name(theirs, config)
        if not theirs.startswith(OBJECTIVE) and names.setdefault(ours, theirs) != theirs:
            raise ValueError(f"the weights hold one tensor twice, as {names[ours]} and {theirs}")
    model = _empty_model(config)
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    problems = [f"missing: {name}" for name in wanted if name not in names]
    problems += [f"not known: {names[name]}" for name in names if name not in wanted]
    for name in names.keys() & wanted.keys():
        tensor = weights[names[name]]
        if tensor.shape != wanted[name]:
            problems.append(f"wrong shape: {names[name]} is {tuple(tensor.shape)}, not {tuple(wanted[name])}")
        elif tensor.dtype not in DTYPES:
            problems.append(f"wrong dtype: {names[name]} is {tensor.dtype}")
        elif not tensor.isfinite().all():
            problems.append(f"NaN or inf: {names[name]}")
    dtypes = sorted({str(weights[theirs].dtype) for theirs in names.values()})
    if not problems and len(dtypes) > 1:
        problems.append(f"several dtypes: {', '.join(dtypes)}")
    if problems:
        shown, more = "; ".join(sorted(problems)[:6]), len(problems) - 6
        raise ValueError(
            f"the weights do not fit the configuration: {shown}" + (f"; and {more} more" if more > 0 else "")
        )
    # Copies, because the tensors of a file may share memory.
    loaded = {ours: weights[theirs].contiguous().clone() for ours, theirs in names.items()}
    model.load_state_dict(loaded, strict=False, assign=True)
    for level in model.quantizer.levels:
        level.to_empty(device="cpu", recurse=False)  # the running state, which the original does not have
        level.reset_parameters()
    return model.eval()


def _empty_model(config: OptVQConfig) -> OptVQModel:
    """A model on the meta device: no memory is allocated before the shapes are known to fit."""
    try:
        with torch.device("meta"):
            return OptVQModel(config)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes beyond what a tensor can have
        reason = str(error).splitlines()[0][:300]
        raise ValueError(f"the configuration does not make a model: {reason}") from error


def discriminator_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The discriminator's weights in a published file, by their names in the discriminator; empty if there are none."""
    return {
        name.removeprefix(DISCRIMINATOR): tensor for name, tensor in weights.items() if name.startswith(DISCRIMINATOR)
    }
