"""Turn a model of the original OptVQ implementation, or another library's autoencoder, into one of this library.

    optvq convert BorelTHU/optvq-16x16x4 runs/optvq-16x16x4
    optvq convert checkpoint.pth runs/mine --reference-config optvq_256_f16_h4.yaml --with-discriminator
    optvq convert --from diffusers stabilityai/sdxl-vae runs/sdxl --codebook-size 65536

SOURCE is a Hub id or a folder as its library publishes it, or a training checkpoint. OUT becomes a folder that
`OptVQModel.from_pretrained` loads, with the image processor and a model card.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..publishing.arguments import ConversionArguments
from .cli import COMMANDS
from .errors import one_line_errors
from .folders import check_writable
from .parser import Parser


if TYPE_CHECKING:
    from ..image_processing_optvq import OptVQImageProcessor
    from ..modeling_optvq import OptVQModel
    from ..training.losses.discriminator import PatchDiscriminator


def make_parser() -> Parser:
    """Makes the parser of the command: source, output folder and flags of the conversion."""
    positionals = {
        "source": "Hub id, folder or training checkpoint of the original implementation, or of the library in --from",
        "out": "Folder to write; it must be empty or not exist",
    }
    return Parser([ConversionArguments], "convert", COMMANDS["convert"], positionals)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `optvq convert`; a user's mistake ends the process with one line."""
    arguments, source, out = make_parser().parse(argv)
    with one_line_errors("convert"):
        convert(source, Path(out), arguments)


def convert(source: str, out: Path, arguments: ConversionArguments) -> OptVQModel:
    """Converts a model, and writes the whole folder or nothing.

    Raises:
        OSError: If something does not exist, cannot be reached or cannot be written.
        ValueError: If the source is broken, holds code, or does not fit its configuration.
    """
    from ..modeling_optvq import OptVQModel
    from ..publishing.autoencoders import convert_autoencoder
    from ..publishing.model_card import CARD_FILE, make_card
    from ..publishing.records import read_facts
    from ..training.models import CONVERSION_FILE, make_image_processor

    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already: choose a new folder, or empty this one")
    check_writable(out)
    pictures = [read_picture(path) for path in find_pictures(arguments.check_images or [])]
    discriminator = None
    if arguments.from_ == "optvq":
        model, record, discriminator = convert_original(source, arguments)
    else:
        model, record = convert_autoencoder(source, arguments)
    config = model.config
    image_processor = make_image_processor(config)

    existing = next(parent for parent in out.parents if parent.exists())
    with TemporaryDirectory(dir=existing, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / out.name
        model.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        (folder / CONVERSION_FILE).write_text(json.dumps(record, indent=1) + "\n")
        if discriminator is not None:
            discriminator.save_pretrained(folder / "discriminator")
            (folder / "discriminator" / CARD_FILE).unlink(missing_ok=True)  # an empty template of huggingface_hub
        make_card(read_facts(folder), out.name).save(folder / CARD_FILE)
        model = OptVQModel.from_pretrained(folder)
        difference = describe_difference(model, image_processor, pictures) if pictures else None
        if out.exists():  # an empty folder, which may be a mount point
            for path in folder.iterdir():
                shutil.move(path, out)
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder, out)

    size, grid = config.image_size, config.latent_size
    print(
        f"{source}: {model.num_parameters():,} parameters; {size} x {size} images to {grid} x {grid} tokens of "
        f"{config.codes_per_token} codes in {config.codebook_size:,}; at inference: {config.inference_assignment}"
    )
    for note in record["notes"]:
        print(note.replace("**", ""))
    if difference:
        print(difference)
    print(f"model      {out}  (load it with OptVQModel.from_pretrained)")
    return model


def convert_original(
    source: str, arguments: ConversionArguments
) -> tuple[OptVQModel, dict[str, Any], PatchDiscriminator | None]:
    """Reads and converts a model of the original; gives also the record for the card, and the discriminator if asked for."""
    from ..publishing.conversion import convert_config, convert_model, discriminator_weights, record_conversion
    from ..publishing.reference_files import read_reference
    from ..training.digests import weights_digest
    from ..training.losses.discriminator import PatchDiscriminator

    reference = read_reference(source, arguments.reference_config)
    model = convert_model(convert_config(reference.config, arguments.keep_batch_assignment), reference.weights)
    weights = discriminator_weights(reference.weights)
    if arguments.with_discriminator and not weights:
        raise ValueError(f"{source} has no discriminator to keep: convert it without --with-discriminator")
    discriminator = PatchDiscriminator.from_weights(weights) if arguments.with_discriminator else None
    license = arguments.license or "mit"
    return model, record_conversion(reference, license, discriminator is not None, weights_digest(model)), discriminator


def find_pictures(paths: list[str]) -> list[Path]:
    """The files among these paths, and the image files in the folders among them."""
    readable = {extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    pictures = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in readable)
            if not found:
                raise FileNotFoundError(f"--check-images: there are no image files in {path}")
            pictures += found
        elif path.is_file():
            pictures.append(path)
        else:
            raise FileNotFoundError(f"--check-images: there is no file or folder {path}")
    return pictures


def read_picture(path: Path) -> Image.Image:
    """Reads a picture as RGB.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"--check-images: cannot read {path}: {error}") from error


def describe_difference(model: OptVQModel, image_processor: OptVQImageProcessor, pictures: list[Image.Image]) -> str:
    """Says how many codes differ between transport over these pictures, as one batch, and nearest codes."""
    import torch

    with torch.inference_mode():
        pixel_values = image_processor(pictures, return_tensors="pt").pixel_values.to(model.dtype)
        encoded = [model.encode(batch, assignment="nearest").latents for batch in pixel_values.split(16)]
        latents = torch.cat([latents for latents in encoded if latents is not None])
        nearest, transport = (model.quantizer(latents, assignment=name).codes for name in ("nearest", "sinkhorn"))
    differing = (nearest != transport).sum().item()
    return (
        f"{differing:,} of {nearest.numel():,} codes ({100 * differing / nearest.numel():.1f} %) differ between "
        f"sinkhorn on the batch of {len(pictures)} images and nearest"
    )


if __name__ == "__main__":
    main()
