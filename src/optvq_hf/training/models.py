"""Makes new models with their image processors, and loads those of a folder or the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError
from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

from ..configuration_optvq import OptVQConfig
from ..data.fetching import find_folder
from ..image_processing_optvq import OptVQImageProcessor
from ..modeling_optvq import OptVQModel


# Files that a model is loaded from.
MODEL_FILES = ["config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json"]

# Fields that a loaded model may be given another value of: its codebook is then made anew.
CODEBOOK_FIELDS = {"codebook_size", "num_codebook_heads"}


def make_model(fields: dict) -> tuple[OptVQModel, OptVQImageProcessor]:
    """A new model with these fields of the configuration, and its image processor."""
    config = OptVQConfig(**fields)
    return OptVQModel(config), make_image_processor(config)


def load_config(source: str, fields: dict | None = None, revision: str | None = None) -> OptVQConfig:
    """The configuration of a model's folder or Hub id, with some fields changed. Errors as of [`load_model`]."""
    folder = find_folder(source, ["config.json"], revision)
    try:
        config = OptVQConfig.get_config_dict(folder)[0]
        if config.get("model_type") != OptVQConfig.model_type:
            raise ValueError(f"its model type is {config.get('model_type')!r}, not {OptVQConfig.model_type!r}")
        config = OptVQConfig.from_pretrained(folder, **(fields or {}))
        config.validate()
        return config
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"cannot load model {source!r}: {str(error).replace(str(folder), source)}") from error


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
    try:
        config = OptVQConfig.get_config_dict(folder)[0]
        if config.get("model_type") != OptVQConfig.model_type:
            raise ValueError(f"its model type is {config.get('model_type')!r}, not {OptVQConfig.model_type!r}")
        with _without_load_report():  # what is wrong with the weights is said below
            options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
            model, info = OptVQModel.from_pretrained(folder, **options, **fields)
        if info["missing_keys"]:
            raise ValueError(f"its weights lack {', '.join(sorted(info['missing_keys'])[:3])}")
        for key, in_file, in_model in sorted(info["mismatched_keys"]):
            if not (key.startswith("quantizer.") and fields.keys() & CODEBOOK_FIELDS):
                raise ValueError(
                    f"{key} is {tuple(in_file)} in its weights, and would be {tuple(in_model)} with these fields"
                )
        image_processor = OptVQImageProcessor.from_pretrained(folder)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"cannot load model {source!r}: {str(error).replace(str(folder), source)}") from error
    if fields.keys() & {"image_size", "num_channels"}:
        image_processor = make_image_processor(model.config)
    return model, image_processor


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
