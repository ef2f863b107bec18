"""Models of the original implementation of OptVQ, as models of this library: configuration, names of weights, both checked."""

import re

import torch
from huggingface_hub.errors import StrictDataclassError

from ..backbone_optvq import PLAIN_CNN_LATENT_CHANNELS
from ..configuration_optvq import OptVQConfig
from ..modeling_optvq import OptVQModel


# ---- configuration ---------------------------------------------------------------------------------------------------

NORMALIZATIONS = {"all": "zscore", "dim": "sqrt_dim", "null": "none"}
LOSS_TYPES = {"l2": "l2", "l1": "l1", "ce": "cross_entropy"}
ASSIGNMENTS = {"optvq": "sinkhorn", "basevq": "nearest"}

# Classes that the original's YAML files name, by the last part of their import path.
BACKBONES = {"Encoder": "vqgan", "Decoder": "vqgan", "PlainCNNEncoder": "plain_cnn", "PlainCNNDecoder": "plain_cnn"}
QUANTIZERS = {"VectorQuantizerSinkhorn": "optvq", "VectorQuantizer": "basevq"}

# What the original's quantizers do where a configuration is silent.
QUANTIZER_DEFAULTS = {
    "n_e": 1024, "e_dim": 128, "beta": 1.0, "use_norm": False, "use_proj": True, "fix_codes": False, "loss_q_type": "ce",
    "num_head": 1, "start_quantize_steps": None,
}  # fmt: skip
SINKHORN_DEFAULTS = {"epsilon": 10.0, "n_iters": 5, "normalize_mode": "all", "use_prob": True}
PLAIN_CNN_IMAGE_SIZE = 32


def convert_config(reference: dict, keep_batch_assignment: bool = False) -> OptVQConfig:
    """The configuration of a published folder or of a training run, as one of this library.

    Args:
        reference: As it stands in the original's config.json or YAML.
        keep_batch_assignment: At inference, assign by transport over the batch as the original does, and not to the
            nearest code. The codes of an image then depend on the images beside it.

    Raises:
        ValueError: For a configuration that is incomplete, or of a model that cannot be had here.
    """
    parts = _parts(reference)
    encoder, decoder, quantize = parts["encoder"], parts["decoder"], parts["quantize"]
    quantize_type = parts["quantize_type"]
    if quantize_type not in ASSIGNMENTS:
        raise ValueError(
            f"unknown quantizer {quantize_type!r} in the configuration; known are {', '.join(ASSIGNMENTS)}"
        )
    defaults = {**QUANTIZER_DEFAULTS, **(SINKHORN_DEFAULTS if quantize_type == "optvq" else {})}
    unknown = sorted(quantize.keys() - defaults.keys() - SINKHORN_DEFAULTS.keys())
    if unknown:
        raise ValueError(f"unknown quantizer setting {unknown[0]!r} in the configuration")
    quantize = {**defaults, **quantize}
    if quantize["use_norm"]:
        raise ValueError("the quantizer normalises its codes (use_norm), which the original itself no longer supports")

    transport = quantize_type == "optvq"
    fields = {
        "codebook_size": quantize["n_e"],
        "codebook_dim": quantize["e_dim"],
        "num_codebook_heads": quantize["num_head"],
        "use_codebook_projection": quantize["use_proj"],
        "freeze_codebook": quantize["fix_codes"],
        "codebook_loss_type": _known(LOSS_TYPES, quantize["loss_q_type"], "loss_q_type"),
        "codebook_loss_weight": quantize["beta"],
        "training_assignment": "sample" if transport and quantize["use_prob"] else ASSIGNMENTS[quantize_type],
        "inference_assignment": ASSIGNMENTS[quantize_type] if keep_batch_assignment else "nearest",
        "use_quant_conv": parts["use_connector"],
    }
    if transport:
        fields |= {
            "sinkhorn_epsilon": quantize["epsilon"],
            "sinkhorn_iterations": quantize["n_iters"],
            "cost_normalization": _known(NORMALIZATIONS, quantize["normalize_mode"], "normalize_mode"),
        }
    fields |= (
        _plain_cnn_fields(encoder, decoder) if parts["backbone"] == "plain_cnn" else _vqgan_fields(encoder, decoder)
    )
    try:
        return OptVQConfig(**fields)
    except StrictDataclassError as error:
        raise ValueError(f"the configuration does not make a model: {str(error).splitlines()[-1].strip()}") from error


def training_notes(reference: dict) -> tuple[str, ...]:
    """What a configuration says that has no place in ours, one line each."""
    parts = _parts(reference)
    quantize = parts["quantize"]
    notes = []
    if quantize.get("start_quantize_steps") is not None:
        notes.append(f"It was trained without quantization for its first {quantize['start_quantize_steps']:,} steps.")
    if parts["quantize_type"] == "optvq" and quantize.get("use_prob", SINKHORN_DEFAULTS["use_prob"]):
        notes.append(
            "The original draws codes at random from the plan at inference too; here that is left to training."
        )
    if quantize.get("fix_codes"):
        notes.append("Its embedding was frozen in training, but not the projection; here both are.")
    return tuple(notes)


