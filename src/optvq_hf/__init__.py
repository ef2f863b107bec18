"""OptVQ for Hugging Face: vector quantization by optimal transport (arXiv 2412.15195).

Importing this package registers OptVQ with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel

from .configuration_optvq import OptVQConfig
from .image_processing_optvq import OptVQImageProcessor
from .modeling_optvq import OptVQDecoderOutput, OptVQEncoderOutput, OptVQModel, OptVQOutput
from .quantizer_optvq import OptVQQuantizer, QuantizerOutput


__version__ = "0.1.0"

__all__ = [
    "OptVQConfig",
    "OptVQDecoderOutput",
    "OptVQEncoderOutput",
    "OptVQImageProcessor",
    "OptVQModel",
    "OptVQOutput",
    "OptVQQuantizer",
    "QuantizerOutput",
]

AutoConfig.register(OptVQConfig.model_type, OptVQConfig)
AutoModel.register(OptVQConfig, OptVQModel)
AutoImageProcessor.register(OptVQConfig, image_processor_classes={"torchvision": OptVQImageProcessor})
