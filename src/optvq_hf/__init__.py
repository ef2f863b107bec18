"""OptVQ for Hugging Face: vector quantization by optimal transport (arXiv 2412.15195).

Importing this package registers OptVQ with transformers' Auto classes and pipelines.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageToImage, AutoVideoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_optvq import OptVQConfig
from .image_processing_optvq import OptVQImageProcessor
from .modeling_optvq import OptVQDecoderOutput, OptVQEncoderOutput, OptVQModel, OptVQOutput
from .pipeline_optvq import ImageReconstructionPipeline, ImageTokenizationPipeline
from .quantizer_optvq import OptVQQuantizer, QuantizerOutput


__version__ = "0.1.0"

__all__ = [
    "ImageReconstructionPipeline",
    "ImageTokenizationPipeline",
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
AutoModelForImageToImage.register(OptVQConfig, OptVQModel)
AutoImageProcessor.register(OptVQConfig, image_processor_classes={"torchvision": OptVQImageProcessor})
# transformers 5.23 takes an image processor's remote code for a video processor's, and would ask whether to run it.
AutoVideoProcessor.register(OptVQConfig, None, exist_ok=True)
for task, pipeline_class in (
    ("image-tokenization", ImageTokenizationPipeline),
    ("image-reconstruction", ImageReconstructionPipeline),
):
    PIPELINE_REGISTRY.register_pipeline(task, pipeline_class=pipeline_class, pt_model=AutoModel, type="image")
