"""The latents that a run trains a quantizer on: of its encoder and images, as `optvq tokenize --latents` wrote them."""

from pathlib import Path

import numpy as np
from datasets import Dataset

from ..data.arguments import DataArguments
from ..data.fingerprint import full_fingerprint
from ..data.loading import held_out_rows, load_images
from ..image_processing_optvq import OptVQImageProcessor
from ..modeling_optvq import OptVQModel
from ..training.digests import encoder_digest
from .manifest import difference, read_manifest
from .reading import identity, load_tokens


def load_latents(data: DataArguments, model: OptVQModel, image_processor: OptVQImageProcessor) -> tuple[Dataset, str]:
    """The latents of the images to train on, without those of `--eval-fraction`, and what tells them from others.

    Returns:
        A dataset with `latents` (encoder_channels, H/f, W/f) float32, and a digest of them.

    Raises:
        FileNotFoundError, OSError: If they do not exist, or making them has not finished.
        ValueError: If a shard is broken, or another encoder, other images or another preprocessing made them.
    """
    folder = Path(data.latents or "")
    split = data.train_split.partition("[")[0]
    manifest = read_manifest(folder)
    latents = load_tokens(folder, split=split, latents=True)
    settings = manifest["splits"][split]["settings"]
    again = "make them again by `optvq tokenize --latents`"
    if settings["latents_of"] != encoder_digest(model):
        raise ValueError(
            f"the latents in {folder} are of the encoder of {manifest['model']['id']}, and this model has another: {again}"
        )
    processing = {name: value for name, value in image_processor.to_dict().items() if name != "auto_map"}
    if wrong := difference(manifest["model"]["preprocessing"], processing):
        raise ValueError(f"the latents in {folder} are of images with {wrong}: {again}")
    images = load_images(data, data.train_split, settings["columns"])
    made_of = settings["dataset"]
    if (made_of["split"], made_of["fingerprint"]) != (data.train_split, full_fingerprint(images)):
        raise ValueError(
            f"the latents in {folder} are of other images (split {made_of['split']!r} of {made_of['name']}) than split "
            f"{data.train_split!r} of {data.dataset}: {again}"
        )
    content = f"{identity(manifest, split)['tokens_sha256'][:16]} {data.eval_fraction:g} {data.eval_fraction_seed}"
    if data.eval_fraction:
        assert isinstance(images, Dataset)  # a stream is refused before
        is_held_out = held_out_rows(images, data.eval_fraction, data.eval_fraction_seed)
        latents = latents.select(np.flatnonzero(~is_held_out[np.array(latents["index"])]))
    return latents, content
