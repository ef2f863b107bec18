"""Makes new models with their image processors, and loads those of a folder or the Hub."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

from ..configuration_optvq import OptVQConfig
from ..data.fetching import find_folder
from ..image_processing_optvq import OptVQImageProcessor
from ..modeling_optvq import OptVQModel
from ..parsing import parse_json
from ..weight_shapes_optvq import check_shapes
from .digests import weight_files


# Files that a model is loaded from.
MODEL_FILES = ["config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json"]

# The record that `optvq convert` leaves beside the weights, and its entries that say whose they were.
CONVERSION_FILE = "conversion.json"
OF_SOURCE = ("source", "revision", "origin", "license", "license_name", "license_link")

# Fields that a loaded model may be given another value of: its codebook is then made anew.
CODEBOOK_FIELDS = {"codebook_size", "num_codebook_heads"}
# Fields whose other value adds modules: levels, whose codebooks are then new, or convolutions that change nothing at first.
ADDING_FIELDS = {"num_quantizers", "use_quant_conv"}

LONGEST_REASON = 400  # characters; some errors of torch list where they were raised
LONGEST_SIDE = 8192  # pixels, of pictures that an image processor makes


def make_model(fields: dict) -> tuple[OptVQModel, OptVQImageProcessor]:
    """A new model with these fields of the configuration, and its image processor."""
    config = OptVQConfig(**fields)
    return OptVQModel(config), make_image_processor(config)


def load_config(source: str, fields: dict | None = None, revision: str | None = None) -> OptVQConfig:
    """The configuration of a model's folder or Hub id, with some fields changed. Errors as of [`load_model`].

    Raises:
        ValueError: Also if the fields would remove the projection of its codebook.
    """
    folder = find_folder(source, ["config.json"], revision)
    with _plain_errors(f"cannot load model {source!r}", folder, source):
        _check_model_type(folder)
        _check_projection(folder, fields or {})
        config = OptVQConfig.from_pretrained(folder, **(fields or {}))
        config.validate()
        return config


def load_model(
    source: str, fields: dict | None = None, revision: str | None = None
) -> tuple[OptVQModel, OptVQImageProcessor]:
    """The model and image processor of a folder or Hub id, with some fields of the configuration changed.

    Args:
        fields: Those of [`CODEBOOK_FIELDS`] replace the codebook by a new one; others may not change the shape of any weight.
        revision: Branch, tag or commit of a model on the Hub.

    Raises:
        ValueError: If it is not an OptVQ model, a file is broken, or the fields do not fit its weights.
        OSError: If it does not exist or cannot be reached.
    """
    fields = fields or {}
    folder = find_folder(source, MODEL_FILES, revision)  # all files from one commit
    with _plain_errors(f"cannot load model {source!r}", folder, source):
        _check_model_type(folder)
        with _without_load_report():  # what is wrong with the weights is said by the error
            new_codebook = bool(fields.keys() & CODEBOOK_FIELDS)
            saved = OptVQConfig.from_pretrained(folder)
            added = {
                name: fields[name] for name in ADDING_FIELDS & fields.keys() if fields[name] != getattr(saved, name)
            }
            fields = {name: value for name, value in fields.items() if name not in added}
            with torch.device("meta"):  # nothing is allocated before the shapes fit
                empty = OptVQModel(OptVQConfig.from_pretrained(folder, **fields))
            check_shapes(empty, weight_files(folder), new_codebook, may_lack=False)
            model = OptVQModel.from_pretrained(folder, ignore_mismatched_sizes=new_codebook, **fields)
            if added:
                model = _with_added(model, added)
        image_processor = _read_image_processor(folder)
    if fields.keys() & {"image_size", "num_channels"}:
        image_processor = make_image_processor(model.config)
    return model, image_processor


def _with_added(model: OptVQModel, fields: dict) -> OptVQModel:
    """The model with other values of [`ADDING_FIELDS`]: its backbone stays."""
    if fields.get("use_quant_conv") is False:
        raise ValueError("the convolutions around its quantizer cannot be removed (use_quant_conv=False)")
    config = copy.deepcopy(model.config)
    for name, value in fields.items():
        setattr(config, name, value)
    larger = OptVQModel(config)
    larger.to(model.dtype)  # pyright: ignore[reportArgumentType]
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("quantizer.")}
    if "num_quantizers" not in fields:
        kept = model.state_dict()
    larger.load_state_dict(kept, strict=False)
    if "use_quant_conv" in fields:
        for layer in (larger.quant_conv, larger.post_quant_conv):
            assert isinstance(layer, torch.nn.Conv2d) and layer.bias is not None
            torch.nn.init.dirac_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    return larger.eval()


def note_source(config: OptVQConfig, source: str, revision: str | None = None) -> None:
    """Notes source and licence of converted weights in the configuration: both stay with what is trained from them.

    Nothing changes for other weights; those that were trained from converted ones have the note already.

    Args:
        source, revision: As of [`load_model`].

    Raises:
        ValueError: If the record of the conversion is broken.
    """
    path = find_folder(source, [CONVERSION_FILE], revision) / CONVERSION_FILE
    if not path.is_file():
        return
    try:
        record = parse_json(path.read_text())
        note = {name: record[name] for name in OF_SOURCE if record.get(name) is not None}
        type_validator("source and licence", note, dict[str, str])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is broken: {' '.join(str(error).split())}") from error
    config.converted_from = note


def read_config(folder: Path) -> OptVQConfig:
    """The configuration in a folder.

    Raises:
        ValueError: If it is not that of an OptVQ model, or broken.
        OSError: If there is none.
    """
    with _plain_errors(f"{folder / 'config.json'} is broken", folder, str(folder)):
        _check_model_type(folder)
        return OptVQConfig.from_pretrained(folder, local_files_only=True)


def _check_model_type(folder: Path) -> None:
    config = OptVQConfig.get_config_dict(folder)[0]
    if config.get("model_type") != OptVQConfig.model_type:
        raise ValueError(f"its model type is {config.get('model_type')!r}, not {OptVQConfig.model_type!r}")


def _check_projection(folder: Path, fields: dict) -> None:
    """Raises ValueError for fields that would remove the projection of a model's codebook, which its codes go through."""
    if fields.get("use_codebook_projection") is False and OptVQConfig.from_pretrained(folder).use_codebook_projection:
        raise ValueError(
            "its codebook has a projection, which cannot be removed (use_codebook_projection false): set "
            "use_codebook_projection true and codebook_update gradient, in the recipe or as flags"
        )


