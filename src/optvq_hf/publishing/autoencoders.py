"""Converts autoencoders of other libraries: their encoder and decoder, and their codes or new ones for the transport."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..modeling_optvq import OptVQModel
from ..training.digests import DIGEST, weights_digest
from . import diffusers_source, llamagen_source, taming_source
from .arguments import ConversionArguments
from .converted_weights import DTYPES, Autoencoder, draw_codebook, fill_model, make_config
from .reference_files import ReferenceFiles, read_reference


# What reads a library's autoencoders, and how their files are called.
LIBRARIES = {
    "diffusers": (diffusers_source.read_diffusers, diffusers_source.LAYOUT),
    "taming": (taming_source.read_taming, taming_source.LAYOUT),
    "llamagen": (llamagen_source.read_llamagen, llamagen_source.LAYOUT),
}
CODEBOOK = "quantizer.embedding.weight"
# Codes where the source has none and the user names no number.
NEW_CODES = 16384


def convert_autoencoder(source: str, arguments: ConversionArguments) -> tuple[OptVQModel, dict[str, Any]]:
    """Reads and converts an autoencoder; gives the model, and the record of the conversion for the model card.

    Raises:
        OSError: If something does not exist or cannot be reached.
        ValueError: If the source is broken, holds code, does not fit its configuration, or does not state its licence.
    """
    read, layout = LIBRARIES[arguments.from_]
    files = read_reference(source, arguments.reference_config, layout)
    license = files.license if arguments.license is None else {"license": arguments.license}
    if not license:
        raise ValueError(
            f"{source} does not state the licence of its weights: name it with --license, as its authors do (`other` if it "
            "has no identifier)"
        )
    autoencoder = read(files, arguments.image_size)
    model, notes = make_model(autoencoder, arguments.codebook_size, arguments.num_codebook_heads)
    return model, _record(files, autoencoder, notes, license, weights_digest(model))


def make_model(
    autoencoder: Autoencoder, codebook_size: int | None = None, num_heads: int | None = None
) -> tuple[OptVQModel, tuple[str, ...]]:
    """Makes the model; gives also what is to be said about its codebook.

    Args:
        codebook_size, num_heads: Of a new codebook. It is made if one of them is given, or if the autoencoder has no codes.

    Raises:
        ValueError: If the weights do not fit the configuration, or this does not make a model.
    """
    codes = {name for name in autoencoder.weights if autoencoder.our_name(name) == CODEBOOK}
    fields = dict(autoencoder.fields)
    has_codes = "codebook_size" in fields
    is_new = not has_codes or codebook_size is not None or num_heads is not None
    fields |= {"num_codebook_heads": 1 if num_heads is None else num_heads, "use_codebook_projection": False}
    if codebook_size is not None or not has_codes:
        fields["codebook_size"] = NEW_CODES if codebook_size is None else codebook_size
    config = make_config(fields)
    if not is_new:
        scaled = ", scaled to length 1" if config.normalize_latents else ""
        note = f"Its codes are those of the source{scaled}; training moves them by optimal transport."
        return fill_model(config, autoencoder.weights, autoencoder.our_name), (note,)
    weights = {name: tensor for name, tensor in autoencoder.weights.items() if name not in codes}
    centre, spread = _scale_of({name: autoencoder.weights[name] for name in codes}) if codes else autoencoder.scale
    model = fill_model(config, weights, autoencoder.our_name, lambda model: draw_codebook(model, centre, spread))
    return model, (
        "**Its codebook is new and untrained**: train it (`optvq train --model`) before its codes are used.",
    )


def _scale_of(codes: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the numbers in these codes."""
    for name, tensor in codes.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"the weights do not fit the configuration: wrong dtype: {name} is {tensor.dtype}")
    deviation, mean = torch.std_mean(torch.cat([tensor.flatten().float() for tensor in codes.values()]))
    if not (math.isfinite(mean) and math.isfinite(deviation)):
        raise ValueError("the weights do not fit the configuration: NaN or inf in the codes")
    return mean, deviation


def _record(
    files: ReferenceFiles, autoencoder: Autoencoder, notes: tuple[str, ...], license: Mapping[str, str], digest: str
) -> dict[str, Any]:
    license = dict(license)
    if license["license"] == "other":
        notes = (*notes, "Its licence has no identifier: see the source.")
    link = license.get("license_link", "https://")
    if not link.startswith(("https://", "http://")):  # a file of the source
        if files.revision:
            license["license_link"] = f"https://huggingface.co/{files.source}/blob/{files.revision}/{link}"
        else:
            del license["license_link"]
    return {
        "source": files.source if files.revision else Path(files.source).resolve().name,
        "revision": files.revision,
        "origin": autoencoder.origin,
        **license,
        "notes": [*autoencoder.notes, *notes],
        "left_out": autoencoder.left_out,
        "has_discriminator": False,
        DIGEST: digest,
    }
