"""OptVQ for Hugging Face: vector quantization by optimal transport (arXiv 2412.15195).

Importing this package registers OptVQ with transformers' Auto classes and pipelines. The import is lazy: names are imported
when they are first used, and OptVQ is registered as soon as transformers imports its registries.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register_with_transformers


if TYPE_CHECKING:
    from . import sinkhorn
    from .configuration_optvq import OptVQConfig
    from .generation_optvq import OptVQLogitsProcessor
    from .image_processing_optvq import OptVQImageProcessor
    from .modeling_optvq import OptVQModel
    from .outputs_optvq import OptVQDecoderOutput, OptVQEncoderOutput, OptVQOutput, QuantizerOutput
    from .pipeline_optvq import ImageReconstructionPipeline, ImageTokenizationPipeline
    from .quantizer_optvq import OptVQQuantizer
    from .residual_optvq import ResidualOptVQQuantizer

__version__ = "1.0.0rc1"

__all__ = [
    "ImageReconstructionPipeline",
    "ImageTokenizationPipeline",
    "OptVQConfig",
    "OptVQDecoderOutput",
    "OptVQEncoderOutput",
    "OptVQImageProcessor",
    "OptVQLogitsProcessor",
    "OptVQModel",
    "OptVQOutput",
    "OptVQQuantizer",
    "QuantizerOutput",
    "ResidualOptVQQuantizer",
    "sinkhorn",
]

# The module of each name, for imports on first use (PEP 562). Type checkers read the block above instead.
_MODULE_OF = {
    "ImageReconstructionPipeline": "pipeline_optvq",
    "ImageTokenizationPipeline": "pipeline_optvq",
    "OptVQConfig": "configuration_optvq",
    "OptVQDecoderOutput": "outputs_optvq",
    "OptVQEncoderOutput": "outputs_optvq",
    "OptVQImageProcessor": "image_processing_optvq",
    "OptVQLogitsProcessor": "generation_optvq",
    "OptVQModel": "modeling_optvq",
    "OptVQOutput": "outputs_optvq",
    "OptVQQuantizer": "quantizer_optvq",
    "QuantizerOutput": "outputs_optvq",
    "ResidualOptVQQuantizer": "residual_optvq",
}


def __getattr__(name: str) -> Any:
    if name == "sinkhorn":
        return import_module(".sinkhorn", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value  # so that the next access does not call __getattr__
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