def _read_image_processor(folder: Path) -> OptVQImageProcessor:
    """The image processor in a folder, tried on a small picture: wrong types in its file show only in use."""
    image_processor = OptVQImageProcessor.from_pretrained(folder)
    if "_auto_class" in vars(image_processor):
        raise ValueError("preprocessor_config.json: _auto_class is a part of the class, no entry of the file")
    auto_map = getattr(image_processor, "auto_map", {})
    if not isinstance(auto_map, dict):
        raise ValueError(f"preprocessor_config.json: auto_map must be a dict, got {auto_map!r}")
    sides = [side for size in (image_processor.size, image_processor.crop_size) for side in dict(size or {}).values()]
    if not all(isinstance(side, int) and side <= LONGEST_SIDE for side in sides):
        raise ValueError(f"preprocessor_config.json: sizes must be at most {LONGEST_SIDE:,} pixels, got {sides}")
    small = {"height": 8, "width": 8}
    image_processor(Image.new("RGB", (8, 8)), return_tensors="pt", size=small, crop_size=small)
    return image_processor


@contextmanager
def _plain_errors(what: str, folder: Path, source: str) -> Iterator[None]:
    """Turns every error into a ValueError or OSError of one line: a wrong type in a file may raise anything in transformers."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[-1].strip() if isinstance(error, StrictDataclassError) else " ".join(lines)
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{what}: {reason.replace(str(folder), source)[:LONGEST_REASON]}") from error


@contextmanager
def _without_load_report() -> Iterator[None]:
    before = get_verbosity()
    set_verbosity_error()
    try:
        yield
    finally:
        set_verbosity(before)


def make_image_processor(config: OptVQConfig) -> OptVQImageProcessor:
    """The image processor that resizes and crops to `config.image_size`."""
    size = config.image_size
    return OptVQImageProcessor(
        num_channels=config.num_channels, size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