def _parts(reference: dict) -> dict:
    """Encoder, decoder and quantizer settings, and their kinds, of either layout."""
    model = reference.get("model", reference)
    if isinstance(model, dict) and isinstance(model.get("autoencoder"), dict):
        model = model["autoencoder"].get("params", {})
    missing = [name for name in ("encoder", "decoder", "quantize") if not isinstance(model.get(name), dict)]
    if missing:
        raise ValueError(f"the configuration has no entry {missing[0]!r}: is it one of the original implementation?")
    parts, targets = {}, {}
    for name in ("encoder", "decoder", "quantize"):
        part = model[name]
        targets[name] = str(part.get("target", "")).rpartition(".")[2]
        parts[name] = part.get("params", {}) if "target" in part else part
    if targets["encoder"]:
        backbone = _known(BACKBONES, targets["encoder"], "encoder")
        quantize_type = QUANTIZERS.get(targets["quantize"], targets["quantize"])
    else:
        backbone = "plain_cnn" if model.get("backbone") == "plain_cnn" else "vqgan"
        quantize_type = model.get("quantize_type", "optvq")
    connector = bool(model.get("use_connector", True))
    return {**parts, "backbone": backbone, "quantize_type": quantize_type, "use_connector": connector}


def _plain_cnn_fields(encoder: dict, decoder: dict) -> dict:
    channels = _needed(encoder, "in_dim", "encoder")
    if channels != _needed(decoder, "out_dim", "decoder"):
        raise ValueError(f"encoder and decoder differ in their image channels: {channels} and {decoder['out_dim']}")
    return {
        "backbone": "plain_cnn",
        "num_channels": channels,
        "image_size": PLAIN_CNN_IMAGE_SIZE,
        "latent_channels": PLAIN_CNN_LATENT_CHANNELS,
    }


def _vqgan_fields(encoder: dict, decoder: dict) -> dict:
    names = {
        "resolution": "image_size", "in_channels": "num_channels", "ch": "base_channels", "ch_mult": "channel_multiplier",
        "num_res_blocks": "num_res_blocks", "attn_resolutions": "attn_resolutions", "z_channels": "latent_channels",
    }  # fmt: skip
    fields = {ours: _needed(encoder, theirs, "encoder") for theirs, ours in names.items()}
    for name in (*names, "out_ch", "dropout"):
        if name in decoder and name in encoder and decoder[name] != encoder[name]:
            raise ValueError(f"encoder and decoder differ in {name}: {encoder[name]} and {decoder[name]}")
    if decoder.get("out_ch", fields["num_channels"]) != fields["num_channels"]:
        raise ValueError(f"images have {fields['num_channels']} channels, but reconstructions {decoder['out_ch']}")
    if encoder.get("double_z"):
        raise ValueError("the encoder returns a mean and a variance (double_z), which a quantizer has no use for")
    return {"backbone": "vqgan", **fields, "dropout": encoder.get("dropout", 0.0)}


def _needed(part: dict, name: str, of: str):
    if name not in part:
        raise ValueError(f"the configuration of the {of} lacks {name!r}")
    return part[name]


def _known(names: dict, name, what: str):
    if name not in names:
        raise ValueError(f"unknown {what} {name!r} in the configuration; known are {', '.join(map(str, names))}")
    return names[name]


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

# Convolutions of the plain CNN, and their places in our nn.Sequential.
PLAIN_CNN_LAYERS = {
    "encoder": {"in_fc": 0, "down1": 2, "conv1": 3, "down2": 5, "conv2": 6, "out_fc": 8},
    "decoder": {"in_fc": 0, "up1": 2, "conv1": 3, "up2": 5, "conv2": 6, "out_fc": 8},
}

# The rest of a training objective, which published files carry along.
DISCRIMINATOR = "loss.discriminator."
OBJECTIVE = "loss."


def convert_name(name: str, config: OptVQConfig) -> str:
    """The name here of a tensor of the original's `VQModel`."""
    if config.backbone == "plain_cnn":
        part, _, rest = name.partition(".")
        layer, _, tensor = rest.rpartition(".")
        if layer in PLAIN_CNN_LAYERS.get(part, {}):
            return f"{part}.{PLAIN_CNN_LAYERS[part][layer]}.{tensor}"
    for theirs, ours in VQGAN_NAMES:
        name = re.sub(theirs, ours, name)
    # Our decoder's stages stand in the order in which they run, from the smallest map to the largest.
    last = len(config.channel_multiplier) - 1
    return re.sub(r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.stages.{last - int(match[1])}.", name)


def convert_model(config: OptVQConfig, weights: dict[str, torch.Tensor]) -> OptVQModel:
    """A model with the weights of the original's `VQModel`, in their dtype, in evaluation mode.

    Raises:
        ValueError: If a weight is missing, left over, of another shape or not a float; the message lists them.
    """
    weights = {convert_name(name, config): tensor for name, tensor in weights.items() if not name.startswith(OBJECTIVE)}
    with torch.device("meta"):
        model = OptVQModel(config)
    wanted = dict(model.named_parameters())
    problems = [f"missing: {name}" for name in wanted if name not in weights]
    problems += [f"not known: {name}" for name in weights if name not in wanted]
    for name in wanted.keys() & weights.keys():
        if wanted[name].shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(wanted[name].shape)}"
            problems.append(f"wrong shape: {name} is {shapes}")
        elif not weights[name].is_floating_point():
            problems.append(f"not a float: {name} is {weights[name].dtype}")
    if problems:
        shown, more = "; ".join(sorted(problems)[:6]), len(problems) - 6
        raise ValueError(
            f"the weights do not fit the configuration: {shown}" + (f"; and {more} more" if more > 0 else "")
        )
    model.load_state_dict(weights, strict=False, assign=True)
    model.quantizer.to_empty(device="cpu", recurse=False)  # the running averages, which the original does not have
    model.quantizer.reset_parameters()
    return model.eval()


def discriminator_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the discriminator that a published folder carries, by their names in it; empty if it has none."""
    return {
        name.removeprefix(DISCRIMINATOR): tensor for name, tensor in weights.items() if name.startswith(DISCRIMINATOR)
    }
